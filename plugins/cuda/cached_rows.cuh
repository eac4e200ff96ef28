// A pool in host memory behind its cache, for kernels in which every lane of a warp asks for a row: those of a single-token
// call where no cluster computes it. They note what is missing, and leave nothing in the landing area.
#pragma once

#include "block_cache.cuh"

namespace hip_trt
{

struct CachedRows : CacheView
{
    Word* events; // of this cache

    __device__ __forceinline__ CachedRows(const LayerCaches& caches, bool is_key)
        : CacheView(caches, is_key)
        , events(reinterpret_cast<Word*>(caches.counters) + HIP_TRT_OFFLOAD_EVENTS_AT + (is_key ? 0 : HIP_TRT_CACHE_EVENTS))
    {
    }

    // Where the row of the pool is that this lane gives, in bytes from the pool: there, or in the copy of its block. A
    // negative row is none. Blocks are counted once where lanes that follow one another ask for rows of the same. For all
    // lanes of a warp.
    __device__ __forceinline__ int64_t offset(int64_t row) const
    {
        const int lane = threadIdx.x % kWarpSize;
        const int64_t block = row < 0 ? -1 : row >> block_log2;
        const int64_t before = __shfl_up_sync(kFullWarp, block, 1);
        const bool leads = block >= 0 && (lane == 0 || before != block);
        const int slot = slotOf(static_cast<uint32_t>(block), block >= 0);
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
            markUsed(slot);
        }
        return inCopy(slot, static_cast<uint32_t>(row)) - pool;
    }
};

} // namespace hip_trt
