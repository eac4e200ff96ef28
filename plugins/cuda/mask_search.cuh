// The mask search, one thread block per query block and mask head: mirrors search, search_from and block_scores of
// hip_trt/reference/tree.py. Every warp scores its own candidates; the thread block keeps the best of each level.
#pragma once

#include "block_select.cuh"
#include "cached_rows.cuh"
#include "kernels.cuh"
#include "launch.cuh"
#include "plan.cuh"
#include "query_block.cuh"
#include "tree.cuh"
#include "warp_tile.cuh"

namespace hip_trt
{

// What is the same however nodes are scored. Scorer, which derives from this, adds
//   int queryCapacity(): sampled queries that are scored at once,
//   void loadQueries(int first): make those from `first` on ready; ends with a barrier,
//   void scoreNodes(const NodeList&, int level, bool accumulate): fill `scores`, as block_scores of tree.py; with
//       accumulate keep what is larger there.
template <typename Scorer>
struct MaskSearchSteps
{
    const Call& call;
    const int b;
    const int mask;
    const int block;
    const QueryBlock rows;
    const Tree tree;
    const PagedRows cache;
    const int warp;
    const int lane;
    const int warps;

    uint32_t* scores; // [candidate_capacity] ordered keys
    int* kept;        // [kept_capacity], the nodes to expand
    int* next_kept;   // likewise

    int sampled;           // sampled rows of one query head
    int sampled_first;     // the first of them, in the query block
    int total_queries;     // of all query heads of the mask head
    int first_loaded = -1; // the query that loadQueries made ready first; -1: none

    // `lists`: room for searchListBytes, in shared or global memory.
    __device__ MaskSearchSteps(const Call& call, int b, int mask, int block, char* lists)
        : call(call)
        , b(b)
        , mask(mask)
        , block(block)
        , rows(call, b, block)
        , tree{rows.sink, rows.window, call.config.branch, call.config.leaf_branch}
        , cache(call, b, mask * call.heads_per_mask / call.heads_per_kv)
        , warp(threadIdx.x / kWarpSize)
        , lane(threadIdx.x % kWarpSize)
        , warps(blockDim.x / kWarpSize)
    {
        scores = reinterpret_cast<uint32_t*>(lists);
        kept = reinterpret_cast<int*>(scores + call.candidate_capacity);
        next_kept = kept + call.kept_capacity;
        sampled = (rows.rows + call.config.stride_q - 1) / call.config.stride_q;
        sampled_first = (rows.rows - 1) % call.config.stride_q;
        total_queries = call.heads_per_mask * sampled;
    }

    __device__ __forceinline__ Scorer& self()
    {
        return static_cast<Scorer&>(*this);
    }

    __device__ void run()
    {
        const int64_t mask_row = static_cast<int64_t>(b) * call.mask_heads + mask;
        const int64_t search_row = mask_row * call.query_blocks + block;
        const int node_count = call.config.decode_mask_k >> call.block_k_log2;
        const int32_t* past_nodes = call.past_nodes + mask_row * node_count;
        // Present nodes are written by the first query block of a row.
        int32_t* present_nodes = block == 0 ? call.present_nodes + mask_row * node_count : nullptr;
        int32_t* chosen = call.chosen + search_row * call.budget;
        const bool decode = call.decode;

        if (rows.rows <= 0 || rows.contiguous)
        {
            const bool idle = call.query_lengths[b] == 0;
            writeNodes(present_nodes, idle ? past_nodes : nullptr, idle ? node_count : 0, node_count);
            const int count = rows.rows <= 0 || call.config.dense ? 0 : rows.window - rows.sink;
            for (int i = threadIdx.x; i < call.budget; i += blockDim.x)
            {
                chosen[i] = i < count ? rows.sink + i : -1;
            }
            return;
        }

        // A barrier too: present_nodes may be past_nodes.
        const bool reuse = __syncthreads_and(decode && call.refresh_mask[0] == 0 && past_nodes[0] >= 0);
        if (reuse || !decode)
        {
            writeNodes(present_nodes, past_nodes, reuse ? node_count : 0, node_count);
        }
        const int count = reuse && call.config.reuse_level == 0
            ? keepOccupied(past_nodes, node_count, 0, INT_MAX)
            : search(reuse ? past_nodes : nullptr, node_count, reuse || !decode ? nullptr : present_nodes);
        writeNodes(chosen, kept, count, call.budget);
        if (threadIdx.x == 0)
        {
            call.chosen_count[search_row] = count;
        }
    }

    // Search from level-1 nodes, or, without, from the top, writing the nodes kept at reuse_level. Leaves the chosen
    // blocks in `kept`; returns how many.
    __device__ __forceinline__ int search(const int32_t* past_nodes, int past_count, int32_t* present_nodes)
    {
        NodeList nodes;
        int level = 0;
        if (past_nodes != nullptr)
        {
            // The two newest level-1 nodes join; past nodes from there on are the same.
            const int end = tree.endNode(1);
            const int newest = max(tree.firstNode(1), end - 2);
            const int count = keepOccupied(past_nodes, past_count, 1, newest);
            if (threadIdx.x < end - newest)
            {
                kept[count + threadIdx.x] = newest + threadIdx.x;
            }
            __syncthreads();
            nodes = children(tree, kept, count + end - newest, 1);
        }
        else
        {
            level = tree.startLevel(call.budget);
            nodes = allNodes(tree, level);
            if (level < call.config.reuse_level)
            {
                writeNodes(present_nodes, nullptr, 0, call.budget);
            }
        }
        for (;; --level)
        {
            const int count = keepBest(nodes, level);
            if (level == call.config.reuse_level)
            {
                writeNodes(present_nodes, kept, count, call.budget);
            }
            if (level == 0)
            {
                return count;
            }
            nodes = children(tree, kept, count, level);
        }
    }

    // Score nodes and leave the best in `kept`, ascending; returns how many.
    __device__ __forceinline__ int keepBest(const NodeList& nodes, int level)
    {
        for (int first = 0; first < total_queries; first += self().queryCapacity())
        {
            if (first != first_loaded)
            {
                self().loadQueries(first);
            }
            self().scoreNodes(nodes, level, first > 0);
        }
        __syncthreads();
        int* best = next_kept;
        const int count = selectBest(
            scores, nodes.count, call.budget, [&](int index, int position) { best[position] = nodes[index]; });
        __syncthreads();
        next_kept = kept;
        kept = best;
        return count;
    }

    // Leave in `kept` the distinct nodes that hold a candidate and are below `end`, ascending; returns how many.
    __device__ int keepOccupied(const int32_t* nodes, int count, int level, int end)
    {
        __shared__ int warp_counts[kMaxSelectWarps];
        int* sorted = reinterpret_cast<int*>(scores);
        bool ascending = true;
        for (int i = threadIdx.x; i < count; i += blockDim.x)
        {
            sorted[i] = nodes[i];
            ascending &= i == 0 || nodes[i - 1] <= nodes[i] || nodes[i] < 0;
        }
        if (!__syncthreads_and(ascending))
        {
            sortAscending(sorted, count); // never so with nodes that a search kept
        }
        RunningRank kept_rank;
        for (int start = 0; start < count; start += blockDim.x)
        {
            const int i = start + threadIdx.x;
            const bool keep = i < count && sorted[i] < end && tree.occupied(sorted[i], level)
                && (i == 0 || sorted[i - 1] != sorted[i]);
            const int rank = kept_rank.next(keep, warp_counts);
            if (keep)
            {
                kept[rank] = sorted[i];
            }
        }
        __syncthreads();
        return kept_rank.before;
    }

    // Row of the query that stands at `index` among the mask head's sampled ones, counted in rows of D elements.
    __device__ int64_t queryRow(int index) const
    {
        const int head = mask * call.heads_per_mask + index / sampled;
        const int row = rows.first_row + sampled_first + index % sampled * call.config.stride_q;
        return (static_cast<int64_t>(b) * call.shape.num_query_heads + head) * call.shape.new_tokens + row;
    }

    // to[0 .. size) = from[0 .. count), then -1. Either may be the other; `to` may be nullptr.
    __device__ void writeNodes(int32_t* to, const int32_t* from, int count, int size)
    {
        for (int i = threadIdx.x; to != nullptr && i < size; i += blockDim.x)
        {
            to[i] = i < count ? from[i] : -1;
        }
    }
};

// Scores on the matrix units of every supported GPU, or in plain float arithmetic. Cached: keys come through call.caches.
template <typename T, int D, bool Cached>
struct MaskSearch : MaskSearchSteps<MaskSearch<T, D, Cached>>
{
    using Steps = MaskSearchSteps<MaskSearch>;
    using Steps::cache;
    using Steps::call;
    using Steps::lane;
    using Steps::scores;
    using Steps::total_queries;
    using Steps::tree;
    using Steps::warp;
    using Steps::warps;

    // Tokens that a warp scores at once, 16 per set of left rows.
    static constexpr int kLefts = sizeof(T) == 2 ? 2 : 1;
    static constexpr int kTokens = 16 * kLefts;
    static constexpr int kTileElements = kTokens * kTileStride<T, D>;

    T* queries;         // shared, [loaded_queries][kTileStride]
    T* tile;            // shared, this warp's [kTokens][kTileStride]
    int loaded_queries; // rows of `queries`

    __device__ MaskSearch(const Call& call, int b, int mask, int block, char* memory)
        : Steps(call, b, mask, block, listMemory(call, memory))
    {
        loaded_queries = searchQueryRows(call.config, call.shape);
        queries = reinterpret_cast<T*>(memory);
        tile = queries + loaded_queries * kTileStride<T, D> + warp * kTileElements;
    }

    // The lists follow the tiles, or stand in the workspace.
    static __device__ char* listMemory(const Call& call, char* memory)
    {
        const int rows = searchQueryRows(call.config, call.shape) + blockDim.x / kWarpSize * kTokens;
        return call.search_lists == nullptr
            ? memory + rows * kTileStride<T, D> * sizeof(T)
            : call.search_lists + blockIdx.x * searchListBytes(call.candidate_capacity, call.kept_capacity);
    }

    __device__ int queryCapacity() const
    {
        return loaded_queries;
    }

    // Fill `queries`, which stays as it is over all levels if all queries fit. Begins and ends with a barrier.
    __device__ __forceinline__ void loadQueries(int first)
    {
        __syncthreads();
        this->first_loaded = first;
        for (int start = 16 * warp; start < loaded_queries; start += 16 * warps)
        {
            // The last query again where there are no more: the largest score stays the same.
            const int index = min(first + start + lane % 16, total_queries - 1);
            copyRowsAsync<T, D, 16>(
                queries + start * kTileStride<T, D>, call.query, this->queryRow(index), call.row_bytes);
        }
        commitCopies();
        waitCopies<0>();
        __syncthreads();
    }

    // scores[i] = the largest q.k over `queries` and every stride_k-th token of node i's representative block; with
    // `accumulate` also over what scores[i] holds.
    __device__ __forceinline__ void scoreNodes(const NodeList& nodes, int level, bool accumulate)
    {
        const int tokens = call.config.block_k / call.config.stride_k; // scored of a block, a power of two
        const int tile_blocks = max(1, kTokens / tokens);              // nodes that share a tile
        const int tiles = max(1, tokens / kTokens);                    // of a node
        const int size = tree.size(level);
        const int query_tiles = min(loaded_queries, (total_queries + 7) & ~7) / 8;
        // This lane copies row `lane` of the tile; the pool row that it holds, -1 for none.
        auto poolRow = [&](int part)
        {
            const int token = part % tiles * kTokens + lane;
            const int node = part / tiles * tile_blocks + token / tokens;
            if (node >= nodes.count)
            {
                return static_cast<int64_t>(-1);
            }
            const int key_block = tree.representative(nodes[node], size);
            return cache.row(key_block * call.config.block_k + token % tokens * call.config.stride_k);
        };
        const int parts = (nodes.count + tile_blocks - 1) / tile_blocks * tiles;
        // A warp takes all tiles of its nodes, one after the other.
        auto nextPart = [&](int part) { return (part + 1) % tiles != 0 ? part + 1 : part + 1 + (warps - 1) * tiles; };
        auto copyTile = [&](int part)
        {
            if (part < parts)
            {
                if constexpr (Cached)
                {
                    const int64_t row = lane < kTokens ? poolRow(part) : -1;
                    copyRowsFromAsync<T, D, kTokens>(
                        tile, call.present_key, CachedRows(call.caches, true).offset(row), call.row_bytes);
                }
                else
                {
                    copyRowsAsync<T, D, kTokens>(tile, call.present_key, poolRow(part), call.row_bytes);
                }
            }
            commitCopies();
        };

        float best = -INFINITY; // of token `lane`, over the tiles of its node so far
        copyTile(warp * tiles);
        for (int part = warp * tiles; part < parts; part = nextPart(part))
        {
            waitCopies<0>();
            __syncwarp();
            LeftRows<T, D> keys[kLefts];
#pragma unroll
            for (int i = 0; i < kLefts; ++i)
            {
                keys[i].load(tile + 16 * i * kTileStride<T, D>);
            }
            if (LeftRows<T, D>::kInRegisters)
            {
                __syncwarp();
                copyTile(nextPart(part)); // while the products run
            }
            best = fmaxf(best, largestProducts(keys, query_tiles));
            if (!LeftRows<T, D>::kInRegisters)
            {
                __syncwarp();
                copyTile(nextPart(part));
            }
            if ((part + 1) % tiles == 0)
            {
                // Over the tokens of each node.
                for (int distance = 1; distance < tokens && distance < kTokens; distance *= 2)
                {
                    best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, distance));
                }
                const int node = part / tiles * tile_blocks + lane / tokens;
                if (lane < kTokens && lane % tokens == 0 && node < nodes.count)
                {
                    const uint32_t key = orderedKey(best);
                    scores[node] = accumulate ? max(scores[node], key) : key;
                }
                best = -INFINITY;
            }
        }
    }

    // Largest q.k of key row lane % kTokens over 8 * query_tiles queries.
    __device__ __forceinline__ float largestProducts(const LeftRows<T, D> (&keys)[kLefts], int query_tiles) const
    {
        float upper[kLefts], lower[kLefts]; // of key rows g and g + 8
#pragma unroll
        for (int i = 0; i < kLefts; ++i)
        {
            upper[i] = lower[i] = -INFINITY;
        }
        for (int n = 0; n < query_tiles; ++n)
        {
            float product[kLefts][4] = {};
            LeftRows<T, D>::template addProducts<kLefts>(
                product, keys, queries + 8 * n * kTileStride<T, D>);
#pragma unroll
            for (int i = 0; i < kLefts; ++i)
            {
                upper[i] = fmaxf(upper[i], fmaxf(product[i][0], product[i][1]));
                lower[i] = fmaxf(lower[i], fmaxf(product[i][2], product[i][3]));
            }
        }
        float largest = -INFINITY;
#pragma unroll
        for (int i = 0; i < kLefts; ++i)
        {
#pragma unroll
            for (int distance = 1; distance < 4; distance *= 2)
            {
                upper[i] = fmaxf(upper[i], __shfl_xor_sync(kFullWarp, upper[i], distance));
                lower[i] = fmaxf(lower[i], __shfl_xor_sync(kFullWarp, lower[i], distance));
            }
            const float from_upper = __shfl_sync(kFullWarp, upper[i], lane % 8 * 4);
            const float from_lower = __shfl_sync(kFullWarp, lower[i], lane % 8 * 4);
            if (lane % kTokens / 16 == i)
            {
                largest = lane % 16 < 8 ? from_upper : from_lower;
            }
        }
        return largest;
    }
};

template <typename T, int D, bool Cached>
__global__ void __launch_bounds__(kDecodeSearchThreads, 1) maskSearchKernel(const __grid_constant__ Call call)
{
    const int64_t searches = static_cast<int64_t>(call.shape.batch) * call.mask_heads * call.query_blocks;
    for (int64_t search = blockIdx.x; search < searches; search += gridDim.x)
    {
        const int block = static_cast<int>(search % call.query_blocks);
        const int row = static_cast<int>(search / call.query_blocks);
        MaskSearch<T, D, Cached>(call, row / call.mask_heads, row % call.mask_heads, block, dynamicShared()).run();
        __syncthreads();
    }
}

template <typename T, int D>
cudaError_t searchMasks(const Call& call, cudaStream_t stream)
{
    const int64_t searches = static_cast<int64_t>(call.shape.batch) * call.mask_heads * call.query_blocks;
    const int64_t blocks = call.search_lists == nullptr || searches < call.search_slots ? searches : call.search_slots;
    const int threads = call.decode ? kDecodeSearchThreads : kPrefillSearchThreads;
    const size_t rows = searchQueryRows(call.config, call.shape) + threads / kWarpSize * MaskSearch<T, D, false>::kTokens;
    const size_t lists
        = call.search_lists == nullptr ? searchListBytes(call.candidate_capacity, call.kept_capacity) : 0;
    const auto kernel = call.caches.empty() ? maskSearchKernel<T, D, false> : maskSearchKernel<T, D, true>;
    return launch(kernel, dim3(static_cast<unsigned>(blocks)), threads,
        rows * kTileStride<T, D> * sizeof(T) + lists, stream, call);
}

} // namespace hip_trt
