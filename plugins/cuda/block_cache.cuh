// Blocks of a pool in host memory, copied to GPU memory: looked up, filled and replaced by the warps of a running kernel.
//
// A block may be put into any slot of kChoices sets of kWays, which hashes of it name: with one set, those that happen to be
// in demand would be full long before the cache is. A slot's owner is one 64-bit word
//
//     block + 1 (32 bits; 0: empty) | step of its last use (31 bits) | its rows are complete (1 bit)
//
// and changes by compare-and-swap alone. A table names, for every block of the pool, the slot that it was put in last: a hint,
// for the owner has the word, by which all lanes of a warp look up a block each in two loads.
//
// What makes it safe without locks:
//   - A slot may be replaced only if its last use is more than kGrace + 1 steps back, and a warp reads a slot only if its last
//     use is at most kGrace back, or after renewing it. Thread blocks of one kernel may disagree about the step by one. So
//     nothing that this kernel reads is replaced by it.
//   - Who replaces a slot marks it incomplete first, and complete once its rows are there. A warp that meets an incomplete
//     one reads the pool instead.
#pragma once

#include "hip_offload.h"
#include "paged_cache.cuh"

#include <limits.h>

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
    int32_t* hints; // by block: 1 + slot
    uint32_t sets;  // of kWays slots; 0: no cache
    uint32_t step;
    int block_log2; // rows of a block
    int row_bytes;
    uint32_t new_row;     // of the pool: the newest token's, which may not have been written there yet
    const char* new_data; // what it will be
    unsigned events[HIP_TRT_CACHE_EVENTS];

    __device__ BlockCache(const HipTrtBlockCache& cache, const void* pool, const Call& call, uint32_t step,
        uint32_t new_row, const void* new_data)
        : pool(static_cast<const char*>(pool))
        , rows(static_cast<char*>(cache.rows))
        , owners(reinterpret_cast<Owner*>(cache.owners))
        , hints(cache.hints)
        , sets(static_cast<uint32_t>(cache.blocks) / kWays)
        , step(step)
        , block_log2(call.block_k_log2)
        , row_bytes(call.row_bytes)
        , new_row(new_row)
        , new_data(static_cast<const char*>(new_data))
        , events{}
    {
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

    // Where each lane's block is: in the cache, where it is put if it was not, or else in the pool. Undefined where not
    // `wanted`. For all lanes of a warp.
    __device__ __forceinline__ const char* find(uint32_t block, bool wanted)
    {
        const int hint = wanted && sets != 0 ? loadCurrent(hints + block) : 0;
        Owner* const slot = owners + hint - 1;
        const Owner owner = hint != 0 ? loadCurrent(slot) : 0;
        const bool hit = hint != 0 && keep(slot, block, owner);
        const char* found = hit ? rows + static_cast<int64_t>(hint - 1) * blockBytes() : inPool(block);
        // Rows that came in this very kernel: see what was written before the slot was marked complete.
        if (__any_sync(kFullWarp, hit && age(owner) <= 1))
        {
            __threadfence();
        }
        count(HIP_TRT_CACHE_HIT, __popc(__ballot_sync(kFullWarp, hit)));
        unsigned missing = __ballot_sync(kFullWarp, wanted && !hit);
        if (sets == 0)
        {
            count(HIP_TRT_CACHE_BYPASS, __popc(missing));
            return found;
        }
        for (; missing != 0; missing &= missing - 1)
        {
            const int asking = __ffs(missing) - 1;
            const char* const placed = place(__shfl_sync(kFullWarp, block, asking));
            found = threadIdx.x % kWarpSize == asking ? placed : found;
        }
        return found;
    }

    // Put a block into the cache, and say where it is; in the pool if there is no room or another warp is at it. All lanes of
    // a warp together.
    __device__ __forceinline__ const char* place(uint32_t block)
    {
        const int slot = replaceOldest(block);
        if (slot < 0)
        {
            count(HIP_TRT_CACHE_BYPASS);
            return inPool(block);
        }
        char* const target = rows + static_cast<int64_t>(slot) * blockBytes();
        copyBlock(target, block);
        __threadfence();
        __syncwarp();
        if (threadIdx.x % kWarpSize == 0)
        {
            atomicExch(owners + slot, BlockCache::owner(block, step, true));
            hints[block] = slot + 1;
        }
        count(HIP_TRT_CACHE_MISS);
        return target;
    }

    // Take the least recently used slot for a block that no slot has. Returns it, marked incomplete; -1 if all are in use, or
    // if another warp takes one for the same block.
    __device__ __forceinline__ int replaceOldest(uint32_t block)
    {
        Owner owner[kChoices];
#pragma unroll
        for (int choice = 0; choice < kChoices; ++choice)
        {
            owner[choice] = loadCurrent(owners + slotOf(block, choice));
        }
        while (true)
        {
            int longest = 0, best = 0, best_slot = 0;
            bool present = false;
#pragma unroll
            for (int choice = 0; choice < kChoices; ++choice)
            {
                const int idle = owner[choice] >> 32 == 0 ? INT_MAX : age(owner[choice]);
                if (idle > longest)
                {
                    longest = idle;
                    best = choice;
                    best_slot = slotOf(block, choice);
                }
                present = present || holds(owner[choice], block);
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
                            = atomicCAS(owners + slot, owner[choice], BlockCache::owner(block, step, false));
                        taken = before == owner[choice];
                        owner[choice] = before;
                    }
                }
            }
            if (__any_sync(kFullWarp, taken))
            {
                if (longest != INT_MAX)
                {
                    count(HIP_TRT_CACHE_EVICTION);
                }
                return slot;
            }
        }
    }

    // Copy a block from the pool, several kilobytes in flight at once.
    __device__ __forceinline__ void copyBlock(char* target, uint32_t block) const
    {
        constexpr int kBatch = 8, kChunk = 16;
        const char* const source = inPool(block);
        const int bytes = blockBytes();
        const int new_at = new_row >> block_log2 == block ? (new_row & ((1u << block_log2) - 1)) * row_bytes : bytes;
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
                    const bool is_new = at >= new_at && at < new_at + row_bytes;
                    chunk[i] = loadCurrent(is_new ? new_data + at - new_at : source + at);
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

    // Write the new row to the copies of its block. A copy that is under way takes it from where this does.
    __device__ __forceinline__ void writeNewRow()
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
                    *reinterpret_cast<uint4*>(row + i) = *reinterpret_cast<const uint4*>(new_data + i);
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
//
// Not inlined: what it needs while it copies would else take registers from the kernel all the time.
inline __device__ __noinline__ const char* findRow(BlockCache* cache, uint32_t row, bool wanted)
{
    return cache->find(row >> cache->block_log2, wanted)
        + (row & ((1u << cache->block_log2) - 1)) * cache->row_bytes;
}

} // namespace hip_trt
