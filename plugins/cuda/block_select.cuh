// Exact selection by one thread block: the best K of a list of scores, and lists compacted in order.
#pragma once

#include "paged_cache.cuh"

#include <limits.h>

namespace hip_trt
{

constexpr int kMaxSelectWarps = 8;

// A key that orders as the scores do. Adding zero makes -0 equal to 0.
__device__ inline uint32_t orderedKey(float score)
{
    const uint32_t bits = __float_as_uint(score + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// How many earlier items of the list have a flag, item i of a round being thread i's. Calls see the list in order, one
// round of blockDim.x items each.
struct RunningRank
{
    int before = 0; // flags in earlier rounds

    // `warp_counts`: shared, kMaxSelectWarps entries, used by nothing else until the next barrier but one.
    __device__ int next(bool flag, int* warp_counts)
    {
        const int lane = threadIdx.x % kWarpSize;
        const int warp = threadIdx.x / kWarpSize;
        const unsigned flags = __ballot_sync(kFullWarp, flag);
        if (lane == 0)
        {
            warp_counts[warp] = __popc(flags);
        }
        __syncthreads();
        int rank = before + __popc(flags & ((1u << lane) - 1));
        for (int w = 0; w < static_cast<int>(blockDim.x) / kWarpSize; ++w)
        {
            rank += w < warp ? warp_counts[w] : 0;
            before += warp_counts[w];
        }
        __syncthreads();
        return rank;
    }
};

// The best `budget` of more than `budget` keys are those above a key, and `equal` of those that equal it: radix selection
// from the highest byte down, which ends as soon as a bin is chosen whole. All threads get the result.
struct Threshold
{
    uint32_t key;
    int equal;
};

__device__ inline Threshold findThreshold(const uint32_t* keys, int count, int budget)
{
    constexpr int kBins = 256;
    constexpr int kBinsPerLane = kBins / kWarpSize;
    __shared__ int histogram[kBins];
    __shared__ Threshold found;
    Threshold threshold{0, budget};
    for (int shift = 24; shift >= 0 && threshold.equal > 0; shift -= 8)
    {
        for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x)
        {
            histogram[bin] = 0;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += blockDim.x)
        {
            // Keys that agree with the threshold's higher bytes.
            if (shift == 24 || (keys[i] ^ threshold.key) >> (shift + 8) == 0)
            {
                atomicAdd(&histogram[keys[i] >> shift & (kBins - 1)], 1);
            }
        }
        __syncthreads();
        if (threadIdx.x < kWarpSize)
        {
            // Lane 0 holds the highest bins; find the bin in which the count from the top reaches what is wanted.
            const int lane = threadIdx.x;
            const int top = kBins - 1 - lane * kBinsPerLane;
            int sum = 0;
            for (int i = 0; i < kBinsPerLane; ++i)
            {
                sum += histogram[top - i];
            }
            int above = sum;
            for (int distance = 1; distance < kWarpSize; distance *= 2)
            {
                const int other = __shfl_up_sync(kFullWarp, above, distance);
                above += lane >= distance ? other : 0;
            }
            above -= sum;
            if (above < threshold.equal && above + sum >= threshold.equal)
            {
                int bin = top;
                while (above + histogram[bin] < threshold.equal)
                {
                    above += histogram[bin--];
                }
                const uint32_t lowest = threshold.key | static_cast<uint32_t>(bin) << shift;
                const int rest = threshold.equal - above;
                const bool whole = histogram[bin] == rest && lowest > 0;
                found = {whole ? lowest - 1 : lowest, whole ? 0 : rest};
            }
        }
        __syncthreads();
        threshold = found;
    }
    return threshold;
}

// Call emit(index, position) for the best `budget` of `count` keys, the lower index where keys are equal; positions
// number the chosen indices in ascending order. Returns how many there are. All threads must call; a barrier is needed
// before what emit wrote is read.
template <typename Emit>
__device__ int selectBest(const uint32_t* keys, int count, int budget, Emit emit)
{
    __shared__ int warp_counts[kMaxSelectWarps];
    if (count <= budget)
    {
        for (int i = threadIdx.x; i < count; i += blockDim.x)
        {
            emit(i, i);
        }
        return count;
    }
    const Threshold threshold = findThreshold(keys, count, budget);
    RunningRank above, equal;
    for (int start = 0; start < count; start += blockDim.x)
    {
        const int i = start + threadIdx.x;
        const bool is_above = i < count && keys[i] > threshold.key;
        const bool is_equal = i < count && keys[i] == threshold.key;
        const int rank_above = above.next(is_above, warp_counts);
        const int rank_equal = equal.next(is_equal, warp_counts);
        if (is_above || (is_equal && rank_equal < threshold.equal))
        {
            emit(i, rank_above + min(rank_equal, threshold.equal));
        }
    }
    return budget;
}

// Sort `count` integers in ascending order; there must be room for the next power of two. Ends with a barrier.
__device__ inline void sortAscending(int* items, int count)
{
    int padded = 1;
    while (padded < count)
    {
        padded *= 2;
    }
    for (int i = count + threadIdx.x; i < padded; i += blockDim.x)
    {
        items[i] = INT_MAX;
    }
    __syncthreads();
    for (int size = 2; size <= padded; size *= 2)
    {
        for (int distance = size / 2; distance > 0; distance /= 2)
        {
            for (int i = threadIdx.x; i < padded; i += blockDim.x)
            {
                const int other = i ^ distance;
                const bool ascending = (i & size) == 0;
                if (other > i && (items[i] > items[other]) == ascending)
                {
                    const int item = items[i];
                    items[i] = items[other];
                    items[other] = item;
                }
            }
            __syncthreads();
        }
    }
}

} // namespace hip_trt
