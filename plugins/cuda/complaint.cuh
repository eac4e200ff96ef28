// How checks of a configuration say what they do not accept.
#pragma once

#include "hip_attention.h"

#include <cstdarg>
#include <cstdint>
#include <cstdio>

namespace hip_trt
{

// The answer to a configuration or shape that is a null pointer.
inline HipTrtStatus missing(char* message, size_t size)
{
    if (message != nullptr && size > 0)
    {
        std::snprintf(message, size, "config, shape: a pointer is missing");
    }
    return HIP_TRT_INVALID_ARGUMENT;
}

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
        require(value > 0 && (value & (value - 1)) == 0, HIP_TRT_INVALID_ARGUMENT,
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

    // Sizes that are allowed each for itself, and whose product is none: in floating point, where nothing overflows.
    // `workspace`: a bound of its bytes.
    void addressable(const HipTrtShape& shape, int page_size, double workspace)
    {
        constexpr double kMaxBytes = static_cast<double>(int64_t{1} << 48); // more has no address
        const double rows = static_cast<double>(shape.num_query_heads) * shape.new_tokens; // of a sequence
        const double row_bytes = 4.0 * shape.head_dim;
        require(rows <= INT32_MAX, HIP_TRT_INVALID_ARGUMENT,
            "new_tokens: %d is not allowed; times num_query_heads (%d) it must be at most %d", shape.new_tokens,
            shape.num_query_heads, INT32_MAX);
        require(rows * shape.batch * row_bytes <= kMaxBytes && workspace <= kMaxBytes, HIP_TRT_INVALID_ARGUMENT,
            "batch: %d is not allowed; with new_tokens %d, num_query_heads %d and head_dim %d no memory is large enough",
            shape.batch, shape.new_tokens, shape.num_query_heads, shape.head_dim);
        require(row_bytes * shape.num_pages * shape.num_kv_heads * page_size <= kMaxBytes, HIP_TRT_INVALID_ARGUMENT,
            "num_pages: %d is not allowed; with num_kv_heads %d, page_size %d and head_dim %d no memory is large enough",
            shape.num_pages, shape.num_kv_heads, page_size, shape.head_dim);
    }

private:
    char* mMessage;
    size_t mSize;
    HipTrtStatus mStatus = HIP_TRT_SUCCESS;
};

} // namespace hip_trt
