// Between steps: blocks that were missing are placed in a cache, the least recently used ones replaced.
//
// A block may be put into any slot of kChoices sets of kWays, which hashes of it name: few enough to look at all, and enough
// that the oldest of them is old. With one set, those that happen to be in demand would be full long before the cache is.
#pragma once

#include "block_cache.cuh"
#include "offload_fill.cuh"

#include <limits.h>

namespace hip_trt
{

constexpr int kWays = HIP_TRT_CACHE_WAYS;
static_assert(kWays == kWarpSize, "a lane looks at a way of each set");

constexpr int kChoices = 4; // sets

constexpr int kClaimed = -1; // a block's entry in the table while a warp places it

// The slot of this lane in one of the sets of a block.
__device__ __forceinline__ int slotOf(const BlockCache& cache, uint32_t block, int choice)
{
    constexpr uint32_t kFactors[kChoices] = {0x9e3779b1, 0x85ebca77, 0xc2b2ae3d, 0x27d4eb2f};
    const uint32_t sets = static_cast<uint32_t>(cache.blocks) / kWays;
    return static_cast<int>(__umulhi(block * kFactors[choice], sets)) * kWays + threadIdx.x % kWarpSize;
}

// Take the least recently used slot for a block. Returns it, or -1 if all that it may be in are in use by this step. All lanes
// of a warp together.
__device__ __forceinline__ int replaceOldest(BlockCache& cache, uint32_t block)
{
    Word* const owners = reinterpret_cast<Word*>(cache.owners);
    Word owner[kChoices];
#pragma unroll
    for (int choice = 0; choice < kChoices; ++choice)
    {
        owner[choice] = loadCurrent(owners + slotOf(cache, block, choice));
    }
    while (true)
    {
        int longest = 0, best = 0, best_slot = 0; // longest: steps since the last use
#pragma unroll
        for (int choice = 0; choice < kChoices; ++choice)
        {
            const bool empty = owner[choice] >> 32 == 0;
            const uint32_t steps = cache.step - static_cast<uint32_t>(owner[choice]);
            const int idle = empty ? INT_MAX : static_cast<int>(steps & (INT_MAX >> 1));
            if (idle > longest)
            {
                longest = idle;
                best = choice;
                best_slot = slotOf(cache, block, choice);
            }
        }
        const int idle = longest;
        longest = __reduce_max_sync(kFullWarp, longest);
        if (longest == 0)
        {
            return -1;
        }
        // Warps that look for room at once begin at different slots.
        const unsigned oldest = __ballot_sync(kFullWarp, idle == longest);
        const int taking = (__ffs(__funnelshift_r(oldest, oldest, block)) - 1 + block) % kWarpSize;
        const int slot = __shfl_sync(kFullWarp, best_slot, taking);
        bool taken = false;
        if (threadIdx.x % kWarpSize == taking)
        {
#pragma unroll
            for (int choice = 0; choice < kChoices; ++choice) // not an index: that would put the array in memory
            {
                if (choice == best)
                {
                    const Word before = atomicCAS(owners + slot, owner[choice], slotOwner(block, cache.step));
                    taken = before == owner[choice];
                    if (taken && longest != INT_MAX)
                    {
                        cache.slots[static_cast<uint32_t>(before >> 32) - 1] = 0;
                    }
                    owner[choice] = before;
                }
            }
        }
        if (__any_sync(kFullWarp, taken))
        {
            if (longest != INT_MAX)
            {
                cache.count(HIP_TRT_CACHE_EVICTION);
            }
            return slot;
        }
    }
}

// Copy so many bytes, several kilobytes in flight at once. All lanes of a warp together.
__device__ __forceinline__ void copyBlock(char* target, const char* source, int bytes)
{
    constexpr int kBatch = 8, kChunk = 16;
#pragma unroll 1
    for (int base = threadIdx.x % kWarpSize * kChunk; base < bytes; base += kBatch * kWarpSize * kChunk)
    {
        uint4 chunk[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
        {
            const int at = base + i * kWarpSize * kChunk;
            if (at < bytes)
            {
                chunk[i] = loadCurrent(source + at);
            }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
        {
            const int at = base + i * kWarpSize * kChunk;
            if (at < bytes)
            {
                *reinterpret_cast<uint4*>(target + at) = chunk[i];
            }
        }
    }
}

// Put a block into the cache, from where it landed or else (negative) from the pool, unless it is there or nothing may be
// replaced for it. All lanes of a warp together.
__device__ __forceinline__ void place(BlockCache& cache, uint32_t block, int landing)
{
    int before = 0;
    if (threadIdx.x % kWarpSize == 0)
    {
        before = atomicCAS(cache.slots + block, 0, kClaimed); // noted by several warps, it is placed by one
    }
    if (__shfl_sync(kFullWarp, before, 0) != 0)
    {
        return;
    }
    const int slot = replaceOldest(cache, block);
    if (slot >= 0)
    {
        copyBlock(cache.inCache(slot), landing < 0 ? cache.inPool(block) : cache.inLanding(landing), cache.blockBytes());
        cache.count(HIP_TRT_CACHE_FILL);
        cache.count(HIP_TRT_CACHE_REREAD, landing < 0);
    }
    if (threadIdx.x % kWarpSize == 0)
    {
        cache.slots[block] = slot + 1;
    }
}

// Fill the caches of a layer: a warp per missed block. Then the lists are emptied, what landed is given back, and the step is
// counted. For all threads of thread block `part` of `parts`; `caches`: room for two in shared memory.
__device__ __forceinline__ void fillCaches(const LayerCaches& work, BlockCache* caches, int part, int parts)
{
    openCaches(caches, work, 0, kWarpSize);
    __syncthreads();
    const int warps = parts * BlockCache::kWarps, warp = threadIdx.x / kWarpSize * parts + part;
#pragma unroll 1
    for (int which = 0; which < 2; ++which)
    {
        BlockCache& cache = caches[which];
        const int count = cache.blocks == 0 ? 0 : min(cache.missed[0], cache.blocks);
        // Where there are few, values are for other warps than keys.
#pragma unroll 1
        for (int i = which == 0 ? warp : warps - 1 - warp; i < count; i += warps)
        {
            const int2 missed = reinterpret_cast<const int2*>(cache.missed + HIP_TRT_CACHE_MISSED_HEADER)[i];
            place(cache, static_cast<uint32_t>(missed.x), missed.y);
        }
    }
    __syncthreads();
    reportEvents(caches, work.counters);
    Word* const counters = reinterpret_cast<Word*>(work.counters);
    __threadfence(); // what was read here may be written anew by who finds the tickets given back
    if (threadIdx.x == 0 && atomicAdd(counters + 1, static_cast<Word>(1)) == parts - 1)
    {
        // All thread blocks have read the lists, what landed, and the step.
        dropMissed(work.keys, work.landing);
        dropMissed(work.values, work.landing);
        counters[1] = 0;
        ++counters[0];
    }
}

} // namespace hip_trt
