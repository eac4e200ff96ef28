// First kernel of a decode call: new rows are appended, and every candidate is scored by its bounds. The two do not meet:
// candidates are full blocks, and the call searches nothing that it writes.
#pragma once

#include "decode_append.cuh"
#include "decode_best.cuh"

namespace hip_trt::decode
{

// What a thread block scores: its share of the tiles of one sequence and mask head.
struct ScanPlace
{
    int b, mask, kv_head;
    int part;
};

// The elements of a pair that are below zero (or -0), and zeros for others.
__device__ __forceinline__ uint32_t negativePart(uint32_t pair)
{
    return pair & (pair >> 15 & 0x00010001u) * 0xffffu;
}

// On tensor cores: rows are blocks, columns query heads, and the inner dimension runs over lower, then upper bounds, of which
// each query element meets the one that its sign favours. The inner dimension may be in any order if it is the same for both
// sides, so lanes take 16 bytes each: with g = lane / 4 and t = lane % 4, chunk 4 j + t of row g, straight from memory.
template <typename T, int D, int HeadTiles>
struct MatrixScan
{
    static constexpr int kChunks = D / 32; // of a lane, in a row

    const Pages pages;
    int page[2]; // of rows g and g + 8 of the next tile; not looked at before it is that tile's turn
    uint4 query[HeadTiles][kChunks]; // of head g

    static __device__ __forceinline__ int firstTile(const ScanPlace& place)
    {
        return place.part * kWarps + warp();
    }

    // Where there is a search, no sink is longer than the sequence: candidates follow sink_blocks.
    __device__ __forceinline__ void lookUp(const Step& step, int tile)
    {
        page[0] = pages.page(step.sink_blocks + tile * kTileRows + lane() / 4);
        page[1] = pages.page(step.sink_blocks + tile * kTileRows + lane() / 4 + 8);
    }

    // Begins to load what does not depend on the sequence's length.
    __device__ __forceinline__ MatrixScan(const Step& step, const ScanPlace& place)
        : pages(step, place.b, place.kv_head)
    {
        lookUp(step, firstTile(place));
        const int g = lane() / 4, t = lane() % 4;
#pragma unroll
        for (int h = 0; h < HeadTiles; ++h)
        {
            const int head = h * kHeadTile + g;
            const int64_t row = (static_cast<int64_t>(place.b) * step.shape.num_query_heads
                                    + place.mask * step.heads_per_mask + head)
                * step.shape.new_tokens;
#pragma unroll
            for (int j = 0; j < kChunks; ++j)
            {
                query[h][j] = head < step.heads_per_mask
                    ? loadOnce(static_cast<const T*>(step.query) + row * D + 8 * (4 * j + t))
                    : make_uint4(0, 0, 0, 0);
            }
        }
    }

    // `blocks`: of rows g and g + 8 in the pool, negative for none. Returns the scores of both, in every lane of a row.
    __device__ __forceinline__ float2 score(const Step& step, const int (&blocks)[2]) const
    {
        const int t = lane() % 4;
        uint4 bounds[2][2][kChunks]; // low and high, of both rows
#pragma unroll
        for (int side = 0; side < 2; ++side)
        {
#pragma unroll
            for (int j = 0; j < kChunks; ++j)
            {
#pragma unroll
                for (int row = 0; row < 2; ++row)
                {
                    const T* const from = static_cast<const T*>(step.past_bounds)
                        + (static_cast<int64_t>(blocks[row]) * 2 + side) * D + 8 * (4 * j + t);
                    bounds[side][row][j] = blocks[row] < 0 ? make_uint4(0, 0, 0, 0) : loadOnce(from);
                }
            }
        }
        float sum[HeadTiles][4] = {};
#pragma unroll
        for (int side = 0; side < 2; ++side)
        {
#pragma unroll
            for (int j = 0; j < kChunks; ++j)
            {
#pragma unroll
                for (int u = 0; u < 4; u += 2)
                {
                    const uint4 &upper = bounds[side][0][j], &lower = bounds[side][1][j];
                    const uint32_t a[4] = {(&upper.x)[u], (&lower.x)[u], (&upper.x)[u + 1], (&lower.x)[u + 1]};
#pragma unroll
                    for (int h = 0; h < HeadTiles; ++h)
                    {
                        uint32_t q[2] = {(&query[h][j].x)[u], (&query[h][j].x)[u + 1]};
#pragma unroll
                        for (int i = 0; i < 2; ++i)
                        {
                            const uint32_t negative = negativePart(q[i]);
                            q[i] = side == 0 ? negative : q[i] ^ negative;
                        }
                        multiplyAdd<T>(sum[h], a, q[0], q[1]);
                    }
                }
            }
        }
        float best[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int i = 0; i < 4 * HeadTiles; ++i)
        {
            const float score = sum[i / 4][i % 4];
            const bool counts = i / 4 * kHeadTile + 2 * t + i % 2 < step.heads_per_mask;
            best[i % 4 / 2] = fmaxf(best[i % 4 / 2], !counts ? -INFINITY : score == score ? score : INFINITY);
        }
#pragma unroll
        for (int row = 0; row < 2; ++row)
        {
            best[row] = fmaxf(best[row], __shfl_xor_sync(kAllLanes, best[row], 1));
            best[row] = fmaxf(best[row], __shfl_xor_sync(kAllLanes, best[row], 2));
        }
        return make_float2(best[0], best[1]);
    }

    // Score this warp's tiles.
    __device__ __forceinline__ void run(const Step& step, const ScanPlace& place, const Sequence& sequence)
    {
        const int g = lane() / 4, t = lane() % 4;
        const int count = sequence.candidates();
        uint32_t* const scores = step.scores + pairIndex(step, place.b, place.mask) * step.score_stride;
        for (int tile = firstTile(place); tile * kTileRows < count; tile += step.scan_parts * kWarps)
        {
            const int first = tile * kTileRows + g;
            int blocks[2];
#pragma unroll
            for (int row = 0; row < 2; ++row)
            {
                const int index = first + 8 * row;
                blocks[row] = index < count ? pages.inPool(step.sink_blocks + index, page[row]) : -1;
            }
            lookUp(step, tile + step.scan_parts * kWarps);
            const float2 best = score(step, blocks);
            const int index = first + t * 8;
            if (t < 2 && index < count)
            {
                scores[index] = scoreKey(t == 0 ? best.x : best.y);
            }
        }
    }
};

// On plain arithmetic: a warp per block, lanes over dimensions.
template <typename T>
struct PlainScan
{
    __device__ __forceinline__ PlainScan(const Step&, const ScanPlace&)
    {
    }

    __device__ __forceinline__ void run(const Step& step, const ScanPlace& place, const Sequence& sequence) const
    {
        const int dims = step.shape.head_dim;
        const Pages pages(step, place.b, place.kv_head);
        const T* const queries = static_cast<const T*>(step.query)
            + (static_cast<int64_t>(place.b) * step.shape.num_query_heads + place.mask * step.heads_per_mask)
                * step.shape.new_tokens * dims;
        uint32_t* const scores = step.scores + pairIndex(step, place.b, place.mask) * step.score_stride;
        for (int i = place.part * kWarps + warp(); i < sequence.candidates(); i += step.scan_parts * kWarps)
        {
            const T* const low = static_cast<const T*>(step.past_bounds)
                + static_cast<int64_t>(pages.inPool(sequence.first + i)) * 2 * dims;
            float best = -INFINITY;
            for (int head = 0; head < step.heads_per_mask; ++head)
            {
                const T* const query = queries + static_cast<int64_t>(head) * step.shape.new_tokens * dims;
                float sum = 0;
                for (int d = lane(); d < dims; d += kLanes)
                {
                    const float q = toFloat(query + d);
                    sum += fminf(q, 0.0f) * toFloat(low + d) + fmaxf(q, 0.0f) * toFloat(low + dims + d);
                    sum = q == q ? sum : q;
                }
                for (int distance = kLanes / 2; distance > 0; distance /= 2)
                {
                    sum += __shfl_xor_sync(kAllLanes, sum, distance);
                }
                best = fmaxf(best, sum == sum ? sum : INFINITY);
            }
            if (lane() == 0)
            {
                scores[i] = scoreKey(best);
            }
        }
    }
};

template <typename T, typename Scan>
__global__ void __launch_bounds__(kThreads, 2) scanKernel(const __grid_constant__ Step step)
{
    waitForEarlierKernels();
    letNextKernelStart();
    ScanPlace place;
    place.b = blockIdx.z;
    place.mask = blockIdx.y;
    place.kv_head = place.mask * step.heads_per_mask / step.heads_per_kv;
    place.part = static_cast<int>(blockIdx.x) - step.append_blocks;
    if (place.part < 0)
    {
        if (place.mask * step.heads_per_mask % step.heads_per_kv == 0) // the first mask head of the key/value head
        {
            appendBlock<T>(step, place.b, place.kv_head, blockIdx.x);
        }
        return;
    }
    // All loads first: each takes long, and what they decide together comes after.
    const int64_t pair = pairIndex(step, place.b, place.mask);
    Scan scan(step, place);
    const int refresh = loadCurrent(step.refresh_mask + place.b);
    const int first_kept = loadCurrent(step.past_blocks + pair * step.budget);
    const Sequence sequence(step, place.b);
    // Decided here, as present_blocks may be written onto past_blocks later.
    const bool searches = sequence.rows > 0 && !sequence.attendsAll(step) && (refresh != 0 || first_kept < 0);
    if (place.part == 0)
    {
        for (int i = threadIdx.x; i < step.row_groups; i += kThreads)
        {
            step.tickets[pair * step.row_groups + i] = 0;
        }
        if (threadIdx.x == 0)
        {
            step.searches[pair] = searches;
        }
    }
    if (searches && sequence.candidates() > step.searched)
    {
        scan.run(step, place, sequence);
    }
}

template <typename T>
auto findScanKernel(const Step& step) -> void (*)(Step)
{
    if constexpr (sizeof(T) == 2)
    {
        const bool one = step.heads_per_mask <= kHeadTile;
        switch (step.shape.head_dim)
        {
        case 64: return one ? scanKernel<T, MatrixScan<T, 64, 1>> : scanKernel<T, MatrixScan<T, 64, 2>>;
        case 128: return one ? scanKernel<T, MatrixScan<T, 128, 1>> : scanKernel<T, MatrixScan<T, 128, 2>>;
        }
    }
    return scanKernel<T, PlainScan<T>>;
}

template <typename T>
cudaError_t launchScan(const Step& step, cudaStream_t stream)
{
    return launchOverlapped(step.overlap, findScanKernel<T>(step),
        dim3(step.append_blocks + step.scan_parts, step.mask_heads, step.shape.batch), kThreads, 0, stream, step);
}

} // namespace hip_trt::decode
