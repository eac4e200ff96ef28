// The paged KV cache: token t of a sequence is row t % page_size of its page t / page_size. Mirrors
// hip_trt/reference/cache.py. Offsets are 64-bit: pools exceed 2^31 elements.
#pragma once

#include "call.cuh"
#include "ptx.cuh"

namespace hip_trt
{

constexpr unsigned kFullWarp = 0xffffffff;
constexpr int kWarpSize = 32;

// A page of the pool, from an entry of the page table: of one outside the pool, page 0, which is at least there to read.
__device__ __forceinline__ uint32_t pageInPool(int32_t page, int num_pages)
{
    return static_cast<uint32_t>(page) < static_cast<uint32_t>(num_pages) ? static_cast<uint32_t>(page) : 0;
}

// The rows of one key/value head of one sequence.
struct PagedRows
{
    const int32_t* pages;
    int num_pages;
    int page_size;
    int heads;
    int head;

    __device__ PagedRows(const Call& call, int b, int kv_head)
        : pages(call.page_table + static_cast<int64_t>(b) * call.shape.pages_per_sequence)
        , num_pages(call.shape.num_pages)
        , page_size(call.config.page_size)
        , heads(call.shape.num_kv_heads)
        , head(kv_head)
    {
    }

    // Index of a token's row in the pool [P, Hkv, page_size, D], counted in rows of D elements.
    __device__ int64_t row(int token) const
    {
        const int slot = token / page_size;
        return (static_cast<int64_t>(pageInPool(pages[slot], num_pages)) * heads + head) * page_size
            + (token - slot * page_size);
    }

    // Whether a token's page is in the pool: if not, nothing is written for it.
    __device__ bool holds(int token) const
    {
        return static_cast<uint32_t>(pages[token / page_size]) < static_cast<uint32_t>(num_pages);
    }
};

// Rows of a shared-memory tile are 16 bytes longer than D elements, so that the eight rows that a matrix load touches
// at once lie in different banks.
template <typename T, int D>
constexpr int kTileStride = D + 16 / static_cast<int>(sizeof(T));

constexpr int64_t kNoRow = INT64_MIN;

// One warp starts to copy Rows rows to shared memory. Lane i < Rows says where row i is, in bytes from `source`; kNoRow, and
// what lies beyond row_bytes, becomes zeros.
template <typename T, int D, int Rows>
__device__ __forceinline__ void copyRowsFromAsync(T* tile, const void* source, int64_t offset, int row_bytes)
{
    constexpr int kElements = 16 / sizeof(T);
    constexpr int kRowLanes = D / kElements; // 16 bytes each
    constexpr int kRowsAtOnce = kWarpSize / kRowLanes;
    static_assert(Rows <= kWarpSize && Rows % kRowsAtOnce == 0, "a warp copies whole rounds of rows");
    const int lane = threadIdx.x % kWarpSize;
    const int chunk = lane % kRowLanes;
    const char* column = static_cast<const char*>(source) + chunk * 16;
    T* to = tile + lane / kRowLanes * kTileStride<T, D> + chunk * kElements;
#pragma unroll 4
    for (int first = 0; first < Rows; first += kRowsAtOnce)
    {
        const int64_t from = __shfl_sync(kFullWarp, offset, first + lane / kRowLanes);
        const bool valid = from != kNoRow && chunk * 16 < row_bytes;
        copyAsync16(to + first * kTileStride<T, D>, valid ? column + from : column, valid);
    }
}

// The same where lane i gives the index of row i in `source` (rows of row_bytes), or a negative number for none.
template <typename T, int D, int Rows>
__device__ __forceinline__ void copyRowsAsync(T* tile, const void* source, int64_t row, int row_bytes)
{
    copyRowsFromAsync<T, D, Rows>(tile, source, row < 0 ? kNoRow : row * row_bytes, row_bytes);
}

} // namespace hip_trt
