// New rows to the pools; where they fill a block, its bounds and codes. A thread block does one block of a key/value head.
#pragma once

#include "decode_elements.cuh"

namespace hip_trt::decode
{

// How a thread block shares out the keys of a block: a thread takes 16 bytes of every groups-th row.
struct RowShare
{
    int chunks; // of 16 bytes in a row
    int chunk;  // this thread's; none if not below `chunks`
    int group;
    int groups;

    __device__ __forceinline__ explicit RowShare(int row_bytes)
        : chunks(row_bytes / 16)
    {
        int width = 1; // a power of two, so that lanes whose codes share a word are neighbours
        while (width < chunks)
        {
            width *= 2;
        }
        chunk = threadIdx.x % width;
        group = threadIdx.x / width;
        groups = kThreads / width;
    }
};

template <typename T>
struct BlockAppend
{
    static constexpr int kElements = kChunk<T>;
    static constexpr int kMaxHeadDim = 256;

    struct Shared
    {
        float extremes[2][kThreads * kElements];
        float bounds[2][kMaxHeadDim];
    };

    const Step& step;
    int first; // token of the block
    int past, end;
    int pool_block;    // index in the pool, in blocks
    int64_t new_row;   // index of the sequence's first new row, in rows

    __device__ __forceinline__ const uint4* pool(const void* rows, int token) const
    {
        const int64_t row = (static_cast<int64_t>(pool_block) << step.block_log2) + token - first;
        return static_cast<const uint4*>(rows) + row * (step.row_bytes / 16);
    }

    __device__ __forceinline__ const uint4* given(const void* rows, int token) const
    {
        return static_cast<const uint4*>(rows) + (new_row + token - past) * (step.row_bytes / 16);
    }

    // 16 bytes of a key, from where it does not depend on what this call writes.
    __device__ __forceinline__ uint4 key(int token, int chunk) const
    {
        return token < past ? pool(step.present_key, token)[chunk] : given(step.key, token)[chunk];
    }

    __device__ __forceinline__ void copyRows() const
    {
        const int chunks = step.row_bytes / 16;
        const int begin = max(first, past), count = min(end, first + step.config.decode_block_k) - begin;
        for (int i = threadIdx.x; i < count * chunks; i += kThreads)
        {
            const int token = begin + i / chunks, chunk = i % chunks;
            const_cast<uint4*>(pool(step.present_key, token))[chunk] = given(step.key, token)[chunk];
            const_cast<uint4*>(pool(step.present_value, token))[chunk] = given(step.value, token)[chunk];
        }
    }

    // NaN wins.
    __device__ __forceinline__ void findBounds(Shared& shared, const RowShare& share) const
    {
        float low[kElements], high[kElements];
#pragma unroll
        for (int e = 0; e < kElements; ++e)
        {
            low[e] = INFINITY;
            high[e] = -INFINITY;
        }
        if (share.chunk < share.chunks)
        {
#pragma unroll 4
            for (int row = share.group; row < step.config.decode_block_k; row += share.groups)
            {
                float k[kElements];
                unpack<T>(k, key(first + row, share.chunk));
#pragma unroll
                for (int e = 0; e < kElements; ++e)
                {
                    low[e] = k[e] < low[e] || k[e] != k[e] ? k[e] : low[e];
                    high[e] = k[e] > high[e] || k[e] != k[e] ? k[e] : high[e];
                }
            }
        }
#pragma unroll
        for (int e = 0; e < kElements; ++e)
        {
            shared.extremes[0][threadIdx.x * kElements + e] = low[e];
            shared.extremes[1][threadIdx.x * kElements + e] = high[e];
        }
        __syncthreads();
        const int dims = step.shape.head_dim, stride = kThreads / share.groups * kElements;
        T* const to = static_cast<T*>(step.present_bounds) + static_cast<int64_t>(pool_block) * 2 * dims;
        for (int d = threadIdx.x; d < dims; d += kThreads)
        {
            float least = shared.extremes[0][d], most = shared.extremes[1][d];
            for (int at = d + stride; at < kThreads * kElements; at += stride)
            {
                const float other_low = shared.extremes[0][at], other_high = shared.extremes[1][at];
                least = other_low < least || other_low != other_low ? other_low : least;
                most = other_high > most || other_high != other_high ? other_high : most;
            }
            shared.bounds[0][d] = least;
            shared.bounds[1][d] = most;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < 2 * dims / 4; i += kThreads)
        {
            const float* from = &shared.bounds[4 * i / dims][4 * i % dims];
            storeFour<T>(to + 4 * i, make_float4(from[0], from[1], from[2], from[3]));
        }
    }

    // The number of true statements among 6 (k - low) >= r, 3 r, 5 r.
    static __device__ __forceinline__ uint32_t code(float k, float low, float high)
    {
        const float range = high - low, above = 6 * (k - low);
        return range == 0 ? 0u : (above >= range) + (above >= 3 * range) + (above >= 5 * range);
    }

    __device__ __forceinline__ void writeCodes(const Shared& shared, const RowShare& share) const
    {
        constexpr int kChunksPerWord = 16 / kElements;
        const int words = step.shape.head_dim / 16, block = step.config.decode_block_k;
        const int piece = share.chunk % kChunksPerWord;
        int32_t* const to = step.present_codes + static_cast<int64_t>(pool_block) * block * words;
        for (int row = share.group; row - share.group < block; row += share.groups) // the same rounds for all lanes
        {
            const bool active = share.chunk < share.chunks && row < block;
            uint32_t bits = 0;
            if (active)
            {
                float k[kElements];
                unpack<T>(k, key(first + row, share.chunk));
#pragma unroll
                for (int e = 0; e < kElements; ++e)
                {
                    const int d = share.chunk * kElements + e;
                    bits |= code(k[e], shared.bounds[0][d], shared.bounds[1][d]) << 2 * (d % 16);
                }
            }
#pragma unroll
            for (int other = 1; other < kChunksPerWord; other *= 2)
            {
                bits |= __shfl_xor_sync(kAllLanes, bits, other);
            }
            if (active && piece == 0)
            {
                to[row * words + share.chunk / kChunksPerWord] = static_cast<int32_t>(bits);
            }
        }
    }
};

// Do the index-th block that a sequence's new rows can touch, for one key/value head.
template <typename T>
__device__ __forceinline__ void appendBlock(const Step& step, int b, int kv_head, int index)
{
    __shared__ typename BlockAppend<T>::Shared shared;
    const Sequence sequence(step, b);
    const int block = (sequence.past >> step.block_log2) + index, first = block << step.block_log2;
    if (first >= sequence.end() || sequence.rows == 0)
    {
        return;
    }
    const int pool_block = Pages(step, b, kv_head).inPool(block);
    const int64_t new_row
        = (static_cast<int64_t>(b) * step.shape.num_kv_heads + kv_head) * step.shape.new_tokens;
    const BlockAppend<T> append{step, first, sequence.past, sequence.end(), pool_block, new_row};
    append.copyRows();
    if (first + step.config.decode_block_k <= sequence.end() && !step.config.dense)
    {
        const RowShare share(step.row_bytes);
        append.findBounds(shared, share);
        append.writeCodes(shared, share);
    }
}

// Clear the output of padding rows, those that would stand in the index-th block, of a key/value head's query heads.
__device__ __forceinline__ void clearPadding(const Step& step, int b, int kv_head, int index)
{
    const Sequence sequence(step, b);
    const int first = ((sequence.past >> step.block_log2) + index) << step.block_log2;
    const int begin = max(first, sequence.end()) - sequence.past;
    const int end = min(first + step.config.decode_block_k - sequence.past, step.shape.new_tokens);
    const int chunks = step.row_bytes / 16;
    for (int head = kv_head * step.heads_per_kv; head < (kv_head + 1) * step.heads_per_kv; ++head)
    {
        const int64_t row
            = (static_cast<int64_t>(b) * step.shape.num_query_heads + head) * step.shape.new_tokens + begin;
        for (int i = threadIdx.x; i < (end - begin) * chunks; i += kThreads)
        {
            static_cast<uint4*>(step.output)[row * chunks + i] = make_uint4(0, 0, 0, 0);
        }
    }
}

// A chunk of a prompt.
template <typename T>
__global__ void __launch_bounds__(kThreads) appendKernel(const __grid_constant__ Step step)
{
    waitForEarlierKernels();
    letNextKernelStart();
    appendBlock<T>(step, blockIdx.z, blockIdx.y, blockIdx.x);
    if (step.output != nullptr)
    {
        clearPadding(step, blockIdx.z, blockIdx.y, blockIdx.x);
    }
}

template <typename T>
cudaError_t launchAppend(const Step& step, cudaStream_t stream)
{
    return launchOverlapped(step.overlap, appendKernel<T>,
        dim3(step.append_blocks, step.shape.num_kv_heads, step.shape.batch), kThreads, 0, stream, step);
}

} // namespace hip_trt::decode
