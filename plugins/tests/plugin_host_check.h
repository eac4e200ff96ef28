// Checks that print and count what fails, and go on.
#pragma once

#include <cstdio>
#include <sstream>
#include <string>

inline int gChecks = 0;
inline int gFailures = 0;
inline std::FILE* gReport = stdout; // where failures are printed

inline bool report(bool ok, char const* file, int line, std::string const& what)
{
    ++gChecks;
    if (!ok)
    {
        ++gFailures;
        std::fprintf(gReport, "%s:%d: %s\n", file, line, what.c_str());
    }
    return ok;
}

template <typename A, typename B>
bool reportEqual(A const& found, B const& expected, char const* file, int line, char const* what)
{
    std::ostringstream text;
    text << what << " is " << found << ", not " << expected;
    return report(found == expected, file, line, text.str());
}

#define CHECK(condition) report(static_cast<bool>(condition), __FILE__, __LINE__, "failed: " #condition)
#define CHECK_EQUAL(found, expected) reportEqual(found, expected, __FILE__, __LINE__, #found)
