// float16: 5 bits of exponent, 10 of fraction.
#pragma once

#include <cmath>
#include <cstdint>

struct __half
{
    uint16_t bits;
};

struct __half2
{
    __half x, y;
};

inline float __half2float(__half value)
{
    const int exponent = value.bits >> 10 & 31;
    const int fraction = value.bits & 1023;
    float magnitude;
    if (exponent == 31)
    {
        magnitude = fraction == 0 ? INFINITY : NAN;
    }
    else
    {
        magnitude = std::ldexp(static_cast<float>(exponent == 0 ? fraction : fraction | 1024), (exponent ? exponent : 1) - 25);
    }
    return value.bits >> 15 ? -magnitude : magnitude;
}

// Rounds to nearest, ties to even.
inline __half __float2half_rn(float value)
{
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    if (value != value)
    {
        return {0x7fff};
    }
    const float magnitude = std::fabs(value);
    if (magnitude >= 65520.0f)
    {
        return {static_cast<uint16_t>(sign | 0x7c00)};
    }
    // The spacing of float16 at this magnitude; at least that of the smallest numbers.
    const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
    const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    // With 1024 steps or more the leading bit adds 1 to the exponent's field.
    return {static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + steps))};
}

inline __half2 __floats2half2_rn(float x, float y)
{
    return {__float2half_rn(x), __float2half_rn(y)};
}
