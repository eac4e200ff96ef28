// Blocks of a pool in host memory, copied to GPU memory: looked up, filled and replaced by the warps of a running kernel.
//
// The cache is set-associative: a block has its place in one of kWays slots, a lane each. A slot's owner is one 64-bit word
//
//     block + 1 (32 bits; 0: empty) | step of its last use (31 bits) | its rows are complete (1 bit)
//
// and changes by compare-and-swap alone. What makes it safe without locks:
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
static_assert(kWays == kWarpSize, "a lane looks at a way");

constexpr int kGrace = 3; // steps during which a use need not be written down again

using Owner = unsigned long long; // the type that atomic functions take

// A pool and its cache as a thread block sees them during one step: in shared memory, as registers are scarce.
struct BlockCache
{
    const char* pool; // host memory
    char* rows;
    Owner* owners;
    uint32_t sets; // of kWays slots; 0: no cache
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

    // The first of the slots that a block may be in.
    __device__ __forceinline__ int64_t firstSlot(uint32_t block) const
    {
        return static_cast<int64_t>(__umulhi(block * 0x9e3779b1u, sets)) * kWays;
    }

    __device__ __forceinline__ void count(HipTrtCacheEvent event)
    {
        if (threadIdx.x % kWarpSize == 0)
        {
            atomicAdd(events + event, 1u);
        }
    }

    // The complete copies of a block, a bit each, in use from now on: they stay until the kernel ends. `owner` is this lane's
    // slot's.
    __device__ __forceinline__ unsigned keep(Owner* set, uint32_t block, Owner owner) const
    {
        const int lane = threadIdx.x % kWarpSize;
        bool kept = holds(owner, block) && complete(owner);
        while (kept && age(owner) > kGrace)
        {
            const Owner before = atomicCAS(set + lane, owner, BlockCache::owner(block, step, true));
            if (before == owner)
            {
                break;
            }
            owner = before; // used by another warp, or replaced
            kept = holds(owner, block) && complete(owner);
        }
        return __ballot_sync(kFullWarp, kept);
    }

    // Read a block over the bus instead.
    __device__ __forceinline__ const char* bypass(uint32_t block)
    {
        count(HIP_TRT_CACHE_BYPASS);
        return pool + static_cast<int64_t>(block) * blockBytes();
    }

    // The rows of a block: in the cache, where they are put if they were not, or else in the pool.
    __device__ __forceinline__ const char* findBlock(uint32_t block)
    {
        if (sets == 0)
        {
            return bypass(block);
        }
        const int lane = threadIdx.x % kWarpSize;
        const int64_t first = firstSlot(block);
        Owner* const set = owners + first;
        Owner owner = loadCurrent(set + lane);
        if (__any_sync(kFullWarp, holds(owner, block)))
        {
            const unsigned kept = keep(set, block, owner);
            if (kept == 0)
            {
                return bypass(block);
            }
            const int way = __ffs(kept) - 1;
            // Rows that came in this very kernel: see what was written before the slot was marked complete.
            if (__any_sync(kFullWarp, lane == way && age(owner) <= 1))
            {
                __threadfence();
            }
            count(HIP_TRT_CACHE_HIT);
            return rows + (first + way) * blockBytes();
        }
        const int way = replaceOldest(set, block, owner);
        if (way < 0)
        {
            return bypass(block);
        }
        char* const target = rows + (first + way) * blockBytes();
        copyBlock(target, block);
        __threadfence();
        __syncwarp();
        if (lane == way)
        {
            atomicExch(set + way, BlockCache::owner(block, step, true));
        }
        count(HIP_TRT_CACHE_MISS);
        return target;
    }

    // Take the least recently used slot for a block that no slot has. `owner` is this lane's slot's. Returns the slot in the
    // set, marked incomplete; -1 if all are in use, or if another warp takes one for the same block.
    __device__ __forceinline__ int replaceOldest(Owner* set, uint32_t block, Owner owner)
    {
        const int lane = threadIdx.x % kWarpSize;
        while (!__any_sync(kFullWarp, holds(owner, block)))
        {
            const int idle = owner >> 32 == 0 ? INT_MAX : age(owner);
            const int longest = __reduce_max_sync(kFullWarp, idle);
            if (longest <= kGrace + 1)
            {
                break;
            }
            // Warps that look for room at once begin at different slots.
            const unsigned oldest = __ballot_sync(kFullWarp, idle == longest);
            const unsigned turned = __funnelshift_r(oldest, oldest, block);
            const int way = (__ffs(turned) - 1 + block) % kWays;
            Owner before = owner;
            if (lane == way)
            {
                before = atomicCAS(set + way, owner, BlockCache::owner(block, step, false));
            }
            if (__any_sync(kFullWarp, lane == way && before == owner))
            {
                if (longest != INT_MAX)
                {
                    count(HIP_TRT_CACHE_EVICTION);
                }
                return way;
            }
            owner = before;
        }
        return -1;
    }

    // Copy a block from the pool, several kilobytes in flight at once.
    __device__ __forceinline__ void copyBlock(char* target, uint32_t block) const
    {
        constexpr int kBatch = 4, kChunk = 16;
        const char* const source = pool + static_cast<int64_t>(block) * blockBytes();
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
        const int64_t first = firstSlot(block);
        Owner* const set = owners + first;
        for (unsigned kept = keep(set, block, loadCurrent(set + lane)); kept != 0; kept &= kept - 1)
        {
            char* const row = rows + (first + __ffs(kept) - 1) * blockBytes()
                + (new_row & ((1u << block_log2) - 1)) * row_bytes;
            for (int i = lane * 16; i < row_bytes; i += kWarpSize * 16)
            {
                *reinterpret_cast<uint4*>(row + i) = *reinterpret_cast<const uint4*>(new_data + i);
            }
        }
    }

    // Drop the copies of a block, where no kernel looks.
    __device__ __forceinline__ void forget(uint32_t block)
    {
        Owner* const owner = owners + firstSlot(block) + threadIdx.x % kWarpSize;
        if (sets != 0 && holds(*owner, block))
        {
            *owner = 0;
        }
    }
};

// A row of the pool, wherever it is now. All lanes of a warp call with the same row; all get the same result.
//
// Not inlined: what it needs while it copies would else take registers from the kernel all the time.
inline __device__ __noinline__ const char* findRow(BlockCache* cache, uint32_t row)
{
    const uint32_t block = row >> cache->block_log2;
    return cache->findBlock(block) + (row & ((1u << cache->block_log2) - 1)) * cache->row_bytes;
}

} // namespace hip_trt
