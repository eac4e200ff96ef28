// The best of many candidates by their scores, in one thread block, with exact ties: the lower index wins. The counterpart
// of keep_best in hip_trt/reference/tree.py for candidates whose scores lie in shared memory.
#pragma once

#include "block_select.cuh"
#include "decode_cluster_ptx.cuh"

namespace hip_trt
{

// Comparisons (candidates asked about times candidates) up to which counting the better ones of each is faster than
// finding the threshold.
constexpr int kMaxComparisons = 32768;

// ---- Sets of small numbers, as bits in shared memory: whole multiples of 4 words ----

constexpr int kSetAlignment = 128; // numbers of 4 words

__device__ __forceinline__ void setBit(uint32_t* bits, int index)
{
    atomicOr(bits + index / 32, 1u << (index % 32));
}

__device__ __forceinline__ bool getBit(const uint32_t* bits, int index)
{
    return bits[index / 32] >> (index % 32) & 1;
}

// The lowest `count` bits of a word; all if 32 or more.
__device__ __forceinline__ uint32_t lowBits(int count)
{
    return __funnelshift_lc(0xffffffffu, 0u, max(count, 0));
}

// Members below `index`.
__device__ __forceinline__ int membersBelow(const uint32_t* bits, int index)
{
    int members = 0;
#pragma unroll 1
    for (int base = 0; base < index; base += kSetAlignment)
    {
        const uint4 words = *reinterpret_cast<const uint4*>(bits + base / 32);
        const int rest = index - base;
        members += __popc(words.x & lowBits(rest)) + __popc(words.y & lowBits(rest - 32))
            + __popc(words.z & lowBits(rest - 64)) + __popc(words.w & lowBits(rest - 96));
    }
    return members;
}

// The member that has `rank` members below it; there must be one.
__device__ __forceinline__ int memberAt(const uint32_t* bits, int rank)
{
    int word = 0;
#pragma unroll 1
    for (int members; rank >= (members = __popc(bits[word])); ++word)
    {
        rank -= members;
    }
    uint32_t left = bits[word];
    int member = word * 32;
#pragma unroll
    for (int width = 16; width > 0; width /= 2)
    {
        const int members = __popc(left & ((1u << width) - 1));
        if (rank >= members)
        {
            rank -= members;
            left >>= width;
            member += width;
        }
    }
    return member;
}

// ---- Selection ----

// How many lanes of a warp can share each of `count` questions, as a power of two.
__device__ __forceinline__ int lanesPerItemLog2(int count)
{
    const int count_log2 = count > 1 ? 32 - __clz(count - 1) : 0;
    return min(5, max(0, 31 - __clz(kDecodeThreads) - count_log2));
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
//
// Not inlined: the comparisons need all predicate registers, of which the kernel keeps most for itself.
inline __device__ __noinline__ void markByCounting(int keys_at, int count, Asked asked, int budget, int marks_at)
{
    const uint32_t* const keys = reinterpret_cast<const uint32_t*>(dynamicShared() + keys_at);
    uint32_t* const marks = reinterpret_cast<uint32_t*>(dynamicShared() + marks_at);
    const int lanes_log2 = lanesPerItemLog2(asked.count);
    const int lanes = 1 << lanes_log2;
    const int lane = threadIdx.x & (lanes - 1);
    const uint4* const quads = reinterpret_cast<const uint4*>(keys);
    const int quad_count = (count + 3) / 4;
#pragma unroll 1
    for (int base = 0; base < asked.count; base += kDecodeThreads >> lanes_log2)
    {
        const int index = base + (static_cast<int>(threadIdx.x) >> lanes_log2);
        const bool valid = index < asked.count;
        const int candidate = asked[valid ? index : 0];
        const int place = candidate % 4;
        const uint4 own = quads[candidate / 4];
        const uint32_t key = place == 0 ? own.x : place == 1 ? own.y : place == 2 ? own.z : own.w;
        // An equal one before is better: in other quads by a lower threshold, in its own here.
        int better[4] = {0, 0, 0, 0};
        if (lane == 0)
        {
            better[0] = (place > 0 && own.x == key) + (place > 1 && own.y == key) + (place > 2 && own.z == key);
        }
        const auto compare = [&](int i) {
            const uint4 other = quads[i];
            const uint32_t threshold = i < candidate / 4 ? key - 1 : key;
            countGreater(better[0], other.x, threshold);
            countGreater(better[1], other.y, threshold);
            countGreater(better[2], other.z, threshold);
            countGreater(better[3], other.w, threshold);
        };
        int i = lane;
#pragma unroll 1
        for (; i + 3 * lanes < quad_count; i += 4 * lanes)
        {
            compare(i);
            compare(i + lanes);
            compare(i + 2 * lanes);
            compare(i + 3 * lanes);
        }
#pragma unroll 1
        for (; i < quad_count; i += lanes)
        {
            compare(i);
        }
        const int total = sumOverLanes(better[0] + better[1] + better[2] + better[3], lanes_log2);
        if (valid && lane == 0 && total < budget)
        {
            setBit(marks, index);
        }
    }
}

// Find the worst key that is among the best, then compare with it.
inline __device__ __noinline__ void markByThreshold(int keys_at, int count, Asked asked, int budget, int marks_at)
{
    const uint32_t* const keys = reinterpret_cast<const uint32_t*>(dynamicShared() + keys_at);
    uint32_t* const marks = reinterpret_cast<uint32_t*>(dynamicShared() + marks_at);
    const Threshold threshold = count > budget ? findThreshold(keys, count, budget) : Threshold{0, 0};
#pragma unroll 1
    for (int index = threadIdx.x; index < asked.count; index += kDecodeThreads)
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

// Put i into the marks (empty before) if candidate asked[i] is among the `budget` best of all. Keys and marks are given by
// their offset in shared memory; keys are 1 or more, 16-byte aligned, and padded with zeros to a multiple of 4. Ends
// without a barrier.
__device__ __forceinline__ void markBest(int keys_at, int count, const Asked& asked, int budget, int marks_at)
{
    if (asked.count * count <= kMaxComparisons)
    {
        markByCounting(keys_at, count, asked, budget, marks_at);
    }
    else
    {
        markByThreshold(keys_at, count, asked, budget, marks_at);
    }
}

} // namespace hip_trt
