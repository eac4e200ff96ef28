// What a decode call attends to: sink, chosen blocks and window, as tiles of 16 tokens; and how a thread block of the
// attention finds the chosen blocks. Those of one mask head do it each by themselves.
#pragma once

#include "decode_best.cuh"
#include "decode_elements.cuh"

namespace hip_trt::decode
{

constexpr int kMaxHeads = 16; // query heads per mask

struct AttendPlace
{
    int b, mask, kv_head;
    int part;
    int group; // of rows
    int64_t pair;

    // One thread block of the mask head writes what all know.
    __device__ __forceinline__ bool writes() const
    {
        return part == 0 && group == 0;
    }
};

// The tiles of 16 tokens that are attended, in order of tokens. A tile lies in one block.
struct AttendedTiles
{
    const int* chosen; // in shared memory, ascending
    int chosen_count;
    int first, last; // candidates
    int end;         // after the last token
    int block_log2;

    __device__ __forceinline__ int tilesLog2() const // of a block
    {
        return block_log2 - 4;
    }

    __device__ __forceinline__ int count() const
    {
        const int before_window = (first + chosen_count) << tilesLog2();
        return before_window + (end - (last << block_log2) + kTileRows - 1) / kTileRows;
    }

    __device__ __forceinline__ bool isChosen(int tile) const
    {
        const int index = tile >> tilesLog2();
        return index >= first && index < first + chosen_count;
    }

    // The first token of a tile.
    __device__ __forceinline__ int token(int tile) const
    {
        const int index = tile >> tilesLog2(), window = first + chosen_count;
        const int block = index < first ? index : index < window ? chosen[index - first] : index - window + last;
        return (block << block_log2) + (tile - (index << tilesLog2())) * kTileRows;
    }
};

__device__ __forceinline__ float reduceMax(float value)
{
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
    {
        value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, distance));
    }
    return value;
}

__device__ __forceinline__ float reduceSum(float value)
{
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
    {
        value += __shfl_xor_sync(kAllLanes, value, distance);
    }
    return value;
}

// log2 of the sum of 2^value over a list, without values of NaN or +inf. By one warp.
__device__ inline float logTotal(const float* values, int count)
{
    float largest = -INFINITY;
    for (int i = lane(); i < count; i += kLanes)
    {
        largest = fmaxf(largest, values[i] < INFINITY ? values[i] : -INFINITY);
    }
    largest = reduceMax(largest);
    const float from = largest == -INFINITY ? 0.0f : largest;
    float total = 0;
    for (int i = lane(); i < count; i += kLanes)
    {
        total += values[i] < INFINITY ? exp2Fast(values[i] - from) : 0.0f;
    }
    return from + log2f(reduceSum(total));
}

// Shared memory for choosing by codes: keys, kept blocks, and, if there is room, the second stage's scores.
inline __host__ __device__ int choosingBytes(const Step& step)
{
    return step.searched * static_cast<int>(sizeof(uint32_t)) * (step.stage_log_sums ? 2 + step.heads_per_mask : 2);
}

// The K best of the blocks that the second stage scored. `room`: shared, choosingBytes.
__device__ inline int chooseByCodes(
    const Step& step, const AttendPlace& place, int count, uint32_t* room, int* chosen)
{
    __shared__ float totals[kMaxHeads];
    const int heads = step.heads_per_mask;
    const float* log_sums = step.log_sums + place.pair * heads * step.searched;
    uint32_t* const keys = room;
    int* const kept = reinterpret_cast<int*>(room + step.searched);
    if (step.stage_log_sums)
    {
        float* const here = reinterpret_cast<float*>(room + 2 * step.searched);
#pragma unroll 8
        for (int i = threadIdx.x; i < heads * step.searched; i += kThreads)
        {
            here[i] = log_sums[i];
        }
        log_sums = here;
    }
    for (int i = threadIdx.x; i < count; i += kThreads)
    {
        kept[i] = step.kept[place.pair * step.searched + i];
    }
    __syncthreads();
    if (count > step.budget)
    {
        for (int head = warp(); head < heads; head += kWarps)
        {
            const float total = logTotal(log_sums + head * step.searched, count);
            if (lane() == 0)
            {
                totals[head] = total;
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += kThreads)
        {
            float best = -INFINITY;
            for (int head = 0; head < heads; ++head)
            {
                const float score = log_sums[head * step.searched + i] - totals[head];
                best = fmaxf(best, score == score ? score : INFINITY);
            }
            keys[i] = scoreKey(best);
        }
    }
    __syncthreads();
    return chooseBest(keys, count, step.budget, [&](int i, int position) { chosen[position] = kept[i]; });
}

// What past_blocks name of the candidates, and the two newest. `bits`: shared, one a candidate.
__device__ inline int unitePast(
    const Step& step, const AttendPlace& place, const Sequence& sequence, uint32_t* bits, int* chosen)
{
    constexpr int kNewest = 2;
    const int candidates = sequence.candidates();
    for (int i = threadIdx.x; i < (candidates + 31) / 32; i += kThreads)
    {
        bits[i] = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < step.budget + kNewest; i += kThreads)
    {
        const int block
            = i < step.budget ? step.past_blocks[place.pair * step.budget + i] : sequence.last - 1 - (i - step.budget);
        if (block >= sequence.first && block < sequence.last)
        {
            const int index = block - sequence.first;
            atomicOr(bits + index / 32, 1u << index % 32);
        }
    }
    __syncthreads();
    return emitInOrder(
        candidates, 0, [&](int i) { return bits[i / 32] >> i % 32 & 1 ? Rank::kAbove : Rank::kBelow; },
        [&](int i, int position) { chosen[position] = sequence.first + i; });
}

// The blocks that a sequence attends to, for one mask head; also writes present_blocks. `chosen`: shared, K + 2; `room`: as
// above. Ends with a barrier.
__device__ inline AttendedTiles findAttended(
    const Step& step, const AttendPlace& place, const Sequence& sequence, bool searches, uint32_t* room, int* chosen)
{
    AttendedTiles tiles{chosen, 0, sequence.first, sequence.last, sequence.end(), step.block_log2};
    int32_t* const present = step.present_blocks + place.pair * step.budget;
    const int32_t* const past = step.past_blocks + place.pair * step.budget;
    const bool all = sequence.attendsAll(step);
    if (all)
    {
        tiles.first = tiles.last; // no window: one run of blocks
    }
    else if (searches)
    {
        tiles.chosen_count = chooseByCodes(step, place, min(sequence.candidates(), step.searched), room, chosen);
    }
    else
    {
        tiles.chosen_count = unitePast(step, place, sequence, room, chosen);
    }
    __syncthreads();
    if (place.writes() && (all || searches || present != past))
    {
        for (int i = threadIdx.x; i < step.budget; i += kThreads)
        {
            present[i] = all ? -1 : searches ? chosen[i] : past[i];
        }
    }
    return tiles;
}

} // namespace hip_trt::decode
