// Blocks of a pool in host memory, copied to GPU memory: looked up by the kernels of a decode step, filled between steps.
//
// A block may be put into any slot of kChoices sets of kWays, which hashes of it name: with one set, those that happen to be
// in demand would be full long before the cache is. A slot's owner is one 64-bit word
//
//     block + 1 (32 bits; 0: empty) | step of its last use (31 bits) | its rows are complete (1 bit)
//
// and changes by compare-and-swap alone. A table names, for every block of the pool, the slot that it was put in last: a hint,
// for the owner has the word, by which all lanes of a warp look up a block each in two loads.
//
// A block that is missing is read where it is, over the bus, and noted; once the kernel has ended, another one places what
// was noted (block_cache_fill.cuh), off the critical path.
//
// What makes it safe without locks:
//   - A slot may be replaced only if its last use is more than kGrace + 1 steps back, and a warp reads a slot only if its last
//     use is at most kGrace back, or after renewing it. Kernels that run at once may disagree about the step by one. So
//     nothing that one of them reads is replaced by another.
//   - Who replaces a slot marks it incomplete first, and complete once its rows are there.
#pragma once

#include "hip_offload.h"
#include "paged_cache.cuh"

namespace hip_trt
{

constexpr int kWays = HIP_TRT_CACHE_WAYS;
static_assert(kWays == kWarpSize, "a lane looks at a way of each set");

constexpr int kChoices = 4; // sets

constexpr int kGrace = 1; // steps during which a use need not be written down again

using Owner = unsigned long long; // the type that atomic functions take

// A pool and its cache as a thread block sees them during one step: in shared memory, as registers are scarce.
struct BlockCache
{
    const char* pool; // host memory
    char* rows;
    Owner* owners;
    int32_t* hints;  // by block: 1 + slot
    int32_t* missed; // see hip_offload.h
    uint32_t sets;   // of kWays slots; 0: no cache
    uint32_t step;
    int block_log2; // rows of a block
    int row_bytes;
    unsigned events[HIP_TRT_CACHE_EVENTS];

    __device__ BlockCache(const HipTrtBlockCache& cache, const void* pool, const Call& call, uint32_t step)
        : pool(static_cast<const char*>(pool))
        , rows(static_cast<char*>(cache.rows))
        , owners(reinterpret_cast<Owner*>(cache.owners))
        , hints(cache.hints)
        , missed(cache.missed)
        , sets(static_cast<uint32_t>(cache.blocks) / kWays)
        , step(step)
        , block_log2(call.block_k_log2)
        , row_bytes(call.row_bytes)
        , events{}
    {
    }

    // The number of the step that runs now, from a layer's counters.
    static __device__ __forceinline__ uint32_t currentStep(const uint64_t* counters)
    {
        return static_cast<uint32_t>(loadCurrent(reinterpret_cast<const Owner*>(counters))) & 0x7fffffff;
    }

    __device__ __forceinline__ int blockBytes() const
    {
        return row_bytes << block_log2;
    }

    static __device__ __forceinline__ Owner owner(uint32_t block, uint32_t step, bool complete)
    {
        return static_cast<Owner>(block + 1) << 32 | (step << 1) | (complete ? 1 : 0);
    }

    static __device__ __forceinline__ bool holds(Owner owner, uint32_t block)
    {
        return owner >> 32 == block + 1;
    }

    static __device__ __forceinline__ bool complete(Owner owner)
    {
        return owner & 1;
    }

    // Steps since the last use; 0 where another thread block is a step ahead. Steps are 31 bits wide.
    __device__ __forceinline__ int age(Owner owner) const
    {
        const int difference = static_cast<int>((step << 1) - (static_cast<uint32_t>(owner) & ~1u)) >> 1;
        return difference > 0 ? difference : 0;
    }

    // The slot of this lane in one of the sets of a block.
    __device__ __forceinline__ int slotOf(uint32_t block, int choice) const
    {
        constexpr uint32_t kFactors[kChoices] = {0x9e3779b1, 0x85ebca77, 0xc2b2ae3d, 0x27d4eb2f};
        return static_cast<int>(__umulhi(block * kFactors[choice], sets)) * kWays + threadIdx.x % kWarpSize;
    }

    __device__ __forceinline__ void count(HipTrtCacheEvent event, unsigned times = 1)
    {
        if (threadIdx.x % kWarpSize == 0 && times != 0)
        {
            atomicAdd(events + event, times);
        }
    }

    // Whether a slot, owned by `owner` a moment ago, is a complete copy of the block. If so, it is in use from now on: it stays
    // until the kernel ends. Each lane for itself.
    __device__ __forceinline__ bool keep(Owner* slot, uint32_t block, Owner owner) const
    {
        bool kept = holds(owner, block) && complete(owner);
        while (kept && age(owner) > kGrace)
        {
            const Owner before = atomicCAS(slot, owner, BlockCache::owner(block, step, true));
            if (before == owner)
            {
                break;
            }
            owner = before; // used by another warp, or replaced
            kept = holds(owner, block) && complete(owner);
        }
        return kept;
    }

    __device__ __forceinline__ const char* inPool(uint32_t block) const
    {
        return pool + static_cast<int64_t>(block) * blockBytes();
    }

    // Where each lane's block is: in the cache or in the pool. Undefined where not `wanted`. For all lanes of a warp.
    __device__ __forceinline__ const char* find(uint32_t block, bool wanted)
    {
        const int hint = wanted && sets != 0 ? loadCurrent(hints + block) : 0;
        Owner* const slot = owners + hint - 1;
        const bool hit = hint != 0 && keep(slot, block, loadAcquire(slot));
        const unsigned missing = __ballot_sync(kFullWarp, wanted && !hit);
        count(HIP_TRT_CACHE_HIT, __popc(__ballot_sync(kFullWarp, hit)));
        if (missing != 0)
        {
            noteMissing(block, missing);
        }
        return hit ? rows + static_cast<int64_t>(hint - 1) * blockBytes() : inPool(block);
    }

    // Have the blocks of the lanes of `missing` placed later; where the list is full, not.
    __device__ __forceinline__ void noteMissing(uint32_t block, unsigned missing)
    {
        const int lane = threadIdx.x % kWarpSize;
        count(HIP_TRT_CACHE_MISS, __popc(missing));
        const uint32_t capacity = sets * kWays;
        uint32_t first = 0;
        if (lane == 0 && capacity != 0)
        {
            first = atomicAdd(missed, __popc(missing));
        }
        const uint32_t at = __shfl_sync(kFullWarp, first, 0) + __popc(missing & ((1u << lane) - 1));
        if ((missing >> lane & 1) != 0 && at < capacity)
        {
            missed[HIP_TRT_CACHE_MISSED_HEADER + at] = static_cast<int32_t>(block);
        }
    }

    // Write a new row of the pool to the copies of its block. For all lanes of a warp.
    __device__ __forceinline__ void writeRow(uint32_t new_row, const char* data)
    {
        if (sets == 0)
        {
            return;
        }
        const int lane = threadIdx.x % kWarpSize;
        const uint32_t block = new_row >> block_log2;
#pragma unroll
        for (int choice = 0; choice < kChoices; ++choice)
        {
            const int slot = slotOf(block, choice);
            const bool kept_here = keep(owners + slot, block, loadCurrent(owners + slot));
            for (unsigned kept = __ballot_sync(kFullWarp, kept_here); kept != 0; kept &= kept - 1)
            {
                const int holder = __shfl_sync(kFullWarp, slot, __ffs(kept) - 1);
                char* const row = rows + static_cast<int64_t>(holder) * blockBytes()
                    + (new_row & ((1u << block_log2) - 1)) * row_bytes;
                for (int i = lane * 16; i < row_bytes; i += kWarpSize * 16)
                {
                    *reinterpret_cast<uint4*>(row + i) = *reinterpret_cast<const uint4*>(data + i);
                }
            }
        }
    }

    // Drop the copies of a block, where no kernel looks. For all lanes of a warp.
    __device__ __forceinline__ void forget(uint32_t block)
    {
        for (int choice = 0; sets != 0 && choice < kChoices; ++choice)
        {
            Owner* const owner = owners + slotOf(block, choice);
            if (holds(*owner, block))
            {
                *owner = 0;
            }
        }
    }
};

// Where a lane's row of the pool is now; undefined where not `wanted`. For all lanes of a warp, which may ask for a block each.
__device__ __forceinline__ const char* findRow(BlockCache* cache, uint32_t row, bool wanted)
{
    return cache->find(row >> cache->block_log2, wanted)
        + (row & ((1u << cache->block_log2) - 1)) * cache->row_bytes;
}

} // namespace hip_trt
