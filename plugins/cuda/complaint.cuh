// How checks of a configuration say what they do not accept.
#pragma once

#include "hip_attention.h"

#include <cstdarg>
#include <cstdio>

namespace hip_trt
{

// The first complaint, as "field: value is not allowed; it must be ...", the words of HipConfig.
class Complaint
{
public:
    Complaint(char* message, size_t size)
        : mMessage(message)
        , mSize(message == nullptr ? 0 : size)
    {
    }

    HipTrtStatus status() const
    {
        return mStatus;
    }

    void require(bool ok, HipTrtStatus status, const char* format, ...) __attribute__((format(printf, 4, 5)))
    {
        if (ok || mStatus != HIP_TRT_SUCCESS)
        {
            return;
        }
        mStatus = status;
        va_list arguments;
        va_start(arguments, format);
        if (mSize > 0)
        {
            std::vsnprintf(mMessage, mSize, format, arguments);
        }
        va_end(arguments);
    }

    void range(const char* field, int64_t value, int64_t low, int64_t high)
    {
        require(value >= low && value <= high, HIP_TRT_INVALID_ARGUMENT,
            "%s: %lld is not allowed; it must be %lld to %lld", field, static_cast<long long>(value),
            static_cast<long long>(low), static_cast<long long>(high));
    }

    void powerOfTwo(const char* field, int value)
    {
        require((value & (value - 1)) == 0, HIP_TRT_INVALID_ARGUMENT,
            "%s: %d is not allowed; it must be a power of two", field, value);
    }

    void divides(const char* field, int value, const char* whole_field, int whole)
    {
        require(mStatus != HIP_TRT_SUCCESS || whole % value == 0, HIP_TRT_INVALID_ARGUMENT,
            "%s: %d is not allowed; it must be a divisor of %s (%d)", field, value, whole_field, whole);
    }

    void multiple(const char* field, int value, const char* part_field, int part)
    {
        require(mStatus != HIP_TRT_SUCCESS || value % part == 0, HIP_TRT_INVALID_ARGUMENT,
            "%s: %d is not allowed; it must be a multiple of %s (%d)", field, value, part_field, part);
    }

private:
    char* mMessage;
    size_t mSize;
    HipTrtStatus mStatus = HIP_TRT_SUCCESS;
};

} // namespace hip_trt
