// Block-sparse attention of a prefill on Hopper: the same function as sparse_attention.cuh, with the bulk tensor copy
// engine feeding warpgroup matrix products. One warp copies tiles of attended blocks; each of Groups warpgroups attends
// 64 rows, multiplying queries with the next tile's keys while it multiplies this tile's weights with values.
#pragma once

#include "hopper.cuh"
#include "kernels.cuh"
#include "prefill_sm90.cuh"
#include "query_block.cuh"
#include "sparse_attention.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace hip_trt
{

template <typename T, int D, int Groups>
struct PrefillAttention
{
    static constexpr int kGroupRows = 64;
    static constexpr int kRows = Groups * kGroupRows;
    static constexpr int kTileTokens = Groups == 1 ? 64 : 128;
    static constexpr int kStages = 2;
    static constexpr int kHalves = D / 64; // tiles hold 64 columns; wider heads take several
    static constexpr int kThreads = (Groups + 1) * 128;
    static constexpr int kBlocksPerSm = Groups == 1 ? 2 : 1;
    static constexpr int kProducerRegisters = 40;
    static constexpr int kConsumerRegisters = Groups == 1 ? 208 : 232;

    static constexpr int kQueryBytes = kGroupRows * kSwizzleRowBytes; // of one half
    static constexpr int kTileBytes = kTileTokens * kSwizzleRowBytes; // likewise

    struct Shared
    {
        alignas(1024) char queries[Groups][kHalves][kQueryBytes];
        alignas(1024) char keys[kStages][kHalves][kTileBytes];
        alignas(1024) char values[kStages][kHalves][kTileBytes];
        uint64_t keys_full[kStages], keys_empty[kStages];
        uint64_t values_full[kStages], values_empty[kStages];
    };

    // Shared memory starts where it likes; tiles start at multiples of 1024 bytes.
    static constexpr size_t kSharedBytes = sizeof(Shared) + 1024;
};

#ifdef HIP_TRT_SM90A

// One warp: copy every tile's blocks, keys then values.
template <typename T, int D, int Groups>
__device__ void copyTiles(const Call& call, const CUtensorMap& key_map, const CUtensorMap& value_map,
    const AttendedTokens& attended, const PagedRows& cache, typename PrefillAttention<T, D, Groups>::Shared& shared)
{
    using Attention = PrefillAttention<T, D, Groups>;
    const int lane = threadIdx.x % kWarpSize;
    const int block_k = call.config.block_k;
    const int tiles = (attended.columns + Attention::kTileTokens - 1) / Attention::kTileTokens;
    const int tile_blocks = Attention::kTileTokens >> call.block_k_log2;
    const int block_bytes = block_k * kSwizzleRowBytes;

    for (int tile = 0; tile < tiles; ++tile)
    {
        const int stage = tile % Attention::kStages;
        const int parity = tile / Attention::kStages % 2 ^ 1;
        const int first_column = tile * Attention::kTileTokens;
        const int blocks = min(tile_blocks, (attended.columns - first_column) >> call.block_k_log2);
        const int copies = blocks * Attention::kHalves;
        auto copy = [&](const CUtensorMap& map, char(&tiles_of_stage)[Attention::kHalves][Attention::kTileBytes],
                        uint64_t* empty, uint64_t* full)
        {
            waitBarrier(empty, parity);
            if (lane == 0)
            {
                arriveExpectBytes(full, copies * block_bytes);
            }
            __syncwarp();
            for (int i = lane; i < copies; i += kWarpSize)
            {
                const int block = i / Attention::kHalves;
                const int half = i % Attention::kHalves;
                // The block's first token: it is never after the last row, so never INT_MAX.
                const int64_t row = cache.row(attended.token(first_column + block * block_k));
                copyBoxAsync(tiles_of_stage[half] + block * block_bytes, &map, half * 64, static_cast<int>(row), full);
            }
        };
        copy(key_map, shared.keys[stage], &shared.keys_empty[stage], &shared.keys_full[stage]);
        copy(value_map, shared.values[stage], &shared.values_empty[stage], &shared.values_full[stage]);
    }
}

// One warpgroup: attend 64 rows of the mask head's query heads, those from first_index on.
template <typename T, int D, int Groups>
__device__ void attendRows(const Call& call, const QueryBlock& rows, const AttendedTokens& attended, int b, int mask,
    int group, int first_index, typename PrefillAttention<T, D, Groups>::Shared& shared)
{
    using Attention = PrefillAttention<T, D, Groups>;
    constexpr int kTile = Attention::kTileTokens;
    constexpr int kStages = Attention::kStages;
    const int thread = threadIdx.x % 128;
    const int lane = threadIdx.x % kWarpSize;
    const int all_rows = call.heads_per_mask * rows.rows;
    auto queryRow = [&](int index)
    {
        const int head = mask * call.heads_per_mask + index / rows.rows;
        const int row = rows.first_row + index % rows.rows;
        return (static_cast<int64_t>(b) * call.shape.num_query_heads + head) * call.shape.new_tokens + row;
    };

    for (int i = thread; i < Attention::kGroupRows * D / 8; i += 128)
    {
        const int row = i / (D / 8);
        const int chunk = i % (D / 8);
        const int index = first_index + row;
        const uint4 value = index < all_rows
            ? *reinterpret_cast<const uint4*>(static_cast<const T*>(call.query) + queryRow(index) * D + chunk * 8)
            : uint4{};
        *reinterpret_cast<uint4*>(
            shared.queries[group][chunk / 8] + row * kSwizzleRowBytes + (chunk % 8 ^ row % 8) * 16) = value;
    }
    fenceSharedForAsync();
    namedBarrier(1 + group, 128);

    // Row g and row g + 8 of this lane's warp.
    const int index[2] = {first_index + thread / 32 * 16 + lane / 4, first_index + thread / 32 * 16 + lane / 4 + 8};
    const int position[2] = {rows.first + index[0] % rows.rows, rows.first + index[1] % rows.rows};
    const float scale = call.config.scale * 1.4426950408889634f; // logits in base 2
    const int tiles = (attended.columns + kTile - 1) / kTile;
    // Columns before this one are visible to all rows.
    const int first_masked = attended.columns
        - (((rows.last >> call.block_k_log2) + 1 - ((rows.first + 1) >> call.block_k_log2)) << call.block_k_log2);

    float logits[kTile / 2];
    float output[D / 2] = {};
    uint32_t weights[kTile / 16][4];
    float largest[2] = {-INFINITY, -INFINITY};
    float sum[2] = {}; // this lane's share

    const uint64_t query_tile = tileDescriptor(shared.queries[group][0]);
    auto multiplyKeys = [&](int stage)
    {
        const uint64_t key_tile = tileDescriptor(shared.keys[stage][0]);
        fenceRegisters(logits);
        warpgroupArrive();
#pragma unroll
        for (int k = 0; k < D / 16; ++k)
        {
            multiplyTiles<T>(logits, advance(query_tile, k / 4 * Attention::kQueryBytes + k % 4 * 32),
                advance(key_tile, k / 4 * Attention::kTileBytes + k % 4 * 32), k > 0);
        }
        warpgroupCommit();
    };
    auto multiplyValues = [&](int stage)
    {
        const uint64_t value_tile = tileDescriptor(shared.values[stage][0], Attention::kTileBytes);
        fenceRegisters(output);
        warpgroupArrive();
#pragma unroll
        for (int k = 0; k < kTile / 16; ++k)
        {
            multiplyRegisters<T>(output, weights[k], advance(value_tile, k * 16 * kSwizzleRowBytes));
        }
        warpgroupCommit();
    };
    // Turn logits into weights, still as floats; returns in `decay` what earlier sums shrink by.
    auto softmax = [&](int tile, float(&decay)[2])
    {
        if ((tile + 1) * kTile > first_masked)
        {
#pragma unroll
            for (int n = 0; n < kTile / 8; ++n)
            {
                // Eight columns lie in one block; INT_MAX stays after every row.
                const int token = attended.token(tile * kTile + 8 * n);
#pragma unroll
                for (int i = 0; i < 4; ++i)
                {
                    const bool visible = token <= position[i / 2] - (lane % 4 * 2 + i % 2);
                    logits[4 * n + i] = visible ? logits[4 * n + i] : -INFINITY;
                }
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r)
        {
            float best = largest[r];
#pragma unroll
            for (int n = 0; n < kTile / 8; ++n)
            {
                best = fmaxf(best, fmaxf(logits[4 * n + 2 * r], logits[4 * n + 2 * r + 1]));
            }
            best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, 1));
            best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, 2));
            decay[r] = exp2f((largest[r] - best) * scale);
            largest[r] = best;
            sum[r] *= decay[r];
            const float base = best * scale;
#pragma unroll
            for (int n = 0; n < kTile / 8; ++n)
            {
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; ++i)
                {
                    logits[4 * n + i] = exp2f(fmaf(logits[4 * n + i], scale, -base));
                    sum[r] += logits[4 * n + i];
                }
            }
        }
    };
    auto packWeights = [&]
    {
#pragma unroll
        for (int k = 0; k < kTile / 16; ++k)
        {
#pragma unroll
            for (int i = 0; i < 4; ++i)
            {
                weights[k][i] = packPair<T>(logits[8 * k + 2 * i], logits[8 * k + 2 * i + 1]);
            }
        }
    };
    auto release = [&](uint64_t* barrier)
    {
        if (lane == 0)
        {
            arrive(barrier);
        }
    };

    float decay[2];
    waitBarrier(&shared.keys_full[0], 0);
    multiplyKeys(0);
    warpgroupWait<0>();
    fenceRegisters(logits);
    release(&shared.keys_empty[0]);
    softmax(0, decay);
    packWeights();
    const int last_tile = tiles - 1;
    for (int tile = 0; tile < last_tile; ++tile)
    {
        const int stage = tile % kStages;
        const int next = (tile + 1) % kStages;
        waitBarrier(&shared.keys_full[next], (tile + 1) / kStages % 2);
        multiplyKeys(next);
        waitBarrier(&shared.values_full[stage], tile / kStages % 2);
        multiplyValues(stage);
        warpgroupWait<1>();
        fenceRegisters(logits);
        release(&shared.keys_empty[next]);
        softmax(tile + 1, decay);
        warpgroupWait<0>();
        fenceRegisters(output);
        release(&shared.values_empty[stage]);
#pragma unroll
        for (int i = 0; i < D / 2; ++i)
        {
            output[i] *= decay[i % 4 / 2];
        }
        packWeights();
    }
    const int last_stage = last_tile % kStages;
    waitBarrier(&shared.values_full[last_stage], last_tile / kStages % 2);
    // Rows after the last token may hold anything, and 0 x NaN is NaN.
    const int block_k = call.config.block_k;
    const int valid = attended.columns - last_tile * kTile - (block_k - 1 - (rows.last & (block_k - 1)));
    for (int i = valid * 8 + thread; i < kTile * 8; i += 128)
    {
#pragma unroll
        for (int half = 0; half < Attention::kHalves; ++half)
        {
            *reinterpret_cast<uint4*>(shared.values[last_stage][half] + i * 16) = uint4{};
        }
    }
    fenceSharedForAsync();
    namedBarrier(1 + group, 128);
    multiplyValues(last_stage);
    warpgroupWait<0>();
    fenceRegisters(output);

#pragma unroll
    for (int r = 0; r < 2; ++r)
    {
        sum[r] += __shfl_xor_sync(kFullWarp, sum[r], 1);
        sum[r] += __shfl_xor_sync(kFullWarp, sum[r], 2);
        if (index[r] < all_rows)
        {
            T* to = static_cast<T*>(call.output) + queryRow(index[r]) * D + lane % 4 * 2;
            const float factor = 1.0f / sum[r];
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
            {
                storePair(to + 8 * n, output[4 * n + 2 * r] * factor, output[4 * n + 2 * r + 1] * factor);
            }
        }
    }
}

#endif // HIP_TRT_SM90A

template <typename T, int D, int Groups>
__global__ void __launch_bounds__(PrefillAttention<T, D, Groups>::kThreads, PrefillAttention<T, D, Groups>::kBlocksPerSm)
    prefillAttentionKernel(const __grid_constant__ Call call, const __grid_constant__ CUtensorMap key_map,
        const __grid_constant__ CUtensorMap value_map)
{
#ifdef HIP_TRT_SM90A
    using Attention = PrefillAttention<T, D, Groups>;
    auto& shared = *reinterpret_cast<typename Attention::Shared*>(
        dynamicShared() + (1024 - sharedAddress(dynamicShared()) % 1024) % 1024);
    const int row_tiles = rowTiles(call, Attention::kRows);
    const int row_tile = blockIdx.x % row_tiles;
    const int block = blockIdx.x / row_tiles;
    const int mask = blockIdx.y;
    const int b = blockIdx.z;
    const QueryBlock rows(call, b, block);
    if (row_tile * Attention::kRows >= call.heads_per_mask * rows.rows)
    {
        return;
    }
    const int64_t mask_row = static_cast<int64_t>(b) * call.mask_heads + mask;
    const AttendedTokens attended(call, rows, mask_row * call.query_blocks + block);

    if (threadIdx.x == 0)
    {
        for (int stage = 0; stage < Attention::kStages; ++stage)
        {
            initBarrier(&shared.keys_full[stage], 1);
            initBarrier(&shared.values_full[stage], 1);
            initBarrier(&shared.keys_empty[stage], 4 * Groups); // every warp that multiplies
            initBarrier(&shared.values_empty[stage], 4 * Groups);
        }
        publishBarriers();
        prefetchMap(&key_map);
        prefetchMap(&value_map);
    }
    __syncthreads();

    const int warpgroup = threadIdx.x / 128;
    if (warpgroup == Groups)
    {
        shrinkRegisters<Attention::kProducerRegisters>();
        if (threadIdx.x % 128 < kWarpSize)
        {
            const PagedRows cache(call, b, mask * call.heads_per_mask / call.heads_per_kv);
            copyTiles<T, D, Groups>(call, key_map, value_map, attended, cache, shared);
        }
    }
    else
    {
        growRegisters<Attention::kConsumerRegisters>();
        attendRows<T, D, Groups>(call, rows, attended, b, mask, warpgroup,
            row_tile * Attention::kRows + warpgroup * Attention::kGroupRows, shared);
    }
#endif
}

template <typename T, int D, int Groups>
cudaError_t launchPrefillAttention(
    const Call& call, const CUtensorMap& keys, const CUtensorMap& values, cudaStream_t stream)
{
    using Attention = PrefillAttention<T, D, Groups>;
    const unsigned blocks = static_cast<unsigned>(call.query_blocks) * rowTiles(call, Attention::kRows);
    return launch(prefillAttentionKernel<T, D, Groups>, dim3(blocks, call.mask_heads, call.shape.batch),
        Attention::kThreads, Attention::kSharedBytes, stream, call, keys, values);
}

template <typename T, int D>
cudaError_t attendPrefillSm90(const Call& call, cudaStream_t stream)
{
    CUtensorMap keys, values;
    if (!makePoolMap(&keys, call, call.present_key) || !makePoolMap(&values, call, call.present_value))
    {
        return cudaErrorNotSupported;
    }
    return rowTiles(call, 64) == 1 ? launchPrefillAttention<T, D, 1>(call, keys, values, stream)
                                   : launchPrefillAttention<T, D, 2>(call, keys, values, stream);
}

} // namespace hip_trt
