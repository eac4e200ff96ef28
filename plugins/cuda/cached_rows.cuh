// A pool in host memory behind its cache, for kernels in which every lane of a warp asks for a row: those of a single-token
// call where no cluster computes it. They note what is missing, and leave nothing in the landing area.
#pragma once

#include "block_cache.cuh"

namespace hip_trt
{

struct CachedRows
{
    const char* pool;
    const char* rows;
    uint64_t* owners;
    const int32_t* slots;
    int32_t* missed;
    uint32_t* tickets;
    int32_t landing_blocks;
    int32_t blocks;
    Word* events; // of this cache
    uint32_t step;
    int block_k_log2;
    int row_bytes;

    __device__ __forceinline__ CachedRows(const LayerCaches& caches, bool is_key)
        : CachedRows(caches, is_key ? caches.keys : caches.values, is_key ? caches.key_pool : caches.value_pool, is_key)
    {
    }

    __device__ __forceinline__ CachedRows(
        const LayerCaches& caches, const HipTrtBlockCache& cache, const void* pool, bool is_key)
        : pool(static_cast<const char*>(pool))
        , rows(static_cast<const char*>(cache.rows))
        , owners(cache.owners)
        , slots(cache.slots)
        , missed(cache.missed)
        , tickets(caches.landing.tickets)
        , landing_blocks(caches.landing.blocks)
        , blocks(cache.blocks)
        , events(reinterpret_cast<Word*>(caches.counters) + HIP_TRT_OFFLOAD_EVENTS_AT + (is_key ? 0 : HIP_TRT_CACHE_EVENTS))
        , step(static_cast<uint32_t>(*caches.counters))
        , block_k_log2(caches.block_k_log2)
        , row_bytes(caches.row_bytes)
    {
    }

    // Where the row of the pool is that this lane gives, in bytes from the pool: there, or in the copy of its block. A
    // negative row is none. Blocks are counted once where lanes that follow one another ask for rows of the same. For all
    // lanes of a warp.
    __device__ __forceinline__ int64_t offset(int64_t row) const
    {
        const int lane = threadIdx.x % kWarpSize;
        const int64_t block = row < 0 ? -1 : row >> block_k_log2;
        const int64_t before = __shfl_up_sync(kFullWarp, block, 1);
        const bool leads = block >= 0 && (lane == 0 || before != block);
        const int slot = block >= 0 && blocks != 0 ? slots[block] - 1 : -1;
        const unsigned hits = __ballot_sync(kFullWarp, leads && slot >= 0);
        const unsigned missing = __ballot_sync(kFullWarp, leads && slot < 0);
        if (lane == 0 && hits != 0)
        {
            atomicAdd(events + HIP_TRT_CACHE_HIT, static_cast<Word>(__popc(hits)));
        }
        if (missing != 0)
        {
            if (lane == 0)
            {
                atomicAdd(events + HIP_TRT_CACHE_MISS, static_cast<Word>(__popc(missing)));
            }
            noteMissing(*this, missing, static_cast<int32_t>(block), false);
        }
        if (block < 0)
        {
            return kNoRow;
        }
        if (slot < 0)
        {
            return row * row_bytes;
        }
        if (leads)
        {
            reinterpret_cast<uint32_t*>(owners + slot)[0] = step;
        }
        const int64_t in_cache = (static_cast<int64_t>(slot) << block_k_log2) + (row & ((1 << block_k_log2) - 1));
        return rows - pool + in_cache * row_bytes;
    }
};

} // namespace hip_trt
