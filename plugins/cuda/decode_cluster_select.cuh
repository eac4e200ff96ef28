// The best of many candidates by their scores, in one thread block, with exact ties: the lower index wins. The counterpart
// of keep_best in hip_trt/reference/tree.py for candidates whose scores lie in shared memory.
#pragma once

#include "block_select.cuh"

namespace hip_trt
{

// Comparisons (candidates asked about times candidates) up to which counting the better ones of each is faster than
// finding the threshold.
constexpr int kMaxComparisons = 32768;

// How many lanes of a warp can share each of `count` questions, as a power of two.
template <int Threads>
__device__ __forceinline__ int lanesPerItemLog2(int count)
{
    const int count_log2 = count > 1 ? 32 - __clz(count - 1) : 0;
    return min(5, max(0, 31 - __clz(Threads) - count_log2));
}

__device__ __forceinline__ int sumOverLanes(int value, int lanes_log2)
{
#pragma unroll 1
    for (int i = 0; i < lanes_log2; ++i)
    {
        value += __shfl_xor_sync(kFullWarp, value, 1 << i);
    }
    return value;
}

__device__ __forceinline__ void setBit(uint32_t* bits, int index)
{
    atomicOr(bits + index / 32, 1u << (index % 32));
}

__device__ __forceinline__ bool getBit(const uint32_t* bits, int index)
{
    return bits[index / 32] >> (index % 32) & 1;
}

// Bits set before `index`.
__device__ __forceinline__ int bitsBefore(const uint32_t* bits, int index)
{
    int sum = __popc(bits[index / 32] & ((1u << (index % 32)) - 1));
#pragma unroll 1
    for (int i = 0; i < index / 32; ++i)
    {
        sum += __popc(bits[i]);
    }
    return sum;
}

// Candidates of which this thread block asks whether they are among the best: first, first + step, ...
struct Asked
{
    int first;
    int step_log2;
    int count;

    __device__ __forceinline__ int operator[](int index) const
    {
        return first + (index << step_log2);
    }
};

// Count for each asked candidate how many are better, by comparing with all.
template <int Threads>
__device__ void markByCounting(const uint32_t* keys, int count, const Asked& asked, int budget, uint32_t* marks)
{
    const int lanes_log2 = lanesPerItemLog2<Threads>(asked.count);
    const int lane = threadIdx.x & ((1 << lanes_log2) - 1);
    const int quads = count / 4;
#pragma unroll 1
    for (int base = 0; base < asked.count; base += Threads >> lanes_log2)
    {
        const int index = base + (static_cast<int>(threadIdx.x) >> lanes_log2);
        const bool valid = index < asked.count;
        const int candidate = asked[valid ? index : 0];
        const uint32_t key = keys[candidate];
        int better = 0;
#pragma unroll 4
        for (int i = lane; i < quads; i += 1 << lanes_log2)
        {
            const uint4 other = reinterpret_cast<const uint4*>(keys)[i];
            const uint32_t threshold = 4 * i + 3 < candidate ? key - 1 : key; // an equal one before is better
            better += (other.x > threshold) + (other.y > threshold) + (other.z > threshold) + (other.w > threshold);
        }
        if (lane == 0)
        {
#pragma unroll 1
            for (int i = 4 * quads; i < count; ++i)
            {
                better += keys[i] > key;
            }
#pragma unroll 1
            for (int i = candidate & ~3; i < candidate; ++i)
            {
                better += keys[i] == key;
            }
        }
        better = sumOverLanes(better, lanes_log2);
        if (valid && lane == 0 && better < budget)
        {
            setBit(marks, index);
        }
    }
}

// Find the worst key that is among the best, then compare with it.
template <int Threads>
__device__ void markByThreshold(const uint32_t* keys, int count, const Asked& asked, int budget, uint32_t* marks)
{
    const Threshold threshold = count > budget ? findThreshold(keys, count, budget) : Threshold{0, 0};
#pragma unroll 1
    for (int index = threadIdx.x; index < asked.count; index += Threads)
    {
        const int candidate = asked[index];
        const uint32_t key = keys[candidate];
        bool best = key > threshold.key;
        if (key == threshold.key)
        {
            int equal_before = 0;
#pragma unroll 1
            for (int i = 0; i < candidate; ++i)
            {
                equal_before += keys[i] == key;
            }
            best = equal_before < threshold.equal;
        }
        if (best)
        {
            setBit(marks, index);
        }
    }
}

// Set bit i of `marks` (all clear before) if candidate asked[i] is among the `budget` best of all. Keys are 1 or more and
// 16-byte aligned. Ends without a barrier.
template <int Threads>
__device__ void markBest(const uint32_t* keys, int count, const Asked& asked, int budget, uint32_t* marks)
{
    if (asked.count * count <= kMaxComparisons)
    {
        markByCounting<Threads>(keys, count, asked, budget, marks);
    }
    else
    {
        markByThreshold<Threads>(keys, count, asked, budget, marks);
    }
}

} // namespace hip_trt
