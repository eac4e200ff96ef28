// Elements of T as floats: 16 bytes of them at once, and back.
#pragma once

#include "decode_step.cuh"

#include <string.h>

namespace hip_trt::decode
{

template <typename T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

template <typename T>
__device__ __forceinline__ float2 unpackPair(uint32_t pair);

template <>
__device__ __forceinline__ float2 unpackPair<__half>(uint32_t pair)
{
    __half2 halves;
    memcpy(&halves, &pair, sizeof(pair));
    return make_float2(__half2float(halves.x), __half2float(halves.y));
}

template <>
__device__ __forceinline__ float2 unpackPair<__nv_bfloat16>(uint32_t pair)
{
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

template <typename T>
__device__ __forceinline__ void unpack(float (&elements)[kChunk<T>], const uint4& chunk)
{
    if constexpr (sizeof(T) == 4)
    {
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            elements[i] = __uint_as_float((&chunk.x)[i]);
        }
    }
    else
    {
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            const float2 pair = unpackPair<T>((&chunk.x)[i]);
            elements[2 * i] = pair.x;
            elements[2 * i + 1] = pair.y;
        }
    }
}

template <typename T>
__device__ __forceinline__ float toFloat(const T* element)
{
    if constexpr (sizeof(T) == 4)
    {
        return *element;
    }
    else
    {
        return unpackPair<T>(*reinterpret_cast<const uint16_t*>(element)).x;
    }
}

template <typename Pair>
__device__ __forceinline__ uint32_t bitsOf(const Pair& pair)
{
    uint32_t bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}

template <typename T>
__device__ __forceinline__ uint32_t packPair(float low, float high);

template <>
__device__ __forceinline__ uint32_t packPair<__half>(float low, float high)
{
    return bitsOf(__floats2half2_rn(low, high));
}

template <>
__device__ __forceinline__ uint32_t packPair<__nv_bfloat16>(float low, float high)
{
    return bitsOf(__floats2bfloat162_rn(low, high));
}

// Four elements that follow one another.
template <typename T>
__device__ __forceinline__ void storeFour(T* to, const float4& four)
{
    if constexpr (sizeof(T) == 4)
    {
        *reinterpret_cast<float4*>(to) = four;
    }
    else
    {
        *reinterpret_cast<uint2*>(to) = make_uint2(packPair<T>(four.x, four.y), packPair<T>(four.z, four.w));
    }
}

} // namespace hip_trt::decode
