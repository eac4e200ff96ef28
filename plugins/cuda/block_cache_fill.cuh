// Between steps: blocks that were missing are placed in a cache, the least recently used ones replaced.
#pragma once

#include "block_cache.cuh"

#include <limits.h>

namespace hip_trt
{

// Take the least recently used slot for a block that no slot has. Returns it, marked incomplete; -1 if all are in use, or
// if the block is there or on its way. All lanes of a warp together.
__device__ __forceinline__ int replaceOldest(BlockCache& cache, uint32_t block)
{
    Owner owner[kChoices];
#pragma unroll
    for (int choice = 0; choice < kChoices; ++choice)
    {
        owner[choice] = loadCurrent(cache.owners + cache.slotOf(block, choice));
    }
    while (true)
    {
        int longest = 0, best = 0, best_slot = 0;
        bool present = false;
#pragma unroll
        for (int choice = 0; choice < kChoices; ++choice)
        {
            const int idle = owner[choice] >> 32 == 0 ? INT_MAX : cache.age(owner[choice]);
            if (idle > longest)
            {
                longest = idle;
                best = choice;
                best_slot = cache.slotOf(block, choice);
            }
            present = present || BlockCache::holds(owner[choice], block);
        }
        const int idle = longest;
        longest = __reduce_max_sync(kFullWarp, longest);
        if (__any_sync(kFullWarp, present) || longest <= kGrace + 1)
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
                    const Owner before
                        = atomicCAS(cache.owners + slot, owner[choice], BlockCache::owner(block, cache.step, false));
                    taken = before == owner[choice];
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

// Copy a block from the pool, several kilobytes in flight at once. All lanes of a warp together.
__device__ __forceinline__ void copyBlock(const BlockCache& cache, char* target, uint32_t block)
{
    constexpr int kBatch = 8, kChunk = 16;
    const char* const source = cache.inPool(block);
    const int bytes = cache.blockBytes();
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

// Put a block into the cache, unless it is there or nothing may be replaced for it. All lanes of a warp together.
__device__ __forceinline__ void place(BlockCache& cache, uint32_t block)
{
    const int slot = replaceOldest(cache, block);
    if (slot < 0)
    {
        return;
    }
    copyBlock(cache, cache.rows + static_cast<int64_t>(slot) * cache.blockBytes(), block);
    __threadfence();
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0)
    {
        atomicExch(cache.owners + slot, BlockCache::owner(block, cache.step, true));
        cache.hints[block] = slot + 1;
    }
    cache.count(HIP_TRT_CACHE_FILL);
}

} // namespace hip_trt
