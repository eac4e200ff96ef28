// The mask search of a prefill on Hopper: the steps of mask_search.cuh, with the bulk tensor copy engine feeding
// warpgroup matrix products. Keys are the left operand, 64 tokens a tile; all sampled queries of the mask head are the
// right one, so a tile is read once.
#pragma once

#include "hopper.cuh"
#include "mask_search.cuh"
#include "prefill_sm90.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace hip_trt
{

// Queries: 64 or 128, the sampled queries of a mask head rounded up.
template <typename T, int D, int Queries>
struct PrefillSearch : MaskSearchSteps<PrefillSearch<T, D, Queries>>
{
    using Steps = MaskSearchSteps<PrefillSearch>;
    using Steps::cache;
    using Steps::call;
    using Steps::lane;
    using Steps::scores;
    using Steps::tree;
    using Steps::warp;

    static constexpr int kTileTokens = 64;
    static constexpr int kStages = 3;
    static constexpr int kHalves = D / 64;
    static constexpr int kTileBytes = kTileTokens * kSwizzleRowBytes; // of one half
    static constexpr int kQueryBytes = Queries * kSwizzleRowBytes;    // likewise
    static constexpr int kProducerWarp = 4;                           // after the warpgroup that multiplies
    static constexpr int kThreads = 5 * kWarpSize;
    static constexpr int kBlocksPerSm = Queries == 64 ? 3 : 2;

    struct Shared
    {
        alignas(1024) char queries[kHalves][kQueryBytes];
        alignas(1024) char keys[kStages][kHalves][kTileBytes];
        uint64_t full[kStages], empty[kStages];
    };
    static_assert(sizeof(Shared) % 16 == 0, "the lists follow");

    static constexpr size_t sharedBytes(size_t list_bytes)
    {
        return 1024 + sizeof(Shared) + list_bytes;
    }

    const CUtensorMap& key_map;
    Shared& shared;
    int steps = 0; // tiles so far, over all levels

    __device__ PrefillSearch(
        const Call& call, int b, int mask, int block, const CUtensorMap& key_map, char* aligned_memory)
        : Steps(call, b, mask, block, aligned_memory + sizeof(Shared))
        , key_map(key_map)
        , shared(*reinterpret_cast<Shared*>(aligned_memory))
    {
    }

    // All sampled queries fit at once.
    __device__ int queryCapacity() const
    {
        return Queries;
    }

#ifdef HIP_TRT_SM90A
    __device__ void initBarriers()
    {
        if (threadIdx.x == 0)
        {
            for (int stage = 0; stage < kStages; ++stage)
            {
                initBarrier(&shared.full[stage], 1);
                initBarrier(&shared.empty[stage], kProducerWarp); // every warp that multiplies
            }
            publishBarriers();
            prefetchMap(&key_map);
        }
        __syncthreads();
    }

    __device__ void loadQueries(int)
    {
        for (int i = threadIdx.x; i < Queries * D / 8; i += kThreads)
        {
            const int row = i / (D / 8);
            const int chunk = i % (D / 8);
            // The last query again where there are no more: the largest score stays the same.
            const int64_t from = this->queryRow(min(row, this->total_queries - 1));
            *reinterpret_cast<uint4*>(shared.queries[chunk / 8] + row * kSwizzleRowBytes + (chunk % 8 ^ row % 8) * 16)
                = *reinterpret_cast<const uint4*>(static_cast<const T*>(call.query) + from * D + chunk * 8);
        }
        fenceSharedForAsync();
        __syncthreads();
    }

    __device__ void scoreNodes(const NodeList& nodes, int level, bool)
    {
        const int tile_nodes = kTileTokens >> call.block_k_log2;
        const int tiles = (nodes.count + tile_nodes - 1) / tile_nodes;
        if (tile_nodes < kProducerWarp)
        {
            // Several warps share a node, and the largest wins.
            for (int i = threadIdx.x; i < nodes.count; i += kThreads)
            {
                scores[i] = 0;
            }
            __syncthreads();
        }
        if (warp == kProducerWarp)
        {
            copyTiles(nodes, tree.size(level), tiles, tile_nodes);
        }
        else
        {
            multiplyTilesOf(nodes, tiles, tile_nodes);
        }
        steps += tiles;
    }

    __device__ void copyTiles(const NodeList& nodes, int size, int tiles, int tile_nodes)
    {
        const int block_bytes = call.config.block_k * kSwizzleRowBytes;
        for (int tile = 0; tile < tiles; ++tile)
        {
            const int stage = (steps + tile) % kStages;
            const int copies = min(tile_nodes, nodes.count - tile * tile_nodes) * kHalves;
            waitBarrier(&shared.empty[stage], (steps + tile) / kStages % 2 ^ 1);
            if (lane == 0)
            {
                arriveExpectBytes(&shared.full[stage], copies * block_bytes);
            }
            __syncwarp();
            if (lane < copies)
            {
                const int node = lane / kHalves;
                const int half = lane % kHalves;
                const int key_block = tree.representative(nodes[tile * tile_nodes + node], size);
                const int64_t row = cache.row(key_block * call.config.block_k);
                copyBoxAsync(shared.keys[stage][half] + node * block_bytes, &key_map, half * 64,
                    static_cast<int>(row), &shared.full[stage]);
            }
        }
    }

    __device__ void multiplyTilesOf(const NodeList& nodes, int tiles, int tile_nodes)
    {
        float products[Queries / 2]; // of key rows g and g + 8 of this warp's 16
        const uint64_t query_tile = tileDescriptor(shared.queries[0]);
        for (int tile = 0; tile < tiles; ++tile)
        {
            const int stage = (steps + tile) % kStages;
            const uint64_t key_tile = tileDescriptor(shared.keys[stage][0]);
            waitBarrier(&shared.full[stage], (steps + tile) / kStages % 2);
            fenceRegisters(products);
            warpgroupArrive();
#pragma unroll
            for (int k = 0; k < D / 16; ++k)
            {
                multiplyTiles<T>(products, advance(key_tile, k / 4 * kTileBytes + k % 4 * 32),
                    advance(query_tile, k / 4 * kQueryBytes + k % 4 * 32), k > 0);
            }
            warpgroupCommit();
            warpgroupWait<0>();
            fenceRegisters(products);
            if (lane == 0)
            {
                arrive(&shared.empty[stage]);
            }
            float upper = -INFINITY, lower = -INFINITY;
#pragma unroll
            for (int i = 0; i < Queries / 2; i += 4)
            {
                upper = fmaxf(upper, fmaxf(products[i], products[i + 1]));
                lower = fmaxf(lower, fmaxf(products[i + 2], products[i + 3]));
            }
            // Blocks of 8 tokens: two a warp. Longer ones: one warp or several a block.
            const bool split = tile_nodes == 2 * kProducerWarp;
            if (!split)
            {
                upper = lower = fmaxf(upper, lower);
            }
#pragma unroll
            for (int distance = 1; distance < kWarpSize; distance *= 2)
            {
                upper = fmaxf(upper, __shfl_xor_sync(kFullWarp, upper, distance));
                lower = fmaxf(lower, __shfl_xor_sync(kFullWarp, lower, distance));
            }
            const int node = tile * tile_nodes + (split ? 2 * warp + lane : warp * tile_nodes / kProducerWarp);
            if (lane < (split ? 2 : 1) && node < nodes.count)
            {
                const uint32_t key = orderedKey(lane == 0 ? upper : lower);
                if (tile_nodes < kProducerWarp)
                {
                    atomicMax(&scores[node], key);
                }
                else
                {
                    scores[node] = key;
                }
            }
        }
    }
#endif // HIP_TRT_SM90A
};

template <typename T, int D, int Queries>
__global__ void
__launch_bounds__(PrefillSearch<T, D, Queries>::kThreads, PrefillSearch<T, D, Queries>::kBlocksPerSm)
    prefillSearchKernel(const __grid_constant__ Call call, const __grid_constant__ CUtensorMap key_map)
{
#ifdef HIP_TRT_SM90A
    char* const memory = dynamicShared() + (1024 - sharedAddress(dynamicShared()) % 1024) % 1024;
    PrefillSearch<T, D, Queries> search(call, blockIdx.z, blockIdx.y, blockIdx.x, key_map, memory);
    search.initBarriers();
    search.run();
#endif
}

template <typename T, int D, int Queries>
cudaError_t launchPrefillSearch(const Call& call, const CUtensorMap& keys, cudaStream_t stream)
{
    using Search = PrefillSearch<T, D, Queries>;
    return launch(prefillSearchKernel<T, D, Queries>, dim3(call.query_blocks, call.mask_heads, call.shape.batch),
        Search::kThreads, Search::sharedBytes(searchListBytes(call.candidate_capacity, call.kept_capacity)), stream,
        call, keys);
}

template <typename T, int D>
cudaError_t searchPrefillSm90(const Call& call, cudaStream_t stream)
{
    CUtensorMap keys;
    if (!makePoolMap(&keys, call, call.present_key))
    {
        return cudaErrorNotSupported;
    }
    return sampledQueries(call) <= 64 ? launchPrefillSearch<T, D, 64>(call, keys, stream)
                         : launchPrefillSearch<T, D, 128>(call, keys, stream);
}

} // namespace hip_trt
