// Attention over sink, chosen and window blocks: mirrors hip_trt/reference/attention.py, with the softmax computed
// online, tile by tile. The query heads that share a mask form one matrix with the rows of the query block, so that a
// tile of keys and values serves them all.
#pragma once

#include "cached_rows.cuh"
#include "kernels.cuh"
#include "launch.cuh"
#include "plan.cuh"
#include "query_block.cuh"
#include "warp_tile.cuh"

#include <limits.h>

namespace hip_trt
{

// The attended tokens of one query block, as columns 0, 1, 2, ... in ascending order.
struct AttendedTokens
{
    const int32_t* chosen;
    int chosen_end; // sink and chosen blocks together
    int sink, window;
    bool contiguous;
    int block_k_log2;
    int last; // position of the query block's last row
    int columns;

    __device__ AttendedTokens(const Call& call, const QueryBlock& rows, int64_t search_row)
        : chosen(call.chosen + search_row * call.budget)
        , sink(rows.sink)
        , window(rows.window)
        , contiguous(rows.contiguous)
        , block_k_log2(call.block_k_log2)
        , last(rows.last)
    {
        chosen_end = contiguous ? window : sink + call.chosen_count[search_row];
        columns = (chosen_end + (last >> block_k_log2) + 1 - window) << block_k_log2;
    }

    // The token of a column; INT_MAX, which is after every row, where there is none.
    __device__ int token(int column) const
    {
        const int index = column >> block_k_log2;
        const int block = contiguous || index < sink ? index
            : index < chosen_end                     ? chosen[index - sink]
                                                     : index - chosen_end + window;
        const int token = (block << block_k_log2) + (column & ((1 << block_k_log2) - 1));
        return column < columns && token <= last ? token : INT_MAX;
    }
};

// A thread block of Warps warps attends 16 rows per warp, TileTokens tokens at a time, two tiles in flight.
template <typename T, int D, int Warps>
struct SparseAttention
{
    static constexpr int kRows = 16 * Warps;
    static constexpr int kTileTokens = sizeof(T) == 4 ? 16 : Warps == 1 ? 32 : 64;
    static constexpr int kWarpTokens = kTileTokens / Warps; // that one warp copies
    static constexpr int kStride = kTileStride<T, D>;
    static constexpr int kStages = 2;

    struct Shared
    {
        T queries[kRows * kStride];
        T keys[kStages][kTileTokens * kStride];
        T values[kStages][kTileTokens * kStride];
        int tokens[kStages][kTileTokens];
    };
    static_assert(sizeof(Shared) <= kMaxSharedBytes, "too much for some GPU");

    // A softmax under way, for row g (0) and row g + 8 (1) of the warp, in the layout of warp_tile.cuh.
    struct State
    {
        float output[D / 8][4] = {};
        float largest[2] = {-INFINITY, -INFINITY}; // logit, base 2
        float sum[2] = {};                         // of weights, this lane's share
    };

    // Fold a tile in. `positions`: of the two rows.
    static __device__ __forceinline__ void attendTile(State& state, const LeftRows<T, D> (&queries)[1], const T* keys,
        const T* values, const int* tokens, const int (&positions)[2], float scale)
    {
        constexpr int kTiles = kTileTokens / 8;
        const int lane = threadIdx.x % kWarpSize;
        float weight[kTiles][4] = {};
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
        {
            LeftRows<T, D>::template addProducts<1>(
                reinterpret_cast<float(&)[1][4]>(weight[n]), queries, keys + 8 * n * kStride);
        }
        float largest[2] = {state.largest[0], state.largest[1]};
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
        {
#pragma unroll
            for (int i = 0; i < 4; ++i)
            {
                const bool visible = tokens[8 * n + lane % 4 * 2 + i % 2] <= positions[i / 2];
                weight[n][i] = visible ? weight[n][i] * scale : -INFINITY;
                largest[i / 2] = fmaxf(largest[i / 2], weight[n][i]);
            }
        }
        float decay[2], base[2];
#pragma unroll
        for (int row = 0; row < 2; ++row)
        {
            largest[row] = fmaxf(largest[row], __shfl_xor_sync(kFullWarp, largest[row], 1));
            largest[row] = fmaxf(largest[row], __shfl_xor_sync(kFullWarp, largest[row], 2));
            base[row] = largest[row] == -INFINITY ? 0.0f : largest[row]; // nothing visible yet
            decay[row] = exp2f(state.largest[row] - base[row]);
            state.largest[row] = largest[row];
            state.sum[row] *= decay[row];
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
        {
#pragma unroll
            for (int i = 0; i < 4; ++i)
            {
                weight[n][i] = exp2f(weight[n][i] - base[i / 2]);
                state.sum[i / 2] += weight[n][i];
            }
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
        {
#pragma unroll
            for (int i = 0; i < 4; ++i)
            {
                state.output[n][i] *= decay[i / 2];
            }
        }
        WeightedValues<T, D, kTiles>::add(state.output, weight, values);
    }
};

template <typename T>
__device__ __forceinline__ void storePair(T* to, float low, float high)
{
    *reinterpret_cast<uint32_t*>(to) = packPair<T>(low, high);
}

template <>
__device__ __forceinline__ void storePair<float>(float* to, float low, float high)
{
    *reinterpret_cast<float2*>(to) = make_float2(low, high);
}

// Thread blocks that share the rows of a query block.
inline __host__ __device__ int rowTiles(const Call& call, int rows_per_thread_block)
{
    const int rows = call.config.block_q < call.shape.new_tokens ? call.config.block_q : call.shape.new_tokens;
    return (call.heads_per_mask * rows + rows_per_thread_block - 1) / rows_per_thread_block;
}

// Cached: keys and values come through call.caches.
template <typename T, int D, int Warps, bool Cached>
__global__ void __launch_bounds__(Warps* kWarpSize, 1) sparseAttentionKernel(const __grid_constant__ Call call)
{
    using Attention = SparseAttention<T, D, Warps>;
    auto& shared = *reinterpret_cast<typename Attention::Shared*>(dynamicShared());
    const int row_tiles = rowTiles(call, Attention::kRows);
    const int split = blockIdx.x % call.splits;
    const int row_tile = blockIdx.x / call.splits % row_tiles;
    const int block = blockIdx.x / call.splits / row_tiles;
    const int mask = blockIdx.y;
    const int b = blockIdx.z;
    const int warp = threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;

    const QueryBlock rows(call, b, block);
    const int first_index = row_tile * Attention::kRows + warp * 16; // of this warp's rows, among all heads' rows
    const int all_rows = call.heads_per_mask * rows.rows;
    if (row_tile * Attention::kRows >= all_rows)
    {
        return;
    }
    // Row of a tensor [B, Hq, S, D] that stands at `index`; -1 for none.
    auto queryRow = [&](int index) -> int64_t
    {
        const int head = mask * call.heads_per_mask + index / rows.rows;
        const int row = rows.first_row + index % rows.rows;
        return index < all_rows
            ? (static_cast<int64_t>(b) * call.shape.num_query_heads + head) * call.shape.new_tokens + row
            : -1;
    };

    const PagedRows cache(call, b, mask * call.heads_per_mask / call.heads_per_kv);
    const int64_t mask_row = static_cast<int64_t>(b) * call.mask_heads + mask;
    const AttendedTokens attended(call, rows, mask_row * call.query_blocks + block);
    const int all_tiles = (attended.columns + Attention::kTileTokens - 1) / Attention::kTileTokens;
    const int split_tiles = (all_tiles + call.splits - 1) / call.splits;
    const int first_tile = split * split_tiles;
    const int end_tile = min(first_tile + split_tiles, all_tiles);

    // Each warp copies its share of a tile: lane i the i-th row of it, found one tile ahead.
    const int column = warp * Attention::kWarpTokens + lane;
    int next_token;
    int64_t next_key, next_value; // bytes from the pool's beginning
    auto locate = [&](int tile)
    {
        next_token = lane < Attention::kWarpTokens && tile < end_tile
            ? attended.token(tile * Attention::kTileTokens + column)
            : INT_MAX;
        const int64_t row = next_token == INT_MAX ? -1 : cache.row(next_token);
        if constexpr (Cached)
        {
            next_key = CachedRows(call.caches, true).offset(row);
            next_value = CachedRows(call.caches, false).offset(row);
        }
        else
        {
            next_key = next_value = row < 0 ? kNoRow : row * call.row_bytes;
        }
    };
    auto copyTile = [&](int tile)
    {
        if (tile < end_tile)
        {
            const int stage = tile % Attention::kStages;
            const int first = warp * Attention::kWarpTokens * Attention::kStride;
            copyRowsFromAsync<T, D, Attention::kWarpTokens>(
                shared.keys[stage] + first, call.present_key, next_key, call.row_bytes);
            copyRowsFromAsync<T, D, Attention::kWarpTokens>(
                shared.values[stage] + first, call.present_value, next_value, call.row_bytes);
            if (lane < Attention::kWarpTokens)
            {
                shared.tokens[stage][column] = next_token;
            }
        }
        commitCopies();
    };

    T* const warp_queries = shared.queries + warp * 16 * Attention::kStride;
    copyRowsAsync<T, D, 16>(warp_queries, call.query, queryRow(first_index + lane % 16), call.row_bytes);
    commitCopies();
    locate(first_tile);
    copyTile(first_tile);
    locate(first_tile + 1);
    waitCopies<1>();
    __syncwarp();
    LeftRows<T, D> queries[1];
    queries[0].load(warp_queries);

    const int index[2] = {first_index + lane / 4, first_index + lane / 4 + 8};
    const int positions[2] = {rows.first + index[0] % rows.rows, rows.first + index[1] % rows.rows};
    const float scale = call.config.scale * 1.4426950408889634f; // logits in base 2
    typename Attention::State state;
    for (int tile = first_tile; tile < end_tile; ++tile)
    {
        copyTile(tile + 1);
        locate(tile + 2);
        waitCopies<1>();
        __syncthreads();
        const int stage = tile % Attention::kStages;
        Attention::attendTile(state, queries, shared.keys[stage], shared.values[stage], shared.tokens[stage],
            positions, scale);
        __syncthreads();
    }

#pragma unroll
    for (int r = 0; r < 2; ++r)
    {
        float sum = state.sum[r];
        sum += __shfl_xor_sync(kFullWarp, sum, 1);
        sum += __shfl_xor_sync(kFullWarp, sum, 2);
        const int64_t row = queryRow(index[r]);
        if (row < 0)
        {
            continue;
        }
        const int head_dim = call.shape.head_dim;
        const int64_t partial = row * call.splits + split;
        if (call.splits > 1 && lane % 4 == 0)
        {
            call.partial_state[partial] = make_float2(state.largest[r], sum);
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
        {
            const int d = 8 * n + lane % 4 * 2;
            const float low = state.output[n][2 * r];
            const float high = state.output[n][2 * r + 1];
            if (d >= head_dim)
            {
                break;
            }
            if (call.splits == 1)
            {
                storePair(static_cast<T*>(call.output) + row * head_dim + d, low / sum, high / sum);
            }
            else if (first_tile < end_tile)
            {
                storePair(call.partial_output + partial * head_dim + d, low, high);
            }
        }
    }
}

// The output of rows whose tokens were split: one thread block per row, one thread per pair of elements.
template <typename T>
__global__ void __launch_bounds__(kLargeHeadDim / 2) combineKernel(const __grid_constant__ Call call)
{
    const int64_t row = blockIdx.x;
    const int64_t head_rows = static_cast<int64_t>(call.shape.num_query_heads) * call.shape.new_tokens;
    const int d = threadIdx.x * 2;
    if (row % call.shape.new_tokens >= call.query_lengths[row / head_rows] || d >= call.shape.head_dim)
    {
        return;
    }
    const float2* state = call.partial_state + row * call.splits;
    float largest = -INFINITY;
    for (int split = 0; split < call.splits; ++split)
    {
        largest = fmaxf(largest, state[split].x);
    }
    float sum = 0.0f, low = 0.0f, high = 0.0f;
    for (int split = 0; split < call.splits; ++split)
    {
        if (state[split].x > -INFINITY) // else it attended to nothing and wrote no output
        {
            const float weight = exp2f(state[split].x - largest);
            const float* partial = call.partial_output + (row * call.splits + split) * call.shape.head_dim + d;
            sum += weight * state[split].y;
            low += weight * partial[0];
            high += weight * partial[1];
        }
    }
    storePair(static_cast<T*>(call.output) + row * call.shape.head_dim + d, low / sum, high / sum);
}

template <typename T, int D, int Warps>
cudaError_t launchAttention(const Call& call, cudaStream_t stream)
{
    using Attention = SparseAttention<T, D, Warps>;
    const unsigned blocks = static_cast<unsigned>(call.query_blocks) * rowTiles(call, Attention::kRows) * call.splits;
    auto kernel = sparseAttentionKernel<T, D, Warps, false>;
    if constexpr (Warps == 1) // single-token calls have no more rows
    {
        kernel = call.caches.empty() ? kernel : sparseAttentionKernel<T, D, Warps, true>;
    }
    return launch(kernel, dim3(blocks, call.mask_heads, call.shape.batch),
        Warps * kWarpSize, sizeof(typename Attention::Shared), stream, call);
}

template <typename T, int D>
cudaError_t attend(const Call& call, cudaStream_t stream)
{
    // One warp is enough for the few rows of a decode step; more would compute on padding.
    const cudaError_t error
        = rowTiles(call, 16) == 1 ? launchAttention<T, D, 1>(call, stream) : launchAttention<T, D, 4>(call, stream);
    if (error != cudaSuccess || call.splits == 1)
    {
        return error;
    }
    const int64_t rows = static_cast<int64_t>(call.shape.batch) * call.shape.num_query_heads * call.shape.new_tokens;
    return launch(combineKernel<T>, dim3(static_cast<unsigned>(rows)), kLargeHeadDim / 2, 0, stream, call);
}

} // namespace hip_trt
