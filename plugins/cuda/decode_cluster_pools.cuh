// Where the decode kernel reads keys and values: pools in GPU memory, or pools in host memory through block caches. Both say
// where a row is; what search and attention do with it is the same.
#pragma once

#include "decode_cluster_common.cuh"

namespace hip_trt
{

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

    // Where the key block is whose first row in the pool this lane gives; lane i's is that of node i of 2^nodes_log2.
    using Block = uint32_t;

    __device__ __forceinline__ Block findKeys(uint32_t row, int) const
    {
        return row;
    }

    // A row of the block that lane `lane` found.
    __device__ __forceinline__ const T* keyRow(Block block, int lane, int row) const
    {
        return keys + (static_cast<uint64_t>(__shfl_sync(kFullWarp, block, lane)) + row) * D;
    }

    // Two runs of eight rows of keys and of values.
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

    // Half h begins at row[h] of the pools; it is read only if wanted[h].
    __device__ __forceinline__ Tile findTile(const uint32_t (&row)[2], const bool (&)[2]) const
    {
        return {keys, values, {static_cast<uint64_t>(row[0]) * D, static_cast<uint64_t>(row[1]) * D}};
    }

    static __device__ __forceinline__ uint4 load(const T* address)
    {
        return loadOnce(address);
    }

    // The new row has been written to the pools.
    __device__ __forceinline__ void append() const
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

    __device__ __forceinline__ const T* find(int cache, uint32_t row) const
    {
        return reinterpret_cast<const T*>(findRow(caches + cache, row));
    }

    using Block = const T*;

    __device__ __forceinline__ Block findKeys(uint32_t row, int nodes_log2) const
    {
        Block found = nullptr;
#pragma unroll 1
        for (int node = 0; node < 1 << nodes_log2; ++node)
        {
            const T* const block = find(0, __shfl_sync(kFullWarp, row, node));
            found = (threadIdx.x & ((1 << nodes_log2) - 1)) == node ? block : found;
        }
        return found;
    }

    __device__ __forceinline__ const T* keyRow(Block block, int lane, int row) const
    {
        const uint64_t address = __shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(block), lane);
        return reinterpret_cast<const T*>(address) + row * D;
    }

    struct Tile
    {
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
    };

    __device__ __forceinline__ Tile findTile(const uint32_t (&row)[2], const bool (&wanted)[2]) const
    {
        const int block_log2 = caches->block_log2;
        Tile tile{};
#pragma unroll
        for (int half = 0; half < 2; ++half)
        {
            if (half == 1 && wanted[0] && wanted[1] && row[0] >> block_log2 == row[1] >> block_log2)
            {
                tile.keys[1] = tile.keys[0] + (row[1] - row[0]) * D;
                tile.values[1] = tile.values[0] + (row[1] - row[0]) * D;
            }
            else if (wanted[half])
            {
                tile.keys[half] = find(0, row[half]);
                tile.values[half] = find(1, row[half]);
            }
        }
        return tile;
    }

    // Not loadOnce: the cache is written while the kernel runs.
    static __device__ __forceinline__ uint4 load(const T* address)
    {
        return loadCurrent(address);
    }

    // For all threads of a thread block.
    __device__ __forceinline__ void append() const
    {
        const int warp = warpIndex();
        if (warp < 2)
        {
            caches[warp].writeNewRow();
        }
    }
};

} // namespace hip_trt
