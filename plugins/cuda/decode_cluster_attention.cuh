// The attention of the decode kernel: each warp over its share of the blocks, then put together in the thread block and in
// the cluster.
#pragma once

#include "decode_cluster_pools.cuh"

namespace hip_trt
{

// The key blocks that a thread block attends to: its share of sink and window, then some of the chosen ones.
template <typename Chosen>
struct AttendedBlocks
{
    DecodePlace place;
    int sink;
    int window;
    int fixed; // its share of sink and window
    Chosen chosen;
    int count;

    __device__ __forceinline__ int operator[](int index) const
    {
        if (index >= fixed)
        {
            return chosen(index - fixed);
        }
        const int block = place.dealt(index);
        return block < sink ? block : block - sink + window;
    }
};

__device__ __forceinline__ uint32_t lowHalves(uint32_t a, uint32_t b)
{
    return __byte_perm(a, b, 0x5410);
}

__device__ __forceinline__ uint32_t highHalves(uint32_t a, uint32_t b)
{
    return __byte_perm(a, b, 0x7632);
}

// One warp's weighted sums of values, for heads 2t and 2t + 1 of every head tile.
template <typename T, int D, int HeadTiles>
struct WarpAttention
{
    static constexpr int kPartialStride = D + kPartialPadding;

    // Element e of [h][4 c + u] is dimension 8 (g + 8 c) + 2 u + e / 2 of head 8 h + 2 t + e % 2.
    float sum[HeadTiles][D / 16][4];
    float largest[HeadTiles][2];
    float weight[HeadTiles][2]; // of the keys that this lane saw

    __device__ __forceinline__ WarpAttention()
    {
#pragma unroll
        for (int h = 0; h < HeadTiles; ++h)
        {
#pragma unroll
            for (int n = 0; n < D / 16; ++n)
            {
#pragma unroll
                for (int e = 0; e < 4; ++e)
                {
                    sum[h][n][e] = 0;
                }
            }
            largest[h][0] = largest[h][1] = -INFINITY;
            weight[h][0] = weight[h][1] = 0;
        }
    }

    // Add 16 keys: half 0 is tokens token[0] + 0 .. 7, half 1 tokens token[1] + 0 .. 7, whose rows `tile` of `pools` has;
    // `looked_up`: the first tile since they were.
    // At least one is at or before `newest`. The newest token's row may not be in the pool yet, and rows after it are
    // undefined: it is read, from the call's input, in place of all of these, and their weights are 0. Keys go straight
    // to registers; values, which registers have no room for meanwhile, wait in `staged`, the warp's own.
    template <typename Pools>
    __device__ __forceinline__ void add(const QueryOperand<T, D, HeadTiles>& query, const int (&token)[2],
        const Pools& pools, const typename Pools::Tile& tile, bool looked_up, int newest, const T* new_key,
        const T* new_value, float scale_log2e, T* staged)
    {
        using Tile = StagedTile<T, D>;
        const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
        __syncwarp(); // what was staged before has been read
        if (max(token[0], token[1]) + 8 <= newest)
        {
            Tile::copy(staged, {tile.value(0), tile.value(1)});
        }
        else
        {
            Tile::copyLines(staged, 16, [&](int line) {
                // Not an index: that would put the arrays in memory.
                const int first = line < 8 ? token[0] : token[1];
                const T* const half = line < 8 ? tile.value(0) : tile.value(1);
                return first + line % 8 >= newest ? new_value : half + line % 8 * D;
            });
        }
        commitCopies();
        uint4 k[2][D / 32];
#pragma unroll
        for (int half = 0; half < 2; ++half)
        {
            const T* const source = (token[half] + g >= newest ? new_key : tile.key(half) + g * D) + t * 8;
#pragma unroll
            for (int j = 0; j < D / 32; ++j)
            {
                k[half][j] = Pools::load(source + 32 * j);
            }
        }
        if constexpr (Pools::kOffloaded)
        {
            if (looked_up)
            {
                pools.noteRuns();
            }
            tile.landKeys(k);
        }
        float logit[HeadTiles][4]; // of half e / 2, head 2t + e % 2
#pragma unroll
        for (int half = 0; half < 2; ++half)
        {
            float product[HeadTiles][2];
            query.multiply(product, k[half]);
#pragma unroll
            for (int h = 0; h < HeadTiles; ++h)
            {
                logit[h][2 * half] = product[h][0];
                logit[h][2 * half + 1] = product[h][1];
            }
        }
        uint32_t weights[HeadTiles][2];
#pragma unroll
        for (int h = 0; h < HeadTiles; ++h)
        {
#pragma unroll
            for (int e = 0; e < 4; ++e)
            {
                logit[h][e] = token[e / 2] + g <= newest ? logit[h][e] * scale_log2e : -INFINITY;
            }
            float factor[2];
#pragma unroll
            for (int e = 0; e < 2; ++e)
            {
                const float before = largest[h][e];
                largest[h][e] = fmaxf(before, maxOverKeys(fmaxf(logit[h][e], logit[h][e + 2])));
                factor[e] = exp2Fast(before - largest[h][e]);
                logit[h][e] = exp2Fast(logit[h][e] - largest[h][e]);
                logit[h][e + 2] = exp2Fast(logit[h][e + 2] - largest[h][e]);
                weight[h][e] = weight[h][e] * factor[e] + logit[h][e] + logit[h][e + 2];
            }
#pragma unroll
            for (int n = 0; n < D / 16; ++n)
            {
#pragma unroll
                for (int e = 0; e < 4; ++e)
                {
                    sum[h][n][e] *= factor[e % 2];
                }
            }
            weights[h][0] = transposeMatrix(packPair<T>(logit[h][0], logit[h][1]));
            weights[h][1] = transposeMatrix(packPair<T>(logit[h][2], logit[h][3]));
        }
        waitCopies<0>();
        __syncwarp();
        if constexpr (Pools::kOffloaded)
        {
            tile.landValues(staged);
        }
#pragma unroll
        for (int c = 0; c < D / 64; ++c)
        {
            uint4 v[2][2]; // chunk g + 8 c of row 2t + e of each half
#pragma unroll
            for (int e = 0; e < 2; ++e)
            {
                const int element = Tile::at(2 * t + e, g) + 8 * c * Tile::kChunkElements;
                v[0][e] = Tile::read(staged, element);
                v[1][e] = Tile::read(staged, element, 8);
            }
#pragma unroll
            for (int u = 0; u < 4; ++u)
            {
                const uint32_t words[2][2]
                    = {{(&v[0][0].x)[u], (&v[0][1].x)[u]}, {(&v[1][0].x)[u], (&v[1][1].x)[u]}};
                const uint32_t a[4] = {lowHalves(words[0][0], words[0][1]), highHalves(words[0][0], words[0][1]),
                    lowHalves(words[1][0], words[1][1]), highHalves(words[1][0], words[1][1])};
#pragma unroll
                for (int h = 0; h < HeadTiles; ++h)
                {
                    multiplyAdd<T>(sum[h][4 * c + u], a, weights[h][0], weights[h][1]);
                }
            }
        }
    }

    // Store the sums to partials [G, D + padding] and the state to states [G].
    __device__ __forceinline__ void store(float* partials, float2* states, int heads) const
    {
        const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int h = 0; h < HeadTiles; ++h)
        {
#pragma unroll
            for (int e = 0; e < 2; ++e)
            {
                const int head = h * kHeadTile + 2 * t + e;
                const float total = sumOverKeys(weight[h][e]);
                if (head >= heads)
                {
                    continue;
                }
#pragma unroll
                for (int n = 0; n < D / 16; n += 2)
                {
                    *reinterpret_cast<float4*>(partials + head * kPartialStride + 8 * (g + 8 * (n / 4)) + 2 * (n % 4))
                        = make_float4(sum[h][n][e], sum[h][n][e + 2], sum[h][n + 1][e], sum[h][n + 1][e + 2]);
                }
                if (g == 0)
                {
                    states[head] = make_float2(largest[h][e], total);
                }
            }
        }
    }
};

// Attend to this thread block's blocks; each warp leaves its sums in shared memory. Returns how many warps did. Begins
// where the lists are complete, ends without a barrier.
template <typename T, int D, int HeadTiles, typename Pools, typename Blocks>
__device__ __forceinline__ int attendBlocks(const DecodeCall& decode, const DecodePlace& place,
    const DecodeShared& shared, const PoolRows& rows, const Pools& pools, const Blocks& blocks, int newest)
{
    constexpr int kWarps = kDecodeThreads / kWarpSize;
    const Call& call = decode.call;
    const int warp = warpIndex(), lane = threadIdx.x % kWarpSize;
    const int halves_log2 = call.block_k_log2 - 3; // of a block: runs of 8 tokens
    const int halves = blocks.count << halves_log2;
    const int tiles = (halves + 1) / 2;
    const int64_t new_row = static_cast<int64_t>(place.b) * call.shape.num_kv_heads + place.kv_head;
    const T* new_key = static_cast<const T*>(call.key) + new_row * D;
    const T* new_value = static_cast<const T*>(call.value) + new_row * D;

    const QueryOperand<T, D, HeadTiles> query(reinterpret_cast<const T*>(shared.queries()));
    WarpAttention<T, D, HeadTiles> attention;
    int token = kNone; // lane 2 i + half: of the warp's tile i of the next sixteen
    typename Pools::Run run{};
    for (int i = 0; warp + kWarps * i < tiles; ++i)
    {
        if (i % 16 == 0)
        {
            const int half = 2 * (warp + kWarps * (i + lane / 2)) + lane % 2;
            token = kNone;
            uint32_t row = 0;
            if (half < halves)
            {
                token = (blocks[half >> halves_log2] << call.block_k_log2) + (half & ((1 << halves_log2) - 1)) * 8;
                row = rows(token);
            }
            run = pools.findRun(row, token <= newest, halves_log2 > 0);
        }
        int tokens[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
        {
            tokens[half] = __shfl_sync(kFullWarp, token, 2 * (i % 16) + half);
        }
        if (min(tokens[0], tokens[1]) <= newest)
        {
            attention.add(query, tokens, pools, pools.tile(run, 2 * (i % 16)), i % 16 == 0, newest, new_key, new_value,
                decode.scale_log2e, reinterpret_cast<T*>(shared.scratch(warp)));
        }
        else if constexpr (Pools::kOffloaded)
        {
            if (i % 16 == 0)
            {
                pools.noteRuns();
            }
        }
    }
    const int heads = call.heads_per_mask;
    if (warp < tiles)
    {
        __syncwarp(); // the staged values have been read
        attention.store(
            reinterpret_cast<float*>(shared.scratch(warp)), shared.states() + warp * heads, heads);
    }
    return min(kWarps, tiles);
}

// Partial results, at most Most of them, put together.
template <int Most>
struct Combination
{
    float factor[Most]; // of each one's sums
    float largest;
    float weight;

    // state(i): largest logit (base 2) and sum of weights.
    template <typename State>
    __device__ __forceinline__ Combination(int count, State state)
    {
        float weights[Most];
        largest = -INFINITY;
#pragma unroll
        for (int i = 0; i < Most; ++i)
        {
            const float2 part = i < count ? state(i) : make_float2(-INFINITY, 0);
            factor[i] = part.x;
            weights[i] = part.y;
            largest = fmaxf(largest, part.x);
        }
        weight = 0;
#pragma unroll
        for (int i = 0; i < Most; ++i)
        {
            factor[i] = i < count ? exp2Fast(factor[i] - largest) : 0;
            weight += factor[i] * weights[i];
        }
    }
};

// Combine the warps' results and send each thread block of the cluster its part of the output.
template <int D>
__device__ __forceinline__ void sendResults(
    const DecodeCall& decode, const DecodePlace& place, const DecodeShared& shared, int warps)
{
    constexpr int kWarps = kDecodeThreads / kWarpSize;
    constexpr int kStride = D + kPartialPadding;
    const int heads = decode.call.heads_per_mask;
    const int part = heads * D >> place.cluster_log2;
    const auto combine = [&](int head) {
        return Combination<kWarps>(warps, [&](int warp) { return shared.states()[warp * heads + head]; });
    };
#pragma unroll 1
    for (int i = threadIdx.x * 4; i < heads * D; i += kDecodeThreads * 4)
    {
        const int head = i / D;
        const Combination<kWarps> combination = combine(head);
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp)
        {
            if (warp < warps)
            {
                const float4 term = *reinterpret_cast<const float4*>(
                    reinterpret_cast<const float*>(shared.scratch(warp)) + head * kStride + i % D);
                sum.x += combination.factor[warp] * term.x;
                sum.y += combination.factor[warp] * term.y;
                sum.z += combination.factor[warp] * term.z;
                sum.w += combination.factor[warp] * term.w;
            }
        }
        const int owner = i / part;
        const int target = place.rank * part + i - owner * part;
        storeAsync(peerAddress(sharedAddress(shared.inbox() + target), owner), sum,
            peerAddress(sharedAddress(shared.resultsReady()), owner));
    }
    // The last warps take the states, as the first ones are busy.
#pragma unroll 1
    for (int i = kDecodeThreads - 1 - threadIdx.x; i < heads << place.cluster_log2; i += kDecodeThreads)
    {
        const int head = i >> place.cluster_log2, owner = i & ((1 << place.cluster_log2) - 1);
        const Combination<kWarps> combination = combine(head);
        storeAsync(peerAddress(sharedAddress(shared.inboxStates() + place.rank * heads + head), owner),
            make_float2(combination.largest, combination.weight),
            peerAddress(sharedAddress(shared.resultsReady()), owner));
    }
}

// Combine what the cluster, of at most Most thread blocks, sent to this one, and write it.
template <typename T, int D, int Most>
__device__ __forceinline__ void writeOutput(const DecodeCall& decode, const DecodePlace& place, const DecodeShared& shared)
{
    const Call& call = decode.call;
    const int heads = call.heads_per_mask;
    const int cluster = 1 << place.cluster_log2, part = heads * D >> place.cluster_log2;
    T* const output = static_cast<T*>(call.output)
        + (static_cast<int64_t>(place.b) * call.shape.num_query_heads + place.mask * heads) * D;
#pragma unroll 1
    for (int i = 2 * threadIdx.x; i < part; i += 2 * kDecodeThreads)
    {
        const int index = place.rank * part + i, head = index / D;
        const Combination<Most> combination(cluster, [&](int r) { return shared.inboxStates()[r * heads + head]; });
        float2 sum = make_float2(0, 0);
#pragma unroll
        for (int r = 0; r < Most; ++r)
        {
            if (r < cluster)
            {
                const float2 term = *reinterpret_cast<const float2*>(shared.inbox() + r * part + i);
                sum.x += combination.factor[r] * term.x;
                sum.y += combination.factor[r] * term.y;
            }
        }
        const float scale = 1 / combination.weight;
        *reinterpret_cast<uint32_t*>(output + index) = packPair<T>(sum.x * scale, sum.y * scale);
    }
}

} // namespace hip_trt
