// The search of the decode kernel: scores, exchanged within the cluster, and the nodes to start from.
#pragma once

#include "decode_cluster_pools.cuh"
#include "decode_cluster_select.cuh"
#include "tree.cuh"

namespace hip_trt
{

// Score this thread block's share of the nodes, and store the scores into keys(parity) of every thread block.
template <typename T, int D, int HeadTiles, typename Pools>
__device__ __forceinline__ void scoreNodes(const DecodeCall& decode, const DecodePlace& place, const DecodeShared& shared,
    const Tree& tree, const PoolRows& rows, const Pools& pools, const LevelNodes& nodes, int blocks_per_node, int parity)
{
    constexpr int kWarps = kDecodeThreads / kWarpSize;
    constexpr int kParts = 4; // of 8 rows, that a warp loads before it uses the first
    constexpr int kBatchLog2 = 5;
    const int warp = warpIndex(), lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
    // A batch holds several nodes, or a node several batches.
    const int rows_log2 = decode.call.block_k_log2;
    const int nodes_log2 = max(0, kBatchLog2 - rows_log2), batches_log2 = max(0, rows_log2 - kBatchLog2);
    const int own = place.share(nodes.count);
    const int groups = (own + (1 << nodes_log2) - 1) >> nodes_log2;
    // Which node of the batch a lane ends up with: lane bit 0 tells the upper rows from the lower, bit 1 odd parts from
    // even ones.
    const int scored = (nodes_log2 == 2 ? lane % 2 * 2 + lane / 2 % 2 : lane) & ((1 << nodes_log2) - 1);
    const int heads = decode.call.heads_per_mask;
    const QueryOperand<T, D, HeadTiles> query(reinterpret_cast<const T*>(shared.queries()));

    const auto firstOf = [&](int batch) { return (warp + kWarps * (batch >> batches_log2)) << nodes_log2; };
    // The nodes of this warp are numbered as its batches take them, and looked up thirty-two at a time, one by each lane.
    const auto numberOf = [&](int batch) { return (batch >> batches_log2) << nodes_log2; };
    const auto lookUp = [&](int number) {
        const int mine = number + lane, in_batch = mine & ((1 << nodes_log2) - 1);
        const int node = ((warp + kWarps * (mine >> nodes_log2)) << nodes_log2) + in_batch;
        return pools.findKeys(rows(tree.representative(nodes[place.dealt(min(node, own - 1))], blocks_per_node) << rows_log2),
            node < own, lane - in_batch);
    };
    // Line i of the batch, of 32.
    const auto lineAt = [&](int batch, typename Pools::Block block, int i) {
        return pools.keyRow(block, (numberOf(batch) + (i >> rows_log2)) % kWarpSize,
            ((batch << kBatchLog2) + i) & ((1 << rows_log2) - 1));
    };
    const int batches = (groups - warp + kWarps - 1) / kWarps << batches_log2;

    // Registers hold one batch; meanwhile the next one can come as far as the L2 cache. With few batches, what that costs
    // in instructions is not worth it. From host memory nothing is fetched that may not be needed.
    const bool look_ahead = !Pools::kOffloaded && batches > 4;

    float carried = -INFINITY;
    typename Pools::Block block{};
#pragma unroll 1
    for (int batch = 0; batch < batches; ++batch)
    {
        const int first = firstOf(batch);
        const bool looks_up = numberOf(batch) % kWarpSize == 0 && (batch & ((1 << batches_log2) - 1)) == 0;
        if (looks_up)
        {
            block = lookUp(numberOf(batch));
        }
        if (look_ahead && batch + 1 < batches && numberOf(batch + 1) / kWarpSize == numberOf(batch) / kWarpSize)
        {
            const T* const line = lineAt(batch + 1, block, lane);
#pragma unroll
            for (int i = 0; i < D; i += kPrefetchBytes / static_cast<int>(sizeof(T)))
            {
                prefetchToL2(line + i);
            }
        }
        uint4 keys[kParts][D / 32];
#pragma unroll
        for (int part = 0; part < kParts; ++part)
        {
            const T* const source = lineAt(batch, block, 8 * part + g) + t * 8;
#pragma unroll
            for (int j = 0; j < D / 32; ++j)
            {
                keys[part][j] = Pools::load(source + 32 * j);
            }
        }
        if constexpr (Pools::kOffloaded)
        {
            if (looks_up)
            {
                pools.noteKeys();
            }
            if (pools.keysLand())
            {
#pragma unroll
                for (int part = 0; part < kParts; ++part)
                {
                    pools.landKey((numberOf(batch) + (8 * part >> rows_log2)) % kWarpSize,
                        ((batch << kBatchLog2) + 8 * part + g) & ((1 << rows_log2) - 1), keys[part]);
                }
            }
        }
        float best[kParts];
#pragma unroll
        for (int part = 0; part < kParts; ++part)
        {
            float product[HeadTiles][2];
            query.multiply(product, keys[part]);
            best[part] = -INFINITY;
#pragma unroll
            for (int h = 0; h < HeadTiles; ++h)
            {
#pragma unroll
                for (int e = 0; e < 2; ++e)
                {
                    best[part] = fmaxf(best[part], h * kHeadTile + 2 * t + e < heads ? product[h][e] : -INFINITY);
                }
            }
        }
        // Reduce the four numbers over the warp at once: lanes of bit 0 go on with the upper rows, of those the ones of
        // bit 1 with the odd part.
        float upper[2];
#pragma unroll
        for (int odd = 0; odd < 2; ++odd)
        {
            const float sent = lane & 1 ? best[odd] : best[2 + odd];
            upper[odd] = fmaxf(lane & 1 ? best[2 + odd] : best[odd], __shfl_xor_sync(kFullWarp, sent, 1));
        }
        const float sent = lane & 2 ? upper[0] : upper[1];
        float score = fmaxf(lane & 2 ? upper[1] : upper[0], __shfl_xor_sync(kFullWarp, sent, 2));
        score = maxOverKeys(score);
        if (nodes_log2 < 2) // even and odd parts are of one node
        {
            score = fmaxf(score, __shfl_xor_sync(kFullWarp, score, 2));
        }
        if (nodes_log2 < 1) // so are upper and lower rows
        {
            score = fmaxf(score, __shfl_xor_sync(kFullWarp, score, 1));
            score = fmaxf(score, carried);
            const bool last = (batch + 1 & ((1 << batches_log2) - 1)) == 0;
            carried = last ? -INFINITY : score;
            if (!last)
            {
                continue;
            }
        }
        if (first + scored < own)
        {
            const uint32_t key = max(1u, orderedKey(score));
            const uint32_t address = sharedAddress(shared.keys(parity) + place.dealt(first + scored));
            const uint32_t ready = sharedAddress(shared.scoresReady(parity));
#pragma unroll 1
            for (int peer = lane >> nodes_log2; peer < 1 << place.cluster_log2; peer += kWarpSize >> nodes_log2)
            {
                storeAsync(peerAddress(address, peer), key, peerAddress(ready, peer));
            }
        }
    }
}

// The distinct entries of nodes[0, count) that lie in [first, end), ascending, into `sorted`; `scratch` is as large.
// Returns how many. Begins and ends with a barrier.
inline __device__ __noinline__ int sortDistinct(const int* nodes, int count, int first, int end, int* scratch, int* sorted)
{
    __syncthreads();
    const int lanes_log2 = lanesPerItemLog2(count);
    const int lane = threadIdx.x & ((1 << lanes_log2) - 1);
    int total = 0;
    for (int base = 0; base < count; base += kDecodeThreads >> lanes_log2)
    {
        const int index = base + (static_cast<int>(threadIdx.x) >> lanes_log2);
        const int node = nodes[min(index, count - 1)];
        int same_before = 0;
#pragma unroll 1
        for (int i = lane; i < min(index, count); i += 1 << lanes_log2)
        {
            same_before += nodes[i] == node;
        }
        same_before = sumOverLanes(same_before, lanes_log2);
        const bool distinct = index < count && node >= first && node < end && same_before == 0;
        if (index < count && lane == 0)
        {
            scratch[index] = distinct ? node : kNone;
        }
        total += __syncthreads_count(distinct && lane == 0);
    }
    for (int base = 0; base < count; base += kDecodeThreads >> lanes_log2)
    {
        const int index = base + (static_cast<int>(threadIdx.x) >> lanes_log2);
        const int node = scratch[min(index, count - 1)];
        int smaller = 0;
#pragma unroll 1
        for (int i = lane; i < count; i += 1 << lanes_log2)
        {
            smaller += scratch[i] < node;
        }
        smaller = sumOverLanes(smaller, lanes_log2);
        if (index < count && lane == 0 && node != kNone)
        {
            sorted[smaller] = node;
        }
    }
    __syncthreads();
    return total;
}

// The nodes that a decode step starts from where it reuses: the `count` kept ones in nodes[0, count), and the newest two.
// Leaves them ascending and distinct in `sorted`, and returns how many; `nodes` has room for two more, `scratch` for all.
// Begins and ends with a barrier.
__device__ __forceinline__ int addNewestNodes(int* nodes, int count, int first, int end, int* scratch, int* sorted)
{
    // As a search left them, they are in order, and the newest ones can only be the last.
    bool in_order = true;
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kDecodeThreads)
    {
        const int node = nodes[i];
        in_order = in_order && node < end && (i == 0 ? node >= first : node > nodes[i - 1]);
    }
    if (__syncthreads_and(in_order))
    {
        int older = count; // than the newest two
        while (older > 0 && nodes[older - 1] >= end - 2)
        {
            --older;
        }
        const int newest = max(first, end - 2);
#pragma unroll 1
        for (int i = threadIdx.x; i < older + end - newest; i += kDecodeThreads)
        {
            sorted[i] = i < older ? nodes[i] : newest + i - older;
        }
        __syncthreads();
        return older + end - newest;
    }
    if (threadIdx.x < 2)
    {
        nodes[count + threadIdx.x] = end - 1 - static_cast<int>(threadIdx.x);
    }
    return sortDistinct(nodes, count + 2, first, end, scratch, sorted);
}

} // namespace hip_trt
