// Small matrix products of one warp, on tensor cores for 2-byte types and on plain float arithmetic for float. All
// accumulate in float, in the layout of one m16n8 tensor-core tile: with g = lane / 4 and t = lane % 4, elements 0 and 1
// are row g, columns 2t and 2t + 1; elements 2 and 3 are row g + 8, the same columns.
#pragma once

#include "paged_cache.cuh"

namespace hip_trt
{

// Sixteen rows of D elements, the left operand of a product.
template <typename T, int D>
struct LeftRows
{
    static constexpr bool kInRegisters = true;
    uint32_t fragment[D / 16][4];

    // `rows`: in shared memory, kTileStride apart.
    __device__ __forceinline__ void load(const T* rows)
    {
        const int lane = threadIdx.x % kWarpSize;
        const T* row = rows + lane % 16 * kTileStride<T, D> + lane / 16 * 8;
#pragma unroll
        for (int k = 0; k < D / 16; ++k)
        {
            loadMatrices(fragment[k], row + 16 * k);
        }
    }

    // sum[16 x 8] += left . right^T, for several sets of left rows and 8 right rows in shared memory.
    template <int Lefts>
    static __device__ __forceinline__ void addProducts(
        float (&sum)[Lefts][4], const LeftRows (&left)[Lefts], const T* right)
    {
        const int lane = threadIdx.x % kWarpSize;
        const T* row = right + lane % 8 * kTileStride<T, D> + lane / 8 * 8;
#pragma unroll
        for (int k = 0; k < D / 16; k += 2)
        {
            uint32_t b[4];
            loadMatrices(b, row + 16 * k);
#pragma unroll
            for (int i = 0; i < Lefts; ++i)
            {
                multiplyAdd<T>(sum[i], left[i].fragment[k], b[0], b[1]);
                multiplyAdd<T>(sum[i], left[i].fragment[k + 1], b[2], b[3]);
            }
        }
    }
};

__device__ __forceinline__ void addProduct(float& sum, const float4& a, const float4& b)
{
    sum = fmaf(a.x, b.x, sum);
    sum = fmaf(a.y, b.y, sum);
    sum = fmaf(a.z, b.z, sum);
    sum = fmaf(a.w, b.w, sum);
}

// float needs no fragments: every product reads the rows where they are.
template <int D>
struct LeftRows<float, D>
{
    static constexpr bool kInRegisters = false;
    const float* rows;

    __device__ __forceinline__ void load(const float* shared_rows)
    {
        rows = shared_rows;
    }

    template <int Lefts>
    static __device__ __forceinline__ void addProducts(
        float (&sum)[Lefts][4], const LeftRows (&left)[Lefts], const float* right)
    {
        constexpr int kStride = kTileStride<float, D>;
        const int lane = threadIdx.x % kWarpSize;
        const float* column = right + lane % 4 * 2 * kStride;
#pragma unroll 4
        for (int k = 0; k < D; k += 4)
        {
            const float4 b0 = *reinterpret_cast<const float4*>(column + k);
            const float4 b1 = *reinterpret_cast<const float4*>(column + kStride + k);
#pragma unroll
            for (int i = 0; i < Lefts; ++i)
            {
                const float* row = left[i].rows + lane / 4 * kStride + k;
                const float4 upper = *reinterpret_cast<const float4*>(row);
                const float4 lower = *reinterpret_cast<const float4*>(row + 8 * kStride);
                addProduct(sum[i][0], upper, b0);
                addProduct(sum[i][1], upper, b1);
                addProduct(sum[i][2], lower, b0);
                addProduct(sum[i][3], lower, b1);
            }
        }
    }
};

template <typename T>
__device__ __forceinline__ uint32_t packPair(float low, float high);

template <>
__device__ __forceinline__ uint32_t packPair<__half>(float low, float high)
{
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

template <>
__device__ __forceinline__ uint32_t packPair<__nv_bfloat16>(float low, float high)
{
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// sum[16 x D] += weight[16 x 8 Tiles] . values[8 Tiles x D]; the weights come as sums of LeftRows::addProducts, the values lie
// in shared memory.
template <typename T, int D, int Tiles>
struct WeightedValues
{
    static __device__ __forceinline__ void add(
        float (&sum)[D / 8][4], const float (&weight)[Tiles][4], const T* values)
    {
        const int lane = threadIdx.x % kWarpSize;
        const T* row = values + lane % 16 * kTileStride<T, D> + lane / 16 * 8;
#pragma unroll
        for (int k = 0; k < Tiles / 2; ++k)
        {
            const float(&low)[4] = weight[2 * k];
            const float(&high)[4] = weight[2 * k + 1];
            const uint32_t a[4] = {packPair<T>(low[0], low[1]), packPair<T>(low[2], low[3]),
                packPair<T>(high[0], high[1]), packPair<T>(high[2], high[3])};
#pragma unroll
            for (int n = 0; n < D / 8; n += 2)
            {
                uint32_t b[4];
                loadMatricesTransposed(b, row + 16 * k * kTileStride<T, D> + 8 * n);
                multiplyAdd<T>(sum[n], a, b[0], b[1]);
                multiplyAdd<T>(sum[n + 1], a, b[2], b[3]);
            }
        }
    }
};

template <int D, int Tiles>
struct WeightedValues<float, D, Tiles>
{
    static __device__ __forceinline__ void add(
        float (&sum)[D / 8][4], const float (&weight)[Tiles][4], const float* values)
    {
        const int lane = threadIdx.x % kWarpSize;
        const float* column = values + lane % 4 * 2;
#pragma unroll
        for (int k = 0; k < 8 * Tiles; ++k)
        {
            // The lane of this row group that holds column k.
            const int holder = lane / 4 * 4 + k % 8 / 2;
            const float upper = __shfl_sync(kFullWarp, weight[k / 8][k % 2], holder);
            const float lower = __shfl_sync(kFullWarp, weight[k / 8][k % 2 + 2], holder);
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
            {
                const float2 v = *reinterpret_cast<const float2*>(column + k * kTileStride<float, D> + 8 * n);
                sum[n][0] = fmaf(upper, v.x, sum[n][0]);
                sum[n][1] = fmaf(upper, v.y, sum[n][1]);
                sum[n][2] = fmaf(lower, v.x, sum[n][2]);
                sum[n][3] = fmaf(lower, v.y, sum[n][3]);
            }
        }
    }
};

} // namespace hip_trt
