// A decode step in one kernel: a cluster of thread blocks per sequence and mask head appends the new token, searches the
// mask and attends (compute capability 9.0 and later).
//
// The thread blocks of a cluster share every level of the search. Each scores its part of the nodes, straight from the
// page pool into tensor-core registers, and stores the scores into the shared memory of all; each then finds the best
// nodes by itself, so one exchange a level is all they wait for. A block is attended by the thread block that scored it.
// The parts of the output travel the same way, once.
//
// Layouts, with g = lane / 4 and t = lane % 4. A product of 16 keys and 8 query heads is a tensor-core tile whose inner
// dimension may be permuted, if it is for both sides: so a lane loads 16 contiguous bytes, chunk 4 j + t of row g, of
// keys and queries alike, and these are its operands of two instructions.
#pragma once

#include "decode_cluster.cuh"
#include "decode_cluster_ptx.cuh"
#include "decode_cluster_select.cuh"
#include "query_block.cuh"
#include "tree.cuh"
#include "warp_tile.cuh"

namespace hip_trt
{

constexpr int kNoToken = 1 << 30;
constexpr int kHeadTile = 8;      // query heads of a tensor-core tile

// ---- Where things are ----

// Views of a thread block's shared memory. Addresses are computed where they are used: registers are scarcer.
struct DecodeShared
{
    const DecodeCall& decode;

    template <typename T>
    static __device__ __forceinline__ T* at(int offset)
    {
        return reinterpret_cast<T*>(dynamicShared() + offset);
    }

    __device__ __forceinline__ uint64_t* scoresReady(int parity) const
    {
        return at<uint64_t>(parity * sizeof(uint64_t));
    }

    __device__ __forceinline__ uint64_t* resultsReady() const
    {
        return at<uint64_t>(2 * sizeof(uint64_t));
    }

    // One bit a candidate.
    __device__ __forceinline__ uint32_t* marks(int parity) const
    {
        return at<uint32_t>(decode.layout.marks) + parity * (decode.capacity / 32);
    }

    // One score a candidate, as orderedKey gives it.
    __device__ __forceinline__ uint32_t* keys(int parity) const
    {
        return at<uint32_t>(decode.layout.keys) + parity * decode.capacity;
    }

    // Nodes; three lists.
    __device__ __forceinline__ int* list(int index) const
    {
        return at<int>(decode.layout.lists) + index * decode.list_capacity;
    }

    // The sequence's page table.
    __device__ __forceinline__ int* table() const
    {
        return at<int>(decode.layout.table);
    }

    // What a warp has for itself: staged values, then its weighted sums of values, [G, D + kPartialPadding] floats.
    __device__ __forceinline__ char* scratch(int warp) const
    {
        return at<char>(decode.layout.scratch) + warp * decode.scratch_bytes;
    }

    // Largest logit (base 2) and sum of weights of each warp: [warps, G].
    __device__ __forceinline__ float2* states() const
    {
        return at<float2>(decode.layout.states);
    }

    // This thread block's part of the weighted sums of each thread block: [cluster, G D / cluster].
    __device__ __forceinline__ float* inbox() const
    {
        return at<float>(decode.layout.inbox);
    }

    // The state of each thread block: [cluster, G].
    __device__ __forceinline__ float2* inboxStates() const
    {
        return at<float2>(decode.layout.inbox_states);
    }
};

// The place of a thread block in its cluster, and of the cluster in the call.
struct DecodePlace
{
    int rank;
    int cluster_log2;
    int mask;
    int b;
    int kv_head;

    // How many of `count` things, dealt out in turn, are this thread block's.
    __device__ __forceinline__ int share(int count) const
    {
        return (count - rank + (1 << cluster_log2) - 1) >> cluster_log2;
    }

    __device__ __forceinline__ int dealt(int index) const
    {
        return rank + (index << cluster_log2);
    }
};

// Index of a token's row in the pool, in rows of D elements.
struct PoolRows
{
    const int* table; // of this sequence
    Divisor page_size;
    int heads;
    int head;

    __device__ __forceinline__ uint32_t operator()(int token) const
    {
        const int slot = page_size.divide(token);
        const uint32_t first = (static_cast<uint32_t>(table[slot]) * heads + head) * page_size.divisor;
        return first + token - slot * page_size.divisor;
    }
};

// An ascending list of nodes that is not stored: a range, or the children of listed nodes.
struct LevelNodes
{
    const int* parents; // nullptr: a range
    int width;          // children of a parent
    uint32_t reciprocal;
    int offset; // first node of a range; else children of parents[0] that hold no candidate
    int count;

    __device__ __forceinline__ int operator[](int index) const
    {
        const int child = index + offset;
        if (parents == nullptr)
        {
            return child;
        }
        const int parent = (child * reciprocal) >> kReciprocalShift;
        return parents[parent] * width + child - parent * width;
    }
};

// The query rows of a mask head, as operands: zeros beyond its heads.
template <typename T, int D, int HeadTiles>
struct QueryOperand
{
    uint4 chunk[HeadTiles][D / 32];

    __device__ __forceinline__ void load(const T* rows, int heads)
    {
        const int lane = threadIdx.x % kWarpSize;
#pragma unroll
        for (int h = 0; h < HeadTiles; ++h)
        {
            const int head = h * kHeadTile + lane / 4;
#pragma unroll
            for (int j = 0; j < D / 32; ++j)
            {
                chunk[h][j] = head < heads
                    ? *reinterpret_cast<const uint4*>(rows + static_cast<int64_t>(head) * D + (4 * j + lane % 4) * 8)
                    : make_uint4(0, 0, 0, 0);
            }
        }
    }

    // Products of 16 keys with all heads: element 0 and 1 are key g, heads 2t and 2t + 1; 2 and 3 are key g + 8.
    __device__ __forceinline__ void products(float (&sum)[HeadTiles][4], const uint4 (&keys)[2][D / 32]) const
    {
        float even[HeadTiles][4] = {}, odd[HeadTiles][4] = {}; // two chains of dependent instructions, each half as long
#pragma unroll
        for (int j = 0; j < D / 32; ++j)
        {
            const uint32_t low[4] = {keys[0][j].x, keys[1][j].x, keys[0][j].y, keys[1][j].y};
            const uint32_t high[4] = {keys[0][j].z, keys[1][j].z, keys[0][j].w, keys[1][j].w};
#pragma unroll
            for (int h = 0; h < HeadTiles; ++h)
            {
                multiplyAdd<T>(even[h], low, chunk[h][j].x, chunk[h][j].y);
                multiplyAdd<T>(odd[h], high, chunk[h][j].z, chunk[h][j].w);
            }
        }
#pragma unroll
        for (int h = 0; h < HeadTiles; ++h)
        {
#pragma unroll
            for (int i = 0; i < 4; ++i)
            {
                sum[h][i] = even[h][i] + odd[h][i];
            }
        }
    }
};

// Reduce over the lanes that hold the keys of a tile, for the heads that a lane holds.
__device__ __forceinline__ float maxOverKeys(float value)
{
#pragma unroll
    for (int bit = 4; bit < kWarpSize; bit *= 2)
    {
        value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, bit));
    }
    return value;
}

__device__ __forceinline__ float sumOverKeys(float value)
{
#pragma unroll
    for (int bit = 4; bit < kWarpSize; bit *= 2)
    {
        value += __shfl_xor_sync(kFullWarp, value, bit);
    }
    return value;
}

// The same in all lanes of a warp, and the compiler can tell.
__device__ __forceinline__ int warpIndex()
{
    return __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpSize, 0);
}

// ---- Search ----

// Score this thread block's share of the nodes, and store the scores into keys(parity) of every thread block.
template <typename T, int D, int HeadTiles, int Threads>
__device__ __forceinline__ void scoreNodes(const DecodeCall& decode, const DecodePlace& place, const DecodeShared& shared,
    const QueryOperand<T, D, HeadTiles>& query, const Tree& tree, const PoolRows& rows, const LevelNodes& nodes,
    int blocks_per_node, int parity)
{
    constexpr int kWarps = Threads / kWarpSize;
    constexpr int kBatchLog2 = 5; // a warp loads 32 rows, two tiles, before it uses the first
    const int warp = warpIndex(), lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
    // A batch holds several nodes, or a node several batches.
    const int rows_log2 = decode.scored_rows_log2;
    const int nodes_log2 = max(0, kBatchLog2 - rows_log2), batches_log2 = max(0, rows_log2 - kBatchLog2);
    const int own = place.share(nodes.count);
    const int groups = (own + (1 << nodes_log2) - 1) >> nodes_log2;
    const char* pool = static_cast<const char*>(decode.call.present_key) + t * 16;
    // Scores are spread over lanes as [peer][node of the batch].
    const int scored = (nodes_log2 == 2 ? lane % 2 * 2 + lane / 2 % 2 : lane) & ((1 << nodes_log2) - 1);
    const int heads = decode.call.heads_per_mask;

    float carried = -INFINITY;
#pragma unroll 1
    for (int batch = 0; warp + kWarps * (batch >> batches_log2) < groups; ++batch)
    {
        const int first = (warp + kWarps * (batch >> batches_log2)) << nodes_log2;
        // Lane i looks up node i of the batch; past the last node, the last one again.
        const int looked_up = min(first + (lane & ((1 << nodes_log2) - 1)), own - 1);
        const uint32_t row
            = rows(tree.representative(nodes[place.dealt(looked_up)], blocks_per_node) << decode.call.block_k_log2);
        uint4 keys[2][2][D / 32]; // [tile][half]
#pragma unroll
        for (int part = 0; part < 4; ++part)
        {
            const int line = 8 * part + g;
            const uint32_t from = __shfl_sync(kFullWarp, row, line >> rows_log2);
            const int token = (((batch << kBatchLog2) + line) & ((1 << rows_log2) - 1)) << decode.stride_k_log2;
            const char* address = pool + (static_cast<uint64_t>(from) + token) * (D * sizeof(T));
#pragma unroll
            for (int j = 0; j < D / 32; ++j)
            {
                keys[part / 2][part % 2][j] = loadOnce(address + j * 64);
            }
        }
        float best[2][2]; // [tile][half]: largest of key g
#pragma unroll
        for (int tile = 0; tile < 2; ++tile)
        {
            float product[HeadTiles][4];
            query.products(product, keys[tile]);
            best[tile][0] = best[tile][1] = -INFINITY;
#pragma unroll
            for (int h = 0; h < HeadTiles; ++h)
            {
#pragma unroll
                for (int e = 0; e < 4; ++e)
                {
                    const bool valid = h * kHeadTile + 2 * t + e % 2 < heads;
                    best[tile][e / 2] = fmaxf(best[tile][e / 2], valid ? product[h][e] : -INFINITY);
                }
            }
        }
        // Reduce four numbers over the warp at once: lanes of bit 0 go on with tile bit 0, then those of bit 1 with half
        // bit 1.
        float largest[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
        {
            const float sent = lane & 1 ? best[0][half] : best[1][half];
            largest[half] = fmaxf(lane & 1 ? best[1][half] : best[0][half], __shfl_xor_sync(kFullWarp, sent, 1));
        }
        const float sent = lane & 2 ? largest[0] : largest[1];
        float score = fmaxf(lane & 2 ? largest[1] : largest[0], __shfl_xor_sync(kFullWarp, sent, 2));
        score = maxOverKeys(score);
        if (nodes_log2 < 2) // both halves are of one node
        {
            score = fmaxf(score, __shfl_xor_sync(kFullWarp, score, 2));
        }
        if (nodes_log2 < 1) // so are both tiles
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
            for (int peer = lane >> nodes_log2; peer < 1 << place.cluster_log2; peer += kWarpSize >> nodes_log2)
            {
                storeAsync(peerAddress(address, peer), key,
                    peerAddress(sharedAddress(shared.scoresReady(parity)), peer));
            }
        }
    }
}

// The distinct entries of nodes[0, count) that lie in [first, end), ascending, into `sorted`; `scratch` is as large.
// Returns how many. Begins and ends with a barrier.
template <int Threads>
__device__ int sortDistinct(const int* nodes, int count, int first, int end, int* scratch, int* sorted)
{
    __syncthreads();
    const int lanes_log2 = lanesPerItemLog2<Threads>(count);
    const int lane = threadIdx.x & ((1 << lanes_log2) - 1);
    int total = 0;
    for (int base = 0; base < count; base += Threads >> lanes_log2)
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
            scratch[index] = distinct ? node : kNoToken;
        }
        total += __syncthreads_count(distinct && lane == 0);
    }
    for (int base = 0; base < count; base += Threads >> lanes_log2)
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
        if (index < count && lane == 0 && node != kNoToken)
        {
            sorted[smaller] = node;
        }
    }
    __syncthreads();
    return total;
}

// ---- Attention ----

// The key blocks that a thread block attends to: its share of sink and window, then some of a list.
struct AttendedBlocks
{
    DecodePlace place;
    int sink;
    int window;
    int fixed; // its share of sink and window
    const int* listed;
    int listed_first;
    int listed_step;
    int count;

    __device__ __forceinline__ int operator[](int index) const
    {
        if (index >= fixed)
        {
            return listed[listed_first + (index - fixed) * listed_step];
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

    // Where a 16-byte chunk of a row is staged: lanes that read chunks of rows 2t together use different banks.
    static __device__ __forceinline__ int stagedAt(int line, int chunk)
    {
        return line * D + (chunk ^ line / 2 % 4 * 2) * 8;
    }

    // Add 16 keys: half 0 is tokens token[0] + 0 .. 7, half 1 tokens token[1] + 0 .. 7, in the pool from row[half] on.
    // At least one is at or before `newest`. The newest token's row may not be in the pool yet, and rows after it are
    // undefined: it is read, from the call's input, in place of all of these, and their weights are 0. Keys go straight
    // to registers; values, which registers have no room for meanwhile, wait in `staged`, the warp's 16 rows of D.
    __device__ __forceinline__ void add(const QueryOperand<T, D, HeadTiles>& query, const int (&token)[2],
        const uint32_t (&row)[2], int newest, const T* new_key, const T* new_value, const T* keys, const T* values,
        float scale_log2e, T* staged)
    {
        constexpr int kChunks = D / 8; // of a row, 16 bytes each
        const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
        __syncwarp(); // the values before have been read
#pragma unroll
        for (int i = 0; i < 16 * kChunks / kWarpSize; ++i)
        {
            constexpr int kLines = kWarpSize / kChunks; // that the warp copies at once
            const int half = i * kLines / 8;
            const int line = i * kLines % 8 + lane / kChunks, chunk = lane % kChunks;
            const T* source
                = token[half] + line >= newest ? new_value : values + (static_cast<uint64_t>(row[half]) + line) * D;
            copyAsync16(staged + stagedAt(8 * half + line, chunk), source + chunk * 8, true);
        }
        commitCopies();
        uint4 k[2][D / 32];
#pragma unroll
        for (int half = 0; half < 2; ++half)
        {
            const T* source
                = token[half] + g >= newest ? new_key : keys + (static_cast<uint64_t>(row[half]) + g) * D;
#pragma unroll
            for (int j = 0; j < D / 32; ++j)
            {
                k[half][j] = loadOnce(source + (4 * j + t) * 8);
            }
        }
        float logit[HeadTiles][4];
        query.products(logit, k);
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
#pragma unroll
        for (int c = 0; c < D / 64; ++c)
        {
            uint4 v[2][2]; // chunk g + 8 c of row 2t + e of each half
#pragma unroll
            for (int line = 0; line < 4; ++line)
            {
                v[line / 2][line % 2]
                    = *reinterpret_cast<const uint4*>(staged + stagedAt(line / 2 * 8 + 2 * t + line % 2, g + 8 * c));
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
template <typename T, int D, int HeadTiles, int Threads>
__device__ __forceinline__ int attendBlocks(const DecodeCall& decode, const DecodePlace& place,
    const DecodeShared& shared, const QueryOperand<T, D, HeadTiles>& query, const PoolRows& rows,
    const AttendedBlocks& blocks, int newest)
{
    constexpr int kWarps = Threads / kWarpSize;
    const Call& call = decode.call;
    const int warp = warpIndex(), lane = threadIdx.x % kWarpSize;
    const int halves_log2 = call.block_k_log2 - 3; // of a block: runs of 8 tokens
    const int halves = blocks.count << halves_log2;
    const int tiles = (halves + 1) / 2;
    const int64_t new_row = static_cast<int64_t>(place.b) * call.shape.num_kv_heads + place.kv_head;
    const T* new_key = static_cast<const T*>(call.key) + new_row * D;
    const T* new_value = static_cast<const T*>(call.value) + new_row * D;

    WarpAttention<T, D, HeadTiles> attention;
    int token = kNoToken; // lane 2 i + half: of the warp's tile i of the next sixteen
    uint32_t row = 0;
    for (int i = 0; warp + kWarps * i < tiles; ++i)
    {
        if (i % 16 == 0)
        {
            const int half = 2 * (warp + kWarps * (i + lane / 2)) + lane % 2;
            token = kNoToken;
            if (half < halves)
            {
                token = (blocks[half >> halves_log2] << call.block_k_log2) + (half & ((1 << halves_log2) - 1)) * 8;
                row = rows(token);
            }
        }
        int tokens[2];
        uint32_t from[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
        {
            tokens[half] = __shfl_sync(kFullWarp, token, 2 * (i % 16) + half);
            from[half] = __shfl_sync(kFullWarp, row, 2 * (i % 16) + half);
        }
        if (min(tokens[0], tokens[1]) <= newest)
        {
            attention.add(query, tokens, from, newest, new_key, new_value, static_cast<const T*>(call.present_key),
                static_cast<const T*>(call.present_value), decode.scale_log2e,
                reinterpret_cast<T*>(shared.scratch(warp)));
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

constexpr int kTogether = 4; // partial results that are read before the first is used

// The state of several partial results together.
__device__ __forceinline__ float2 combineStates(const float2* states, int count, int stride)
{
    float2 all = make_float2(-INFINITY, 0);
#pragma unroll 1
    for (int first = 0; first < count; first += kTogether)
    {
        float2 state[kTogether];
        float largest = all.x;
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
        {
            state[i] = states[min(first + i, count - 1) * stride];
            largest = fmaxf(largest, state[i].x);
        }
        all.y *= exp2Fast(all.x - largest);
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
        {
            all.y += first + i < count ? state[i].y * exp2Fast(state[i].x - largest) : 0;
        }
        all.x = largest;
    }
    return all;
}

// Combine the warps' results and send each thread block of the cluster its part of the output.
template <int D, int Threads>
__device__ __forceinline__ void sendResults(
    const DecodeCall& decode, const DecodePlace& place, const DecodeShared& shared, int warps)
{
    constexpr int kStride = D + kPartialPadding;
    const int heads = decode.call.heads_per_mask;
    const int part = heads * D >> place.cluster_log2;
#pragma unroll 1
    for (int i = threadIdx.x * 4; i < heads * D; i += Threads * 4)
    {
        const int head = i / D;
        const float2 state = combineStates(shared.states() + head, warps, heads);
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 1
        for (int first = 0; first < warps; first += kTogether)
        {
#pragma unroll
            for (int w = 0; w < kTogether; ++w)
            {
                const int warp = min(first + w, warps - 1);
                const float factor
                    = first + w < warps ? exp2Fast(shared.states()[warp * heads + head].x - state.x) : 0;
                const float4 term = *reinterpret_cast<const float4*>(
                    reinterpret_cast<const float*>(shared.scratch(warp)) + head * kStride + i % D);
                sum.x += factor * term.x;
                sum.y += factor * term.y;
                sum.z += factor * term.z;
                sum.w += factor * term.w;
            }
        }
        const int owner = i / part;
        const int target = place.rank * part + i - owner * part;
        storeAsync(peerAddress(sharedAddress(shared.inbox() + target), owner), sum,
            peerAddress(sharedAddress(shared.resultsReady()), owner));
    }
    // The last warps take the states, as the first ones are busy.
#pragma unroll 1
    for (int i = Threads - 1 - threadIdx.x; i < heads << place.cluster_log2; i += Threads)
    {
        const int head = i >> place.cluster_log2, owner = i & ((1 << place.cluster_log2) - 1);
        storeAsync(peerAddress(sharedAddress(shared.inboxStates() + place.rank * heads + head), owner),
            combineStates(shared.states() + head, warps, heads),
            peerAddress(sharedAddress(shared.resultsReady()), owner));
    }
}

// Combine what the cluster sent to this thread block, and write it.
template <typename T, int D, int Threads>
__device__ __forceinline__ void writeOutput(const DecodeCall& decode, const DecodePlace& place, const DecodeShared& shared)
{
    const Call& call = decode.call;
    const int heads = call.heads_per_mask;
    const int cluster = 1 << place.cluster_log2, part = heads * D >> place.cluster_log2;
    T* output = static_cast<T*>(call.output)
        + (static_cast<int64_t>(place.b) * call.shape.num_query_heads + place.mask * heads) * D;
#pragma unroll 1
    for (int i = 2 * threadIdx.x; i < part; i += 2 * Threads)
    {
        const int index = place.rank * part + i;
        const float2 state = combineStates(shared.inboxStates() + index / D, cluster, heads);
        float2 sum = make_float2(0, 0);
#pragma unroll 1
        for (int first = 0; first < cluster; first += kTogether)
        {
#pragma unroll
            for (int r = 0; r < kTogether; ++r)
            {
                const int from = min(first + r, cluster - 1);
                const float factor
                    = first + r < cluster ? exp2Fast(shared.inboxStates()[from * heads + index / D].x - state.x) : 0;
                const float2 term = *reinterpret_cast<const float2*>(shared.inbox() + from * part + i);
                sum.x += factor * term.x;
                sum.y += factor * term.y;
            }
        }
        *reinterpret_cast<uint32_t*>(output + index) = packPair<T>(sum.x / state.y, sum.y / state.y);
    }
}

// ---- The kernel ----

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

template <typename T, int D, int HeadTiles, int Threads>
__global__ void __launch_bounds__(Threads, HeadTiles == 1 ? 512 / Threads : 1)
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

    if (threadIdx.x == 0)
    {
        initBarrier(shared.scoresReady(0));
        initBarrier(shared.scoresReady(1));
        initBarrier(shared.resultsReady());
        publishBarriers();
        expectBytes(shared.resultsReady(), heads * (D * sizeof(float) + cluster * sizeof(float2)));
    }
    clusterArrive();
#pragma unroll 1
    for (int i = threadIdx.x; i < decode.capacity / 32; i += Threads)
    {
        shared.marks(0)[i] = 0;
    }
    waitForPreviousKernel();

    const int64_t list = (static_cast<int64_t>(place.b) * call.mask_heads + place.mask) * budget;
    const int32_t* global_table = call.page_table + static_cast<int64_t>(place.b) * call.shape.pages_per_sequence;
#pragma unroll 4
    for (int i = threadIdx.x; i < decode.table_entries; i += Threads)
    {
        copyAsync4(shared.table() + i, global_table + i);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < budget; i += Threads)
    {
        copyAsync4(shared.list(0) + i, call.past_nodes + list + i);
    }
    commitCopies();
    const QueryBlock block(call, place.b, 0);
    const bool refresh = *call.refresh_mask != 0;
    const int first_head = place.mask * heads;
    QueryOperand<T, D, HeadTiles> query;
    query.load(static_cast<const T*>(call.query)
            + (static_cast<int64_t>(place.b) * call.shape.num_query_heads + first_head) * D,
        heads);
    waitCopies<0>();
    __syncthreads();
    clusterWait();

    int32_t* present_nodes = call.present_nodes + list;
    int32_t* chosen_blocks = call.chosen_blocks == nullptr ? nullptr : call.chosen_blocks + list;
    if (block.rows <= 0)
    {
        T* output = static_cast<T*>(call.output)
            + (static_cast<int64_t>(place.b) * call.shape.num_query_heads + first_head) * D;
#pragma unroll 1
        for (int i = threadIdx.x; place.rank == 0 && i < heads * D; i += Threads)
        {
            output[i] = T(0.0f);
        }
#pragma unroll 1
        for (int i = threadIdx.x; place.rank == 0 && i < budget; i += Threads)
        {
            present_nodes[i] = shared.list(0)[i];
            if (chosen_blocks != nullptr)
            {
                chosen_blocks[i] = -1;
            }
        }
        return;
    }

    const PoolRows rows{decode.table_entries > 0 ? shared.table() : global_table, decode.page_size,
        call.shape.num_kv_heads, place.kv_head};
    if (place.rank == 0 && first_head % call.heads_per_kv == 0)
    {
        appendToken<T, D>(call, place, rows(block.last));
    }

    // Where the tree ends up: the chosen blocks, of which this thread block attends to listed[listed_first + i step].
    const int* listed = shared.list(2);
    int listed_count = 0, listed_first = 0, listed_step = 1;
    LevelNodes nodes{};
    const uint32_t* last_keys = nullptr;
    const bool reuse = !block.contiguous && !refresh && shared.list(0)[0] >= 0;
    bool nodes_written = false;
    const Tree tree{block.sink, block.window, config.branch, config.leaf_branch};
    const auto firstNode = [&](int level) { return decode.level_size[level].divide(tree.first); };
    const auto endNode = [&](int level) { return decode.level_size[level].divide(tree.last - 1) + 1; };

    if (reuse && config.reuse_level == 0)
    {
        listed_count = sortDistinct<Threads>(
            shared.list(0), budget, tree.first, tree.last, shared.list(1), shared.list(2));
        listed_first = place.rank;
        listed_step = cluster;
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
        int level = 0;
        if (reuse)
        {
            const int end = endNode(1), newest = max(firstNode(1), end - 2);
            if (threadIdx.x < 2)
            {
                shared.list(0)[budget + threadIdx.x] = min(newest + static_cast<int>(threadIdx.x), end - 1);
            }
            const int count = sortDistinct<Threads>(
                shared.list(0), budget + 2, firstNode(1), end, shared.list(2), shared.list(1));
            nodes = childrenOf(shared.list(1), count, 1);
        }
        else
        {
            while (endNode(level) - firstNode(level) > budget * (level == 0 ? config.leaf_branch : config.branch))
            {
                ++level;
            }
            nodes = LevelNodes{nullptr, 0, 0, firstNode(level), endNode(level) - firstNode(level)};
        }
        for (int exchange = 0;; ++exchange, --level)
        {
            const int parity = exchange & 1;
            if (threadIdx.x == 0)
            {
                expectBytes(shared.scoresReady(parity), nodes.count * sizeof(uint32_t));
            }
            scoreNodes<T, D, HeadTiles, Threads>(
                decode, place, shared, query, tree, rows, nodes, decode.level_size[level].divisor, parity);
            waitBarrier(shared.scoresReady(parity), exchange >> 1 & 1);
            last_keys = shared.keys(parity);
            const Asked asked = level == 0 ? Asked{place.rank, place.cluster_log2, place.share(nodes.count)}
                                           : Asked{0, 0, nodes.count};
            uint32_t* marks = shared.marks(parity);
            markBest<Threads>(last_keys, nodes.count, asked, budget, marks);
            __syncthreads();
            // The parents' list must outlive this loop; so must, at the end, the list of the last parents.
            int* kept = shared.list(level == 0 ? 2 : parity);
#pragma unroll 1
            for (int i = threadIdx.x; i < asked.count; i += Threads)
            {
                if (getBit(marks, i))
                {
                    kept[bitsBefore(marks, i)] = nodes[asked[i]];
                }
            }
#pragma unroll 1
            for (int i = threadIdx.x; i < decode.capacity / 32; i += Threads)
            {
                shared.marks(parity ^ 1)[i] = 0;
            }
            if (level == 0)
            {
                for (int i = 0; i < (asked.count + 31) / 32; ++i)
                {
                    listed_count += __popc(marks[i]);
                }
            }
            __syncthreads();
            if (level == 0)
            {
                break;
            }
            if (level == config.reuse_level && place.rank == 0)
            {
#pragma unroll 1
                for (int i = threadIdx.x; i < budget; i += Threads)
                {
                    present_nodes[i] = kept[i];
                }
            }
            nodes_written |= level == config.reuse_level;
            nodes = childrenOf(kept, budget, level);
        }
    }

    letNextKernelStart();
    AttendedBlocks attended{place, block.sink, block.window, 0, listed, listed_first, listed_step, listed_count};
    const int last_block = block.last >> call.block_k_log2;
    if (block.contiguous)
    {
        attended.sink = attended.window = last_block + 1;
    }
    attended.fixed = max(0, place.share(attended.sink + last_block + 1 - attended.window));
    attended.count = attended.fixed + (listed_step == 1 ? listed_count : max(0, place.share(listed_count)));
    const int warps = attendBlocks<T, D, HeadTiles, Threads>(decode, place, shared, query, rows, attended, block.last);
    __syncthreads();
    sendResults<D, Threads>(decode, place, shared, warps);

    // What the caller wants to know beyond the output, while the results travel.
    if (place.rank == 0)
    {
        const bool searched = last_keys != nullptr;
        const bool kept_blocks = searched && !reuse && config.reuse_level == 0;
        if (searched && (kept_blocks || chosen_blocks != nullptr))
        {
            uint32_t* marks = shared.marks(0);
#pragma unroll 1
            for (int i = threadIdx.x; i < decode.capacity / 32; i += Threads)
            {
                marks[i] = 0;
            }
            __syncthreads();
            markBest<Threads>(last_keys, nodes.count, Asked{0, 0, nodes.count}, budget, marks);
            __syncthreads();
#pragma unroll 1
            for (int i = threadIdx.x; i < nodes.count; i += Threads)
            {
                if (getBit(marks, i))
                {
                    const int position = bitsBefore(marks, i);
                    if (kept_blocks)
                    {
                        present_nodes[position] = nodes[i];
                    }
                    if (chosen_blocks != nullptr)
                    {
                        chosen_blocks[position] = nodes[i];
                    }
                }
            }
            listed_count = min(budget, nodes.count);
        }
        else if (chosen_blocks != nullptr)
        {
            // None if dense; all candidates if they fit; else the reused blocks.
            const bool fits = block.contiguous && !config.dense;
            listed_count = fits ? block.window - block.sink : listed_count;
#pragma unroll 1
            for (int i = threadIdx.x; i < listed_count; i += Threads)
            {
                chosen_blocks[i] = fits ? block.sink + i : listed[i];
            }
        }
#pragma unroll 1
        for (int i = threadIdx.x; chosen_blocks != nullptr && i < budget; i += Threads)
        {
            if (i >= listed_count)
            {
                chosen_blocks[i] = -1;
            }
        }
#pragma unroll 1
        for (int i = threadIdx.x; !nodes_written && !kept_blocks && i < budget; i += Threads)
        {
            present_nodes[i] = reuse ? call.past_nodes[list + i] : -1;
        }
    }

    waitBarrier(shared.resultsReady(), 0);
    writeOutput<T, D, Threads>(decode, place, shared);
#endif
}

template <typename T, int D>
DecodeKernel findDecodeKernel(int heads, int threads)
{
    if (heads > kHeadTile)
    {
        return threads == 256 ? decodeKernel<T, D, 2, 256> : nullptr;
    }
    return threads == 256 ? decodeKernel<T, D, 1, 256> : decodeKernel<T, D, 1, 512>;
}

template <typename T>
DecodeKernel findDecodeKernel(int head_dim, int heads_per_mask, int threads)
{
    return head_dim == 64 ? findDecodeKernel<T, 64>(heads_per_mask, threads)
                          : findDecodeKernel<T, 128>(heads_per_mask, threads);
}

} // namespace hip_trt
