// Blocks of a pool in host memory, copied to GPU memory: looked up by the kernels of a decode step, filled between steps.
//
// A table has an entry for every block of the pool: the slot that holds a copy, if one does. So all lanes of a warp look
// up a block each in one load. A block that is missing is read where it is, over the bus, left in the landing area by the
// warp that read it, and noted; once the kernel has ended, what was noted is placed (block_cache_fill.cuh), off the
// critical path. Until then kernels change neither the table nor what slots hold; all that they write down is when a slot
// was used.
//
// The landing area is a ring. A ticket is a place in it, counted from the beginning: taken by the warp that misses a
// block, given back once that has been placed. Where the ring is full, a block does not land, and is read over the bus
// again.
//
// Kernels of one layer must be ordered, as they are in one stream: what one of them reads, another may replace.
#pragma once

#include "layer_caches.cuh"
#include "paged_cache.cuh"

#include <new>

namespace hip_trt
{

using Word = unsigned long long; // the type that atomic functions take

// What a slot holds, one word: block + 1 (high half; 0: empty) and the step of its last use.
__device__ __forceinline__ Word slotOwner(uint32_t block, uint32_t step)
{
    return static_cast<Word>(block + 1) << 32 | step;
}

// A pool and its cache.
struct CacheView
{
    const char* pool; // host memory
    char* rows;
    uint64_t* owners;
    int32_t* slots;  // by block: 1 + slot
    int32_t* missed; // see hip_offload.h
    char* landing_rows;
    uint32_t* tickets;
    int32_t landing_blocks;
    int32_t blocks; // slots; 0: no cache
    uint32_t step;
    int block_log2; // rows of a block
    int row_bytes;

    __device__ __forceinline__ CacheView(const LayerCaches& caches, bool is_key)
        : CacheView(caches, is_key ? caches.keys : caches.values, is_key ? caches.key_pool : caches.value_pool)
    {
    }

    __device__ __forceinline__ CacheView(const LayerCaches& caches, const HipTrtBlockCache& cache, const void* pool)
        : pool(static_cast<const char*>(pool))
        , rows(static_cast<char*>(cache.rows))
        , owners(cache.owners)
        , slots(cache.slots)
        , missed(cache.missed)
        , landing_rows(static_cast<char*>(caches.landing.rows))
        , tickets(caches.landing.tickets)
        , landing_blocks(caches.landing.blocks)
        , blocks(cache.blocks)
        , step(static_cast<uint32_t>(*caches.counters)) // steps that have ended
        , block_log2(caches.block_k_log2)
        , row_bytes(caches.row_bytes)
    {
    }

    __device__ __forceinline__ int blockBytes() const
    {
        return row_bytes << block_log2;
    }

    __device__ __forceinline__ const char* inPool(uint32_t block) const
    {
        return pool + static_cast<int64_t>(block) * blockBytes();
    }

    __device__ __forceinline__ char* inCache(int slot) const
    {
        return rows + static_cast<int64_t>(slot) * blockBytes();
    }

    __device__ __forceinline__ char* inLanding(int landing) const
    {
        return landing_rows + static_cast<int64_t>(landing) * blockBytes();
    }

    // The slot of each lane's block; negative if it has none, or is not `wanted`.
    __device__ __forceinline__ int slotOf(uint32_t block, bool wanted) const
    {
        return wanted && blocks != 0 ? slots[block] - 1 : -1;
    }

    __device__ __forceinline__ void markUsed(int slot) const
    {
        reinterpret_cast<uint32_t*>(owners + slot)[0] = step;
    }

    // Where a row of the pool is in a slot that holds a copy of its block.
    __device__ __forceinline__ char* inCopy(int slot, uint32_t row) const
    {
        return inCache(slot) + (row & ((1u << block_log2) - 1)) * row_bytes;
    }
};

// Have the blocks of the lanes of `missing` placed later; where the list is full, not. Returns where this lane's block is to
// land; negative: nowhere. `whole`: the warp reads all rows of them, and lets them land. For all lanes of a warp.
__device__ __forceinline__ int noteMissing(const CacheView& cache, unsigned missing, int32_t block, bool whole)
{
    const int lane = threadIdx.x % kWarpSize, misses = __popc(missing);
    int first = 0;
    uint32_t ticket = 0, in_use = 0; // tickets that have been taken and not given back, before this warp's
    if (lane == 0 && cache.blocks != 0)
    {
        first = atomicAdd(cache.missed, misses);
        if (cache.landing_blocks != 0)
        {
            ticket = atomicAdd(cache.tickets, static_cast<uint32_t>(misses));
            in_use = ticket - static_cast<uint32_t>(loadCurrent(reinterpret_cast<const int32_t*>(cache.tickets + 1)));
        }
    }
    const int before = __popc(missing & ((1u << lane) - 1));
    const int at = __shfl_sync(kFullWarp, first, 0) + before;
    ticket = __shfl_sync(kFullWarp, ticket, 0) + before;
    in_use = __shfl_sync(kFullWarp, in_use, 0) + before;
    const bool noted = (missing >> lane & 1) != 0 && at < cache.blocks;
    const bool lands = noted && whole && in_use < static_cast<uint32_t>(cache.landing_blocks);
    const int landing = lands ? static_cast<int>(ticket & (cache.landing_blocks - 1)) : -1;
    if (noted)
    {
        reinterpret_cast<int2*>(cache.missed + HIP_TRT_CACHE_MISSED_HEADER)[at] = make_int2(block, landing);
    }
    return landing;
}

constexpr int kCacheThreads = 256; // of a thread block that uses caches

// One as a thread block sees it during one step: in shared memory, as registers are scarce.
struct BlockCache : CacheView
{
    static constexpr int kWarps = kCacheThreads / kWarpSize;

    unsigned events[HIP_TRT_CACHE_EVENTS];
    // Of each warp's last look-up: until it is noted, lanes whose block is missing, and the block; then, lanes whose block
    // is to land, and where.
    uint32_t landed[kWarps];
    int32_t landings[kWarps][kWarpSize];

    __device__ BlockCache(const LayerCaches& caches, bool is_key)
        : CacheView(caches, is_key)
        , events{}
        , landed{}
    {
    }

    __device__ __forceinline__ void count(HipTrtCacheEvent event, unsigned times = 1)
    {
        if (threadIdx.x % kWarpSize == 0 && times != 0)
        {
            atomicAdd(events + event, times);
        }
    }

    // Where each lane's block is, from its slot: in the cache or in the pool. Undefined where not `wanted`. The warp calls
    // noteMissing once it has begun to read. For all lanes of a warp.
    __device__ __forceinline__ const char* use(uint32_t block, bool wanted, int slot)
    {
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
        const unsigned missing = __ballot_sync(kFullWarp, wanted && slot < 0);
        count(HIP_TRT_CACHE_HIT, __popc(__ballot_sync(kFullWarp, slot >= 0)));
        __syncwarp(); // what landed before has been kept
        if (lane == 0)
        {
            landed[warp] = missing;
        }
        if (missing != 0)
        {
            landings[warp][lane] = static_cast<int32_t>(block);
        }
        __syncwarp();
        if (slot < 0)
        {
            return inPool(block);
        }
        markUsed(slot);
        return inCache(slot);
    }

    // Have the missing blocks of this warp's last look-up placed later; where the list is full, not. Not before the warp has
    // begun to read them: it would wait here for what nobody needs. `whole`: it reads all their rows, and lets them land.
    __device__ __forceinline__ void noteMissing(bool whole)
    {
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
        const unsigned missing = landed[warp];
        if (missing == 0)
        {
            return;
        }
        const int32_t block = landings[warp][lane];
        count(HIP_TRT_CACHE_MISS, __popc(missing));
        const int landing = hip_trt::noteMissing(*this, missing, block, whole);
        __syncwarp();
        landings[warp][lane] = landing;
        const unsigned landing_lanes = __ballot_sync(kFullWarp, landing >= 0);
        if (lane == 0)
        {
            landed[warp] = landing_lanes;
        }
        __syncwarp();
    }

    // Lanes of this warp's last look-up, which has been noted, whose block is to land.
    __device__ __forceinline__ uint32_t landingLanes() const
    {
        return landed[threadIdx.x / kWarpSize];
    }

    // Where the block of one of those lands.
    __device__ __forceinline__ char* landingOf(int lane) const
    {
        return inLanding(landings[threadIdx.x / kWarpSize][lane]);
    }

    // Write a new row of the pool to the copy of its block, if there is one. For all lanes of a warp.
    __device__ __forceinline__ void writeRow(uint32_t row, const char* data)
    {
        const int slot = slotOf(row >> block_log2, true);
        if (slot >= 0)
        {
            char* const target = inCopy(slot, row);
            for (int i = threadIdx.x % kWarpSize * 16; i < row_bytes; i += kWarpSize * 16)
            {
                *reinterpret_cast<uint4*>(target + i) = *reinterpret_cast<const uint4*>(data + i);
            }
        }
    }
};

// Make a thread block's views of a layer's caches, of keys and of values, by two threads. Barrier to follow.
__device__ __forceinline__ void openCaches(BlockCache* views, const LayerCaches& caches, int key_thread, int value_thread)
{
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == key_thread || thread == value_thread)
    {
        const bool is_key = thread == key_thread;
        new (views + !is_key) BlockCache(caches, is_key);
    }
}

// Add up what a thread block's views have counted.
__device__ __forceinline__ void reportEvents(const BlockCache* views, uint64_t* counters)
{
    if (threadIdx.x < 2 * HIP_TRT_CACHE_EVENTS)
    {
        const unsigned count = views[threadIdx.x / HIP_TRT_CACHE_EVENTS].events[threadIdx.x % HIP_TRT_CACHE_EVENTS];
        if (count != 0)
        {
            Word* const events = reinterpret_cast<Word*>(counters) + HIP_TRT_OFFLOAD_EVENTS_AT;
            atomicAdd(events + threadIdx.x, static_cast<Word>(count));
        }
    }
}

// Empty a list of missed blocks, and give back what landed of them. For one thread.
__device__ __forceinline__ void dropMissed(const HipTrtBlockCache& cache, const HipTrtLanding& landing)
{
    if (cache.blocks != 0)
    {
        if (landing.blocks != 0)
        {
            atomicAdd(landing.tickets + 1, static_cast<uint32_t>(cache.missed[0]));
        }
        cache.missed[0] = 0;
    }
}

} // namespace hip_trt
