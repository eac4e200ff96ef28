// Division without a division.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace hip_trt
{

// Division of numbers below 2^31 by one that the host knows: a multiplication and a shift.
struct Divisor
{
    int divisor;
    uint32_t multiplier;
    int shift;

    Divisor() = default;

    explicit Divisor(int value)
        : divisor(value)
        , multiplier(0)
        , shift(0)
    {
        if (value > 1)
        {
            int log2 = 0;
            while ((int64_t{1} << log2) < value)
            {
                ++log2;
            }
            shift = log2 - 1;
            multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + log2)) + value - 1) / value);
        }
    }

    __device__ __forceinline__ int divide(int number) const
    {
        return divisor == 1 ? number : static_cast<int>(__umulhi(number, multiplier) >> shift);
    }
};

} // namespace hip_trt
