// The best of many, by one thread block: exact, the lower index where scores are equal, in time that ties do not lengthen.
#pragma once

#include "decode_step.cuh"

namespace hip_trt::decode
{

// A key that orders as scores do: NaN and +inf are best, adding zero makes -0 equal to 0.
__device__ __forceinline__ uint32_t scoreKey(float score)
{
    const uint32_t bits = __float_as_uint(score == score ? score + 0.0f : INFINITY);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The best are all keys above `key`, and the first `equal` that equal it.
struct Threshold
{
    uint32_t key;
    int equal;
};

// Least and largest of a list. `room`: shared, 2 kWarps. For all threads.
__device__ inline uint2 keyRange(const uint32_t* keys, int count, uint32_t* room)
{
    uint32_t low = 0xffffffffu, high = 0;
    for (int i = threadIdx.x; i < count; i += kThreads)
    {
        low = min(low, keys[i]);
        high = max(high, keys[i]);
    }
    low = __reduce_min_sync(kAllLanes, low);
    high = __reduce_max_sync(kAllLanes, high);
    if (lane() == 0)
    {
        room[warp()] = low;
        room[kWarps + warp()] = high;
    }
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
    {
        low = min(low, room[w]);
        high = max(high, room[kWarps + w]);
    }
    return make_uint2(low, high);
}

// The threshold of the best `budget` of more than `budget` keys. Keys are counted in bins of one width between the least and
// the largest; the bin in which the budget ends is divided again, until it is taken whole or is one key.
__device__ inline Threshold findThreshold(const uint32_t* keys, int count, int budget)
{
    constexpr int kBinsLog2 = 10, kBins = 1 << kBinsLog2, kOwn = kBins / kThreads;
    __shared__ int histogram[kBins];
    __shared__ uint32_t room[2 * kWarps];
    __shared__ int warp_sums[kWarps];
    __shared__ struct
    {
        uint32_t low, high;
        int wanted;
        bool done;
    } found;
    const int top = kBins - 1 - threadIdx.x * kOwn; // this thread's bins, downward
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
    {
        histogram[top - i] = 0;
    }
    const uint2 range = keyRange(keys, count, room);
    uint32_t low = range.x, high = range.y;
    int wanted = budget;
    while (true)
    {
        const int shift = max(0, 32 - kBinsLog2 - __clz(static_cast<int>(high - low)));
        for (int i = threadIdx.x; i < count; i += kThreads)
        {
            const uint32_t key = keys[i];
            if (key >= low && key <= high)
            {
                atomicAdd(&histogram[(key - low) >> shift], 1);
            }
        }
        __syncthreads();
        int bins[kOwn], own = 0;
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
        {
            bins[i] = histogram[top - i];
            own += bins[i];
            histogram[top - i] = 0;
        }
        int above = own;
#pragma unroll
        for (int distance = 1; distance < kLanes; distance *= 2)
        {
            const int other = __shfl_up_sync(kAllLanes, above, distance);
            above += lane() >= distance ? other : 0;
        }
        if (lane() == kLanes - 1)
        {
            warp_sums[warp()] = above;
        }
        __syncthreads();
        above -= own;
#pragma unroll
        for (int w = 0; w < kWarps; ++w)
        {
            above += w < warp() ? warp_sums[w] : 0;
        }
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
        {
            if (above < wanted && above + bins[i] >= wanted) // of one bin of one thread
            {
                const uint32_t lowest = low + (static_cast<uint32_t>(top - i) << shift);
                const bool whole = above + bins[i] == wanted && lowest > 0;
                found.done = whole || shift == 0;
                found.low = whole ? lowest - 1 : lowest;
                found.high = min(high, lowest + ((1u << shift) - 1));
                found.wanted = whole ? 0 : wanted - above;
            }
            above += bins[i];
        }
        __syncthreads();
        low = found.low;
        high = found.high;
        wanted = found.wanted;
        if (found.done)
        {
            return {low, wanted};
        }
    }
}

// How an item stands to a threshold.
enum class Rank
{
    kBelow,
    kEqual,
    kAbove
};

// Call emit(index, position) for every item above, and for the first `equal` of those that are equal, positions in order of
// indices. Returns how many there are. For all threads; what emit wrote needs a barrier.
template <typename RankOf, typename Emit>
__device__ __forceinline__ int emitInOrder(int count, int equal, RankOf rankOf, Emit emit)
{
    __shared__ int warp_counts[2][kWarps];
    const int share = (count + kThreads - 1) / kThreads * kLanes; // of a warp: neighbours
    const int begin = warp() * share, end = min(count, begin + share);
    const unsigned before = (1u << lane()) - 1;
    const auto flags = [&](int base, unsigned& above, unsigned& same) {
        const Rank rank = base + lane() < end ? rankOf(base + lane()) : Rank::kBelow;
        above = __ballot_sync(kAllLanes, rank == Rank::kAbove);
        same = __ballot_sync(kAllLanes, rank == Rank::kEqual);
    };
    unsigned above, same;
    int total_above = 0, total_same = 0;
    for (int base = begin; base < end; base += kLanes)
    {
        flags(base, above, same);
        total_above += __popc(above);
        total_same += __popc(same);
    }
    if (lane() == 0)
    {
        warp_counts[0][warp()] = total_above;
        warp_counts[1][warp()] = total_same;
    }
    __syncthreads();
    int first_above = 0, first_same = 0;
    total_above = total_same = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
    {
        first_above += w < warp() ? warp_counts[0][w] : 0;
        first_same += w < warp() ? warp_counts[1][w] : 0;
        total_above += warp_counts[0][w];
        total_same += warp_counts[1][w];
    }
    for (int base = begin; base < end; base += kLanes)
    {
        flags(base, above, same);
        const int rank_above = first_above + __popc(above & before), rank_same = first_same + __popc(same & before);
        if ((above >> lane() & 1) || ((same >> lane() & 1) && rank_same < equal))
        {
            emit(base + lane(), rank_above + min(rank_same, equal));
        }
        first_above += __popc(above);
        first_same += __popc(same);
    }
    return total_above + min(total_same, equal);
}

// Call emit(index, position) for the best `budget` of `count` keys, or for all where there are no more. Returns how many.
template <typename Emit>
__device__ __forceinline__ int chooseBest(const uint32_t* keys, int count, int budget, Emit emit)
{
    if (count <= budget)
    {
        for (int i = threadIdx.x; i < count; i += kThreads)
        {
            emit(i, i);
        }
        return count;
    }
    const Threshold threshold = findThreshold(keys, count, budget);
    return emitInOrder(
        count, threshold.equal,
        [&](int i) {
            return keys[i] > threshold.key ? Rank::kAbove : keys[i] == threshold.key ? Rank::kEqual : Rank::kBelow;
        },
        emit);
}

} // namespace hip_trt::decode
