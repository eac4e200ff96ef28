// Where the decode kernel reads keys and values: pools in GPU memory, or pools in host memory through block caches. Both say
// where a row is; what search and attention do with it is the same.
#pragma once

#include "decode_cluster_common.cuh"

namespace hip_trt
{

constexpr int kTileLog2 = 4; // rows that a warp attends to at once

template <typename T, int D>
struct ResidentPools
{
    static constexpr bool kOffloaded = false;

    const T* keys;
    const T* values;

    __device__ __forceinline__ ResidentPools(const DecodeCall& decode, const DecodeShared&)
        : keys(static_cast<const T*>(decode.call.present_key))
        , values(static_cast<const T*>(decode.call.present_value))
    {
    }

    // Where the key block is whose first row in the pool this lane gives. Where not `wanted`, the block of lane `other`, which
    // is wanted, does as well.
    using Block = uint32_t;

    __device__ __forceinline__ Block findKeys(uint32_t row, bool, int) const
    {
        return row;
    }

    // A row of the block that lane `lane` found.
    __device__ __forceinline__ const T* keyRow(Block block, int lane, int row) const
    {
        return keys + (static_cast<uint64_t>(__shfl_sync(kFullWarp, block, lane)) + row) * D;
    }

    // Where eight rows of keys and of values are, of which this lane gives the first. `paired`: an odd lane's follow those of
    // the lane before.
    using Run = uint32_t;

    __device__ __forceinline__ Run findRun(uint32_t row, bool, bool) const
    {
        return row;
    }

    // Two runs.
    struct Tile
    {
        const T* keys;
        const T* values;
        uint64_t from[2];

        __device__ __forceinline__ const T* key(int half) const
        {
            return keys + from[half];
        }

        __device__ __forceinline__ const T* value(int half) const
        {
            return values + from[half];
        }
    };

    // Those of two lanes from `lane` on.
    __device__ __forceinline__ Tile tile(Run run, int lane) const
    {
        return {keys, values,
            {static_cast<uint64_t>(__shfl_sync(kFullWarp, run, lane)) * D,
                static_cast<uint64_t>(__shfl_sync(kFullWarp, run, lane + 1)) * D}};
    }

    static __device__ __forceinline__ uint4 load(const T* address)
    {
        return loadOnce(address);
    }

    // The new row has been written to the pools, from key and value.
    __device__ __forceinline__ void append(uint32_t, const void*, const void*) const
    {
    }
};

template <typename T, int D>
struct OffloadedPools
{
    static constexpr bool kOffloaded = true;

    BlockCache* caches; // of keys and of values

    __device__ __forceinline__ OffloadedPools(const DecodeCall&, const DecodeShared& shared)
        : caches(shared.caches())
    {
    }

    static __device__ __forceinline__ const T* fromLane(const T* address, int lane)
    {
        return reinterpret_cast<const T*>(__shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(address), lane));
    }

    using Block = const T*;

    __device__ __forceinline__ Block findKeys(uint32_t row, bool wanted, int other) const
    {
        const uint32_t block_in_pool = row >> caches->block_log2; // a node's row is the first of its block
        const Block block = reinterpret_cast<const T*>(
            caches->use(block_in_pool, wanted, caches->slotOf(block_in_pool, wanted)));
        const Block replacement = fromLane(block, other);
        return wanted ? block : replacement;
    }

    __device__ __forceinline__ const T* keyRow(Block block, int lane, int row) const
    {
        return fromLane(block, lane) + row * D;
    }

    // Once the warp has begun to read the first of what it found.
    __device__ __forceinline__ void noteKeys() const
    {
        caches->noteMissing(true);
    }

    __device__ __forceinline__ void noteRuns() const
    {
        const bool whole = caches->block_log2 <= kTileLog2;
        caches[0].noteMissing(whole);
        caches[1].noteMissing(whole);
    }

    // Whether any block that this warp found last is to land: it is to be kept as it was read.
    __device__ __forceinline__ bool keysLand() const
    {
        return caches->landingLanes() != 0;
    }

    // Store a row of which every lane has chunks 4 j + t.
    static __device__ __forceinline__ void storeRow(T* row, const uint4 (&chunks)[D / 32])
    {
#pragma unroll
        for (int j = 0; j < D / 32; ++j)
        {
            *reinterpret_cast<uint4*>(row + threadIdx.x % 4 * 8 + 32 * j) = chunks[j];
        }
    }

    // Keep row `row` of the block that lane `lane` found, if it is to land.
    __device__ __forceinline__ void landKey(int lane, int row, const uint4 (&chunks)[D / 32]) const
    {
        if ((caches->landingLanes() >> lane & 1) != 0)
        {
            storeRow(reinterpret_cast<T*>(caches->landingOf(lane)) + row * D, chunks);
        }
    }

    struct Run
    {
        const T* key;
        const T* value;
    };

    __device__ __forceinline__ Run findRun(uint32_t row, bool wanted, bool paired) const
    {
        const int lane = threadIdx.x % kWarpSize;
        const bool follows = paired && lane % 2 == 1, own = wanted && !follows;
        const uint32_t block = row >> caches->block_log2;
        const int offset = (row & ((1u << caches->block_log2) - 1)) * D;
        const int key_slot = caches[0].slotOf(block, own), value_slot = caches[1].slotOf(block, own); // on their way at once
        Run run;
        run.key = reinterpret_cast<const T*>(caches[0].use(block, own, key_slot)) + offset;
        run.value = reinterpret_cast<const T*>(caches[1].use(block, own, value_slot)) + offset;
        const T* const key_before = fromLane(run.key, lane & ~1);
        const T* const value_before = fromLane(run.value, lane & ~1);
        return follows ? Run{key_before + 8 * D, value_before + 8 * D} : run;
    }

    struct Tile
    {
        const BlockCache* caches;
        int lane;
        const T* keys[2];
        const T* values[2];

        __device__ __forceinline__ const T* key(int half) const
        {
            return keys[half];
        }

        __device__ __forceinline__ const T* value(int half) const
        {
            return values[half];
        }

        // Keep what lands of the tile's keys: each lane has its part of row g of each half.
        __device__ __forceinline__ void landKeys(const uint4 (&chunks)[2][D / 32]) const
        {
            if (lands(caches[0]))
            {
#pragma unroll
                for (int half = 0; half < 2; ++half)
                {
                    if (T* const to = landing(caches[0], half, threadIdx.x % kWarpSize / 4))
                    {
                        storeRow(to, chunks[half]);
                    }
                }
            }
        }

        // Of its values, which are staged.
        __device__ __forceinline__ void landValues(const T* staged) const
        {
            using Staged = StagedTile<T, D>;
            if (lands(caches[1]))
            {
                Staged::forLines([&](int line, int chunk) {
                    if (T* const to = landing(caches[1], line / 8, line % 8))
                    {
                        *reinterpret_cast<uint4*>(to + chunk * Staged::kChunkElements)
                            = Staged::read(staged, Staged::at(line, chunk));
                    }
                });
            }
        }

    private:
        __device__ __forceinline__ bool lands(const BlockCache& cache) const
        {
            return (cache.landingLanes() >> lane & 3) != 0;
        }

        // Where a row of a half is to be kept; nullptr: nowhere. A block is the tile, or one half of it.
        __device__ __forceinline__ T* landing(const BlockCache& cache, int half, int row) const
        {
            const bool is_tile = cache.block_log2 == kTileLog2;
            const int found = lane + (is_tile ? 0 : half);
            return (cache.landingLanes() >> found & 1) == 0
                ? nullptr
                : reinterpret_cast<T*>(cache.landingOf(found)) + (row + (is_tile ? 8 * half : 0)) * D;
        }
    };

    __device__ __forceinline__ Tile tile(const Run& run, int lane) const
    {
        return {caches, lane, {fromLane(run.key, lane), fromLane(run.key, lane + 1)},
            {fromLane(run.value, lane), fromLane(run.value, lane + 1)}};
    }

    // Not loadOnce: pools and caches are written to.
    static __device__ __forceinline__ uint4 load(const T* address)
    {
        return loadCurrent(address);
    }

    // For all threads of a thread block.
    __device__ __forceinline__ void append(uint32_t row, const void* key, const void* value) const
    {
        const int warp = warpIndex();
        if (warp < 2)
        {
            caches[warp].writeRow(row, static_cast<const char*>(warp == 0 ? key : value));
        }
    }
};

} // namespace hip_trt
