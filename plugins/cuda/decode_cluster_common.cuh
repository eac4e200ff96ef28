// What search and attention of the decode kernel share: where things are, how they get there, and products of keys and
// queries.
//
// Layouts, with g = lane / 4 and t = lane % 4. A product of 16 keys and 8 query heads is a tensor-core tile whose inner
// dimension may be permuted, if it is for both sides: so a lane takes 16 contiguous bytes, chunk 4 j + t of row g, of
// keys and queries alike, straight from memory.
#pragma once

#include "block_cache.cuh"
#include "decode_cluster.cuh"
#include "decode_cluster_ptx.cuh"
#include "warp_tile.cuh"

namespace hip_trt
{

constexpr int kHeadTile = 8;      // query heads of a tensor-core tile
constexpr int kNone = 1 << 30;    // larger than any token or node

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

static_assert(sizeof(BlockCache) == kBlockCacheBytes && kCacheThreads == kDecodeThreads, "room for the caches");

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

    // The nodes of the last exchange.
    __device__ __forceinline__ LevelNodes* lastNodes() const
    {
        return at<LevelNodes>(kBarrierBytes);
    }

    // The caches of keys and of values, if pools are in host memory.
    __device__ __forceinline__ BlockCache* caches() const
    {
        return at<BlockCache>(kCachesAt);
    }

    // One bit a candidate.
    __device__ __forceinline__ int marksAt(int parity) const
    {
        return decode.layout.marks + parity * (decode.capacity / 8);
    }

    __device__ __forceinline__ uint32_t* marks(int parity) const
    {
        return at<uint32_t>(marksAt(parity));
    }

    // One score a candidate, as orderedKey gives it.
    __device__ __forceinline__ int keysAt(int parity) const
    {
        return decode.layout.keys + parity * decode.capacity * static_cast<int>(sizeof(uint32_t));
    }

    __device__ __forceinline__ uint32_t* keys(int parity) const
    {
        return at<uint32_t>(keysAt(parity));
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

    // The query rows of the mask head, as a staged tile.
    __device__ __forceinline__ char* queries() const
    {
        return at<char>(decode.layout.queries);
    }

    // What a warp has for itself: a staged tile, then its weighted sums of values, [G, D + kPartialPadding] floats.
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
    int num_pages;
    Divisor page_size;
    int heads;
    int head;

    __device__ __forceinline__ uint32_t operator()(int token) const
    {
        const int slot = page_size.divide(token);
        const uint32_t first = (pageInPool(table[slot], num_pages) * heads + head) * page_size.divisor;
        return first + token - slot * page_size.divisor;
    }

    // Whether a token's page is in the pool.
    __device__ __forceinline__ bool holds(int token) const
    {
        return static_cast<uint32_t>(table[page_size.divide(token)]) < static_cast<uint32_t>(num_pages);
    }
};

// Sixteen rows of D elements, two halves of eight, on their way to a warp through shared memory. Chunks of 16 bytes are
// permuted within each row, so that lanes that read together use different banks: those with chunk 4 j + t of row g, as
// for the product of keys and queries, and those with chunk g of row 2 t, as for that of weights and values. The
// permutation is exclusive or with a mask of the row, so an address splits into what is the lane's and what is constant.
template <typename T, int D>
struct StagedTile
{
    static constexpr int kElements = 16 * D;
    static constexpr int kChunkElements = 8;
    static constexpr int kChunks = D / kChunkElements;  // of a row
    static constexpr int kLines = kWarpSize / kChunks; // that a warp copies at once

    // For lines that share no bits, mask(a + b) = mask(a) ^ mask(b).
    static constexpr __host__ __device__ int mask(int line)
    {
        return ((line / 2 % 4 * 2) ^ (line % 2 * 4)) * kChunkElements;
    }

    static __device__ __forceinline__ int at(int line, int chunk)
    {
        return line * D + (chunk * kChunkElements ^ mask(line));
    }

    // Start to copy; half h is the eight rows from rows[h] on.
    static __device__ __forceinline__ void copy(T* tile, const T* const (&rows)[2])
    {
        const int lane = threadIdx.x % kWarpSize, line = lane / kChunks, chunk = lane % kChunks;
        const int from = line * D + chunk * kChunkElements, to = at(line, chunk);
#pragma unroll
        for (int half = 0; half < 2; ++half)
        {
#pragma unroll
            for (int first = 0; first < 8; first += kLines)
            {
                copyAsync16(tile + (8 * half + first) * D + (to ^ mask(first)), rows[half] + from + first * D, true);
            }
        }
    }

    // The same, line by line: row(line) is where it is, and lines from `lines` on become zeros.
    template <typename Row>
    static __device__ __forceinline__ void copyLines(T* tile, int lines, Row row)
    {
        const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
        for (int first = 0; first < 16; first += kLines)
        {
            const int line = first + lane / kChunks, chunk = lane % kChunks;
            const bool valid = line < lines;
            copyAsync16(tile + at(line, chunk), row(valid ? line : 0) + chunk * kChunkElements, valid);
        }
    }

    // visit(line, chunk): every chunk once, by one lane of the warp.
    template <typename Visit>
    static __device__ __forceinline__ void forLines(Visit visit)
    {
        const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
        for (int first = 0; first < 16; first += kLines)
        {
            visit(first + lane / kChunks, lane % kChunks);
        }
    }

    static __device__ __forceinline__ uint4 read(const T* tile, int element, int first_line = 0)
    {
        return *reinterpret_cast<const uint4*>(tile + element + first_line * D);
    }
};

// The query rows of a mask head, as right operands.
template <typename T, int D, int HeadTiles>
struct QueryOperand
{
    uint32_t pair[HeadTiles][D / 32][4]; // words 0, 2, 1, 3 of chunk 4 j + t of row g

    // `queries`: staged.
    __device__ __forceinline__ explicit QueryOperand(const T* queries)
    {
        const int lane = threadIdx.x % kWarpSize;
#pragma unroll
        for (int h = 0; h < HeadTiles; ++h)
        {
#pragma unroll
            for (int j = 0; j < D / 32; ++j)
            {
                const uint4 chunk = StagedTile<T, D>::read(
                    queries, StagedTile<T, D>::at(lane / 4, lane % 4) ^ 4 * j * StagedTile<T, D>::kChunkElements,
                    kHeadTile * h);
                pair[h][j][0] = chunk.x;
                pair[h][j][1] = chunk.z;
                pair[h][j][2] = chunk.y;
                pair[h][j][3] = chunk.w;
                settle(pair[h][j]);
            }
        }
    }

    // Products of eight keys with all heads: product[h][e] is that of key g with head 2t + e of head tile h. The keys
    // come as chunks 4 j + t of row g. Such a chunk is a whole left operand, with no word moved, if its odd words pass for
    // rows 8 to 15: one instruction has the even words right, another one the odd words.
    __device__ __forceinline__ void multiply(float (&product)[HeadTiles][2], const uint4 (&keys)[D / 32]) const
    {
#pragma unroll
        for (int h = 0; h < HeadTiles; ++h)
        {
            float even[4] = {}, odd[4] = {};
#pragma unroll
            for (int j = 0; j < D / 32; ++j)
            {
                const uint32_t left[4] = {keys[j].x, keys[j].y, keys[j].z, keys[j].w};
                multiplyAdd<T>(even, left, pair[h][j][0], pair[h][j][1]);
                multiplyAdd<T>(odd, left, pair[h][j][2], pair[h][j][3]);
            }
            product[h][0] = even[0] + odd[2];
            product[h][1] = even[1] + odd[3];
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

} // namespace hip_trt
