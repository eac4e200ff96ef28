// A decode step in one kernel: a cluster of thread blocks per sequence and mask head appends the new token, searches the
// mask and attends (compute capability 9.0 and later).
//
// The thread blocks of a cluster share every level of the search. Each scores its part of the nodes and stores the scores
// into the shared memory of all; each then finds the best nodes by itself, so one exchange a level is all they wait for.
// A block is attended by the thread block that scored it. The parts of the output travel the same way, once.
#pragma once

#include "block_cache_fill.cuh"
#include "decode_cluster_attention.cuh"
#include "decode_cluster_search.cuh"
#include "query_block.cuh"

namespace hip_trt
{

// Copy the new token's key and value to the pool.
template <typename T, int D>
__device__ __forceinline__ void appendToken(const Call& call, const DecodePlace& place, uint32_t row)
{
    constexpr int kChunks = D * sizeof(T) / 16;
    if (threadIdx.x < 2 * kChunks)
    {
        const bool is_key = threadIdx.x < kChunks;
        const int64_t from = static_cast<int64_t>(place.b) * call.shape.num_kv_heads + place.kv_head;
        const uint4* source = static_cast<const uint4*>(is_key ? call.key : call.value) + from * kChunks;
        uint4* target = static_cast<uint4*>(is_key ? call.present_key : call.present_value)
            + static_cast<uint64_t>(row) * kChunks;
        target[threadIdx.x % kChunks] = source[threadIdx.x % kChunks];
    }
}

// All chosen blocks of the last exchange, ascending, into list 2. Returns how many; ends with a barrier.
__device__ __forceinline__ int chooseBlocks(const DecodeCall& decode, const DecodeShared& shared, int parity)
{
    const LevelNodes nodes = *shared.lastNodes();
    uint32_t* const marks = shared.marks(parity);
#pragma unroll 1
    for (int i = threadIdx.x; i < decode.capacity / 32; i += kDecodeThreads)
    {
        marks[i] = 0;
    }
    __syncthreads();
    markBest(
        shared.keysAt(parity), nodes.count, Asked{0, 0, nodes.count}, decode.call.budget, shared.marksAt(parity));
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < nodes.count; i += kDecodeThreads)
    {
        if (getBit(marks, i))
        {
            shared.list(2)[membersBelow(marks, i)] = nodes[i];
        }
    }
    __syncthreads();
    return min(decode.call.budget, nodes.count);
}

// Bring the tables of slots into the L2 cache: lookups shall not go to memory one after the other.
__device__ __forceinline__ void prefetchSlots(const Call& call)
{
    constexpr int kLine = kPrefetchBytes / sizeof(int32_t);
    constexpr int kMost = 1 << 19; // entries; of a larger table a step needs too small a part
    const int heads = call.mask_heads;
    const int index = ((blockIdx.z * heads + blockIdx.y) * gridDim.x + blockIdx.x) * kDecodeThreads + threadIdx.x;
    const int stride = gridDim.z * heads * gridDim.x * kDecodeThreads * kLine;
    for (const HipTrtBlockCache* const cache : {&call.caches.keys, &call.caches.values})
    {
#pragma unroll 1
        for (int i = index * kLine; cache->blocks != 0 && cache->pool_blocks <= kMost && i < cache->pool_blocks; i += stride)
        {
            prefetchToL2(cache->slots + i);
        }
    }
}

template <typename T, int D, int HeadTiles, template <typename, int> typename Pools>
__global__ void __launch_bounds__(kDecodeThreads, HeadTiles == 1 ? 2 : 1)
    decodeKernel(const __grid_constant__ DecodeCall decode)
{
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    const Call& call = decode.call;
    const HipTrtConfig& config = call.config;
    const int heads = call.heads_per_mask, budget = call.budget;
    const DecodePlace place{static_cast<int>(blockIdx.x), decode.cluster_log2, static_cast<int>(blockIdx.y),
        static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y) * heads / call.heads_per_kv};
    const DecodeShared shared{decode};
    const int cluster = 1 << place.cluster_log2;

    if constexpr (Pools<T, D>::kOffloaded)
    {
        if (place.mask >= call.mask_heads) // no mask head: beside them
        {
            const int each = gridDim.z * gridDim.x, clusters = gridDim.y - call.mask_heads;
            const int part = (place.mask - call.mask_heads) * each + place.b * static_cast<int>(gridDim.x) + place.rank;
            fillCaches(decode.fill, shared.caches(), part, clusters * each);
            return;
        }
    }
    if (threadIdx.x == 0)
    {
        initBarrier(shared.scoresReady(0), 1);
        initBarrier(shared.scoresReady(1), 1);
        initBarrier(shared.resultsReady(), 1);
        publishBarriers();
        arriveExpectBytes(shared.resultsReady(), heads * (D * sizeof(float) + cluster * sizeof(float2)));
    }
    clusterArrive();
#pragma unroll 1
    for (int i = threadIdx.x; i < decode.capacity / 32; i += kDecodeThreads)
    {
        shared.marks(0)[i] = 0;
    }

    const int64_t list = (static_cast<int64_t>(place.b) * call.mask_heads + place.mask) * budget;
    const int32_t* global_table = call.page_table + static_cast<int64_t>(place.b) * call.shape.pages_per_sequence;
#pragma unroll 4
    for (int i = threadIdx.x; i < decode.table_entries; i += kDecodeThreads)
    {
        copyAsync4(shared.table() + i, global_table + i);
    }
    if (decode.table_entries == 0)
    {
        // Too large to copy: lookups shall at least not go to memory one after the other.
        constexpr int kLine = kPrefetchBytes / sizeof(int32_t);
#pragma unroll 1
        for (int i = place.dealt(threadIdx.x) * kLine; i < call.shape.pages_per_sequence;
             i += kDecodeThreads * cluster * kLine)
        {
            prefetchToL2(global_table + i);
        }
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < budget; i += kDecodeThreads)
    {
        copyAsync4(shared.list(0) + i, call.past_nodes + list + i);
    }
    const int first_head = place.mask * heads;
    if (warpIndex() == 0)
    {
        const T* const queries = static_cast<const T*>(call.query)
            + (static_cast<int64_t>(place.b) * call.shape.num_query_heads + first_head) * D;
        StagedTile<T, D>::copyLines(
            reinterpret_cast<T*>(shared.queries()), heads, [&](int line) { return queries + line * D; });
    }
    commitCopies();
    if constexpr (Pools<T, D>::kOffloaded)
    {
        openCaches(shared.caches(), call.caches, kWarpSize, 2 * kWarpSize); // not by those that load what all wait for
        prefetchSlots(call);
    }
    const QueryBlock block(call, place.b, 0);
    const bool refresh = *call.refresh_mask != 0;
    waitCopies<0>();
    __syncthreads();
    clusterWait();

    if (block.rows <= 0)
    {
        constexpr int kChunks = D * sizeof(T) / sizeof(uint4);
        uint4* const output = static_cast<uint4*>(call.output)
            + (static_cast<int64_t>(place.b) * call.shape.num_query_heads + first_head) * kChunks;
#pragma unroll 1
        for (int i = threadIdx.x; place.rank == 0 && i < heads * kChunks; i += kDecodeThreads)
        {
            output[i] = make_uint4(0, 0, 0, 0);
        }
#pragma unroll 1
        for (int i = threadIdx.x; place.rank == 0 && i < budget; i += kDecodeThreads)
        {
            call.present_nodes[list + i] = shared.list(0)[i];
            if (call.chosen_blocks != nullptr)
            {
                call.chosen_blocks[list + i] = -1;
            }
        }
        return;
    }

    const PoolRows rows{decode.table_entries > 0 ? shared.table() : global_table, call.shape.num_pages, decode.page_size,
        call.shape.num_kv_heads, place.kv_head};
    const uint32_t new_row = rows(block.last);
    const bool appends = place.rank == 0 && first_head % call.heads_per_kv == 0 && rows.holds(block.last);
    if (appends)
    {
        appendToken<T, D>(call, place, new_row);
    }
    const Pools<T, D> pools(decode, shared);

    // Chosen blocks: all of list 2, if reused as they are; if searched, the marked ones of this thread block's share of
    // the last nodes.
    int listed_count = 0, marked_count = 0;
    int searched = -1; // parity of the last exchange's keys and marks
    const bool reuse = !block.contiguous && !refresh && shared.list(0)[0] >= 0;
    const Tree tree{block.sink, block.window, config.branch, config.leaf_branch};
    const auto firstNode = [&](int level) { return decode.level_size[level].divide(tree.first); };
    const auto endNode = [&](int level) { return decode.level_size[level].divide(tree.last - 1) + 1; };
    const auto keepNodes = [&](auto node) {
#pragma unroll 1
        for (int i = threadIdx.x; place.rank == 0 && i < budget; i += kDecodeThreads)
        {
            call.present_nodes[list + i] = node(i);
        }
    };

    if (reuse || block.contiguous)
    {
        keepNodes([&](int i) { return reuse ? shared.list(0)[i] : -1; });
    }
    if (reuse && config.reuse_level == 0)
    {
        listed_count = sortDistinct(
            shared.list(0), budget, tree.first, tree.last, shared.list(1), shared.list(2));
    }
    else if (!block.contiguous)
    {
        const auto childrenOf = [&](const int* parents, int count, int level) {
            const int width = tree.width(level);
            const int before = max(0, firstNode(level - 1) - parents[0] * width);
            const int after = max(0, (parents[count - 1] + 1) * width - endNode(level - 1));
            return LevelNodes{parents, width, level == 1 ? decode.leaf_branch_reciprocal : decode.branch_reciprocal,
                before, count * width - before - after};
        };
        LevelNodes nodes;
        int level = 0;
        if (reuse)
        {
            const int count = addNewestNodes(
                shared.list(0), budget, firstNode(1), endNode(1), shared.list(2), shared.list(1));
            nodes = childrenOf(shared.list(1), count, 1);
        }
        else
        {
            while (endNode(level) - firstNode(level) > budget * (level == 0 ? config.leaf_branch : config.branch))
            {
                ++level;
            }
            if (level < config.reuse_level)
            {
                keepNodes([](int) { return -1; });
            }
            nodes = LevelNodes{nullptr, 0, 0, firstNode(level), endNode(level) - firstNode(level)};
        }
        for (int exchange = 0;; ++exchange, --level)
        {
            const int parity = exchange & 1;
            constexpr int kPadding = 3; // zeros after the scores, to a multiple of 4, that come as scores do
            if (threadIdx.x == 0)
            {
                arriveExpectBytes(shared.scoresReady(parity), (nodes.count + kPadding) * sizeof(uint32_t));
            }
            if (threadIdx.x < kPadding)
            {
                const uint32_t address = sharedAddress(shared.keys(parity) + nodes.count + threadIdx.x);
                storeAsync(peerAddress(address, place.rank), 0,
                    peerAddress(sharedAddress(shared.scoresReady(parity)), place.rank));
            }
            scoreNodes<T, D, HeadTiles>(
                decode, place, shared, tree, rows, pools, nodes, decode.level_size[level].divisor, parity);
            waitBarrier(shared.scoresReady(parity), exchange >> 1 & 1);
            const Asked asked = level == 0 ? Asked{place.rank, place.cluster_log2, place.share(nodes.count)}
                                           : Asked{0, 0, nodes.count};
            const uint32_t* const marks = shared.marks(parity);
            markBest(shared.keysAt(parity), nodes.count, asked, budget, shared.marksAt(parity));
            if (threadIdx.x == 0)
            {
                *shared.lastNodes() = nodes; // registers are scarce in what follows
            }
            __syncthreads();
            if (level == 0)
            {
                searched = parity;
                marked_count = membersBelow(marks, asked.count);
                break;
            }
            int* const kept = shared.list(parity); // the list before is in use until the next barrier
#pragma unroll 1
            for (int i = threadIdx.x; i < nodes.count; i += kDecodeThreads)
            {
                if (getBit(marks, i))
                {
                    kept[membersBelow(marks, i)] = nodes[i];
                }
            }
#pragma unroll 1
            for (int i = threadIdx.x; i < decode.capacity / 32; i += kDecodeThreads)
            {
                shared.marks(parity ^ 1)[i] = 0;
            }
            __syncthreads();
            if (level == config.reuse_level)
            {
                keepNodes([&](int i) { return kept[i]; });
            }
            nodes = childrenOf(kept, budget, level);
        }
    }

    const auto chosen = [&](int index) {
        return searched < 0 ? shared.list(2)[place.dealt(index)]
                            : (*shared.lastNodes())[place.dealt(memberAt(shared.marks(searched), index))];
    };
    const int last_block = block.last >> call.block_k_log2;
    AttendedBlocks<decltype(chosen)> attended{place, block.sink, block.window, 0, chosen, 0};
    if (block.contiguous)
    {
        attended.sink = attended.window = last_block + 1;
    }
    attended.fixed = place.share(attended.sink + last_block + 1 - attended.window);
    attended.count = attended.fixed + (searched < 0 ? place.share(listed_count) : marked_count);
    const int warps = attendBlocks<T, D, HeadTiles>(decode, place, shared, rows, pools, attended, block.last);
    __syncthreads();
    sendResults<D>(decode, place, shared, warps);

    // While the results travel: copies of the new token's block, and what few callers ask for.
    if (appends)
    {
        const int64_t input = (static_cast<int64_t>(place.b) * call.shape.num_kv_heads + place.kv_head) * D;
        pools.append(new_row, static_cast<const T*>(call.key) + input, static_cast<const T*>(call.value) + input);
    }
    if constexpr (Pools<T, D>::kOffloaded)
    {
        reportEvents(shared.caches(), call.caches.counters); // all has been looked up
    }
    const bool keep_chosen = searched >= 0 && !reuse && config.reuse_level == 0;
    if (place.rank == 0 && (keep_chosen || call.chosen_blocks != nullptr))
    {
        int count = listed_count;
        if (searched >= 0)
        {
            count = chooseBlocks(decode, shared, searched);
        }
        else if (block.contiguous)
        {
            count = config.dense ? 0 : block.window - block.sink;
        }
#pragma unroll 1
        for (int i = threadIdx.x; i < budget; i += kDecodeThreads)
        {
            const int chosen_block = i >= count ? -1 : block.contiguous ? block.sink + i : shared.list(2)[i];
            if (keep_chosen)
            {
                call.present_nodes[list + i] = chosen_block;
            }
            if (call.chosen_blocks != nullptr)
            {
                call.chosen_blocks[list + i] = chosen_block;
            }
        }
    }

    waitBarrier(shared.resultsReady(), 0);
    if (cluster > 4)
    {
        writeOutput<T, D, 16>(decode, place, shared);
    }
    else
    {
        writeOutput<T, D, 4>(decode, place, shared);
    }
#endif
}

template <typename T, template <typename, int> typename Pools>
DecodeKernel decodeKernelOn(int head_dim, int heads_per_mask)
{
    const bool wide = heads_per_mask > kHeadTile;
    if (head_dim == 64)
    {
        return wide ? decodeKernel<T, 64, 2, Pools> : decodeKernel<T, 64, 1, Pools>;
    }
    return wide ? decodeKernel<T, 128, 2, Pools> : decodeKernel<T, 128, 1, Pools>;
}

} // namespace hip_trt
