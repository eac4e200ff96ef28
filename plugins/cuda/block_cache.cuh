// Blocks of a pool in host memory, copied to GPU memory: looked up by the kernels of a decode step, filled between steps.
//
// A table has an entry for every block of the pool: the slot that holds a copy, if one does. So all lanes of a warp look up a
// block each in one load. A block that is missing is read where it is, over the bus, and noted; once the kernel has ended,
// another one places what was noted (block_cache_fill.cuh), off the critical path. Decode kernels change neither the table nor
// what slots hold; all that they write down is when a slot was used.
//
// Kernels of one layer must be ordered, as they are in one stream: what one of them reads, another may replace.
#pragma once

#include "hip_offload.h"
#include "paged_cache.cuh"

namespace hip_trt
{

using Word = unsigned long long; // the type that atomic functions take

// What a slot holds, one word: block + 1 (high half; 0: empty) and the step of its last use.
__device__ __forceinline__ Word slotOwner(uint32_t block, uint32_t step)
{
    return static_cast<Word>(block + 1) << 32 | step;
}

// A pool and its cache as a thread block sees them during one step: in shared memory, as registers are scarce.
struct BlockCache
{
    const char* pool; // host memory
    char* rows;
    uint64_t* owners;
    int32_t* slots;  // by block: 1 + slot
    int32_t* missed; // see hip_offload.h
    int32_t blocks;  // slots; 0: no cache
    uint32_t step;
    int block_log2; // rows of a block
    int row_bytes;
    unsigned events[HIP_TRT_CACHE_EVENTS];

    __device__ BlockCache(
        const HipTrtBlockCache& cache, const void* pool, int block_log2, int row_bytes, const uint64_t* counters)
        : pool(static_cast<const char*>(pool))
        , rows(static_cast<char*>(cache.rows))
        , owners(cache.owners)
        , slots(cache.slots)
        , missed(cache.missed)
        , blocks(cache.blocks)
        , step(static_cast<uint32_t>(*counters)) // steps that have ended
        , block_log2(block_log2)
        , row_bytes(row_bytes)
        , events{}
    {
    }

    __device__ __forceinline__ int blockBytes() const
    {
        return row_bytes << block_log2;
    }

    __device__ __forceinline__ void count(HipTrtCacheEvent event, unsigned times = 1)
    {
        if (threadIdx.x % kWarpSize == 0 && times != 0)
        {
            atomicAdd(events + event, times);
        }
    }

    __device__ __forceinline__ const char* inPool(uint32_t block) const
    {
        return pool + static_cast<int64_t>(block) * blockBytes();
    }

    __device__ __forceinline__ char* inCache(int slot) const
    {
        return rows + static_cast<int64_t>(slot) * blockBytes();
    }

    // The slot of each lane's block; negative if it has none, or is not `wanted`.
    __device__ __forceinline__ int slotOf(uint32_t block, bool wanted) const
    {
        return wanted && blocks != 0 ? slots[block] - 1 : -1;
    }

    // Where each lane's block is, from its slot: in the cache or in the pool. Undefined where not `wanted`. For all lanes of a
    // warp.
    __device__ __forceinline__ const char* use(uint32_t block, bool wanted, int slot)
    {
        const unsigned missing = __ballot_sync(kFullWarp, wanted && slot < 0);
        count(HIP_TRT_CACHE_HIT, __popc(__ballot_sync(kFullWarp, slot >= 0)));
        if (missing != 0)
        {
            noteMissing(block, missing);
        }
        if (slot < 0)
        {
            return inPool(block);
        }
        reinterpret_cast<uint32_t*>(owners + slot)[0] = step;
        return inCache(slot);
    }

    // Have the blocks of the lanes of `missing` placed later; where the list is full, not.
    __device__ __forceinline__ void noteMissing(uint32_t block, unsigned missing)
    {
        const int lane = threadIdx.x % kWarpSize;
        count(HIP_TRT_CACHE_MISS, __popc(missing));
        int first = 0;
        if (lane == 0 && blocks != 0)
        {
            first = atomicAdd(missed, __popc(missing));
        }
        const int at = __shfl_sync(kFullWarp, first, 0) + __popc(missing & ((1u << lane) - 1));
        if ((missing >> lane & 1) != 0 && at < blocks)
        {
            missed[HIP_TRT_CACHE_MISSED_HEADER + at] = static_cast<int32_t>(block);
        }
    }

    // Write a new row of the pool to the copy of its block, if there is one. For all lanes of a warp.
    __device__ __forceinline__ void writeRow(uint32_t row, const char* data)
    {
        const int slot = blocks == 0 ? -1 : slots[row >> block_log2] - 1;
        if (slot >= 0)
        {
            char* const target = inCache(slot) + (row & ((1u << block_log2) - 1)) * row_bytes;
            for (int i = threadIdx.x % kWarpSize * 16; i < row_bytes; i += kWarpSize * 16)
            {
                *reinterpret_cast<uint4*>(target + i) = *reinterpret_cast<const uint4*>(data + i);
            }
        }
    }
};

} // namespace hip_trt
