// Third kernel of a decode call: attention over sink, chosen blocks and window. The tiles of 16 tokens of a sequence and mask
// head are dealt to the warps of its thread blocks, whose results the last thread block to end puts together.
#pragma once

#include "decode_chosen.cuh"
#include "decode_plan.cuh"

#include <algorithm>

namespace hip_trt::decode
{

// Rows are query rows of all heads of a mask, head by head, padding included.
struct QueryRow
{
    int row;
    int64_t index; // in [B, Hq, S], in rows
    bool exists;   // it may be padding
    bool valid;

    __device__ __forceinline__ QueryRow(const Step& step, const AttendPlace& place, const Sequence& sequence, int i)
    {
        const int new_tokens = step.shape.new_tokens, of_mask = place.group * step.row_group + i;
        const int head = step.new_tokens.divide(of_mask);
        row = of_mask - head * new_tokens;
        index = (static_cast<int64_t>(place.b) * step.shape.num_query_heads + place.mask * step.heads_per_mask)
                * new_tokens
            + of_mask;
        exists = head < step.heads_per_mask;
        valid = exists && row < sequence.rows;
    }
};

// The results of a thread block in the workspace.
struct Partial
{
    float* output;  // [row_group, D]
    float2* states; // [row_group]

    __device__ __forceinline__ Partial(const Step& step, const AttendPlace& place, int part)
    {
        const int64_t index = (place.pair * step.row_groups + place.group) * step.attend_parts + part;
        output = step.partial_output + index * step.row_group * step.shape.head_dim;
        states = step.partial_state + index * step.row_group;
    }

    // Of a row, as another thread block left it.
    __device__ __forceinline__ float2 state(int row) const
    {
        const unsigned long long both = loadCurrent(reinterpret_cast<const unsigned long long*>(states + row));
        return make_float2(__uint_as_float(static_cast<uint32_t>(both)), __uint_as_float(static_cast<uint32_t>(both >> 32)));
    }
};

// On tensor cores. With g = lane / 4 and t = lane % 4: logits are products of 16 tokens (rows) and 8 query rows (columns),
// results of 16 dimensions (rows) and 8 query rows.
template <typename T, int D, int RowTiles>
struct MatrixAttention
{
    static constexpr int kRows = 8 * RowTiles;
    static constexpr int kTileStride = D + 8; // of staged keys and values: rows that are read at once use different banks
    static constexpr int kTileBytes = 2 * kTileRows * kTileStride * static_cast<int>(sizeof(T)); // keys and values
    static constexpr int kSumStride = D + 4;  // of results in shared memory, likewise
    static constexpr int kSumBytes = kRows * kSumStride * static_cast<int>(sizeof(float));

    static __host__ __device__ int warpBytes(int stages)
    {
        return stages * kTileBytes > kSumBytes ? stages * kTileBytes : kSumBytes;
    }

    const Step& step;
    const AttendPlace& place;
    const int past; // position of the first row: the others see more
    uint32_t query[RowTiles][D / 16][2];
    int visible[RowTiles][2]; // position of row 8 n + 2 t + e
    float sum[D / 16][RowTiles][4] = {};
    float largest[RowTiles][2]; // logits, base 2
    float weight[RowTiles][2] = {}; // this lane's share

    __device__ __forceinline__ MatrixAttention(const Step& step, const AttendPlace& place, const Sequence& sequence)
        : step(step)
        , place(place)
        , past(sequence.past)
    {
        const int g = lane() / 4, t = lane() % 4;
#pragma unroll
        for (int n = 0; n < RowTiles; ++n)
        {
            const QueryRow row(step, place, sequence, 8 * n + g);
            const uint32_t* const from = static_cast<const uint32_t*>(step.query) + row.index * (D / 2) + t;
#pragma unroll
            for (int k = 0; k < D / 16; ++k)
            {
                query[n][k][0] = row.valid ? from[8 * k] : 0;
                query[n][k][1] = row.valid ? from[8 * k + 4] : 0;
            }
#pragma unroll
            for (int e = 0; e < 2; ++e)
            {
                visible[n][e] = sequence.past + QueryRow(step, place, sequence, 8 * n + 2 * t + e).row;
                largest[n][e] = -INFINITY;
            }
        }
    }

    // Start to copy 16 rows that follow one another in a pool; zeros from row `count` on.
    static __device__ __forceinline__ void copyRows(T* to, const void* pool, int64_t row, int count)
    {
        constexpr int kChunks = D / 8; // of a row
        const char* const from = static_cast<const char*>(pool) + row * (D * sizeof(T)) + lane() * 16;
        T* const target = to + lane() / kChunks * kTileStride + lane() % kChunks * 8;
#pragma unroll
        for (int first = 0; first < kTileRows; first += kLanes / kChunks)
        {
            copyAsync16(target + first * kTileStride, from + first * D * sizeof(T), first + lane() / kChunks < count);
        }
    }

    __device__ __forceinline__ void findLogits(float (&logits)[RowTiles][4], const T* keys) const
    {
        const T* const row = keys + lane() % 16 * kTileStride + lane() / 16 * 8;
#pragma unroll
        for (int k = 0; k < D / 16; ++k)
        {
            uint32_t a[4];
            loadMatrices(a, row + 16 * k);
#pragma unroll
            for (int n = 0; n < RowTiles; ++n)
            {
                multiplyAdd<T>(logits[n], a, query[n][k][0], query[n][k][1]);
            }
        }
    }

    // Logits to weights of the softmax under way, and what was summed to the new largest logit.
    __device__ __forceinline__ void weigh(float (&logits)[RowTiles][4], int token)
    {
        const int g = lane() / 4;
        const float scale = step.config.scale * 1.4426950408889634f;
        const bool all_visible = token + kTileRows - 1 <= past;
#pragma unroll
        for (int n = 0; n < RowTiles; ++n)
        {
#pragma unroll
            for (int e = 0; e < 2; ++e)
            {
                float& upper = logits[n][e];
                float& lower = logits[n][e + 2];
                upper = all_visible || token + g <= visible[n][e] ? upper * scale : -INFINITY;
                lower = all_visible || token + g + 8 <= visible[n][e] ? lower * scale : -INFINITY;
                float most = fmaxf(upper, lower);
#pragma unroll
                for (int distance = 4; distance < kLanes; distance *= 2)
                {
                    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, distance));
                }
                most = fmaxf(most, largest[n][e]);
                const float from = most == -INFINITY ? 0.0f : most; // nothing visible yet
                const float decay = exp2Fast(largest[n][e] - from);
                largest[n][e] = most;
                upper = exp2Fast(upper - from);
                lower = exp2Fast(lower - from);
                weight[n][e] = weight[n][e] * decay + upper + lower;
#pragma unroll
                for (int d = 0; d < D / 16; ++d)
                {
                    sum[d][n][e] *= decay;
                    sum[d][n][e + 2] *= decay;
                }
            }
        }
    }

    __device__ __forceinline__ void addValues(const float (&weights)[RowTiles][4], const T* values)
    {
        uint32_t b[RowTiles][2];
#pragma unroll
        for (int n = 0; n < RowTiles; ++n)
        {
            b[n][0] = transposeMatrix(packPair<T>(weights[n][0], weights[n][1]));
            b[n][1] = transposeMatrix(packPair<T>(weights[n][2], weights[n][3]));
        }
        const T* const row = values + (lane() / 16 * 8 + lane() % 8) * kTileStride + lane() / 8 % 2 * 8;
#pragma unroll
        for (int d = 0; d < D / 16; ++d)
        {
            uint32_t a[4];
            loadMatricesTransposed(a, row + 16 * d);
#pragma unroll
            for (int n = 0; n < RowTiles; ++n)
            {
                multiplyAdd<T>(sum[d][n], a, b[n][0], b[n][1]);
            }
        }
    }

    // Attend to this warp's tiles. `memory`: of the warp.
    __device__ __forceinline__ void run(const AttendedTiles& tiles, T* memory)
    {
        const int first = place.part * kWarps + warp(), stride = step.attend_parts * kWarps, count = tiles.count();
        const int mine = first < count ? (count - first + stride - 1) / stride : 0;
        const Pages pages(step, place.b, place.kv_head);
        int pool_block = -1; // of this lane's tile of the next 32
        int filled = 0, read = 0; // stages that are next
        const auto next = [&](int& stage) {
            T* const tile = memory + stage * (kTileBytes / sizeof(T));
            stage = stage + 1 == step.stages ? 0 : stage + 1;
            return tile;
        };
        const auto start = [&](int i) {
            if (i < mine)
            {
                if (i % kLanes == 0 && i + lane() < mine)
                {
                    pool_block = pages.inPool(tiles.token(first + (i + lane()) * stride) >> step.block_log2);
                }
                const int token = tiles.token(first + i * stride);
                const int64_t row
                    = (static_cast<int64_t>(__shfl_sync(kAllLanes, pool_block, i % kLanes)) << step.block_log2)
                    + (token & (step.config.decode_block_k - 1));
                T* const to = next(filled);
                copyRows(to, step.present_key, row, tiles.end - token);
                copyRows(to + kTileRows * kTileStride, step.present_value, row, tiles.end - token);
            }
            commitCopies();
        };
        for (int i = 0; i < step.stages - 1; ++i)
        {
            start(i);
        }
#pragma unroll 1
        for (int i = 0; i < mine; ++i)
        {
            start(i + step.stages - 1);
            waitForTile();
            const T* const keys = next(read);
            float logits[RowTiles][4] = {};
            findLogits(logits, keys);
            weigh(logits, tiles.token(first + i * stride));
            addValues(logits, keys + kTileRows * kTileStride);
            __syncwarp();
        }
        waitCopies<0>();
    }

    // Until the oldest tile is here.
    __device__ __forceinline__ void waitForTile() const
    {
        switch (step.stages)
        {
        case 1: waitCopies<0>(); break;
        case 2: waitCopies<1>(); break;
        default: waitCopies<2>(); break;
        }
        __syncwarp();
    }

    // This warp's results to shared memory: sums [kRows, kSumStride], states [kRows].
    __device__ __forceinline__ void store(float* sums, float2* states) const
    {
        const int g = lane() / 4, t = lane() % 4;
        __syncwarp();
#pragma unroll
        for (int n = 0; n < RowTiles; ++n)
        {
#pragma unroll
            for (int e = 0; e < 2; ++e)
            {
                const int row = 8 * n + 2 * t + e;
#pragma unroll
                for (int d = 0; d < D / 16; ++d)
                {
                    sums[row * kSumStride + 16 * d + g] = sum[d][n][e];
                    sums[row * kSumStride + 16 * d + g + 8] = sum[d][n][e + 2];
                }
                float total = weight[n][e];
#pragma unroll
                for (int distance = 4; distance < kLanes; distance *= 2)
                {
                    total += __shfl_xor_sync(kAllLanes, total, distance);
                }
                if (g == 0)
                {
                    states[row] = make_float2(largest[n][e], total);
                }
            }
        }
    }

    // The warps' results, put together, to the workspace. For all threads.
    static __device__ __forceinline__ void combineWarps(
        const Partial& partial, const char* memory, int warp_bytes, const float2 (&states)[kWarps][kRows])
    {
        for (int i = threadIdx.x; i < kRows * D / 4; i += kThreads)
        {
            const int row = i / (D / 4), d = i % (D / 4) * 4;
            float most = -INFINITY;
#pragma unroll
            for (int w = 0; w < kWarps; ++w)
            {
                most = fmaxf(most, states[w][row].x);
            }
            const float from = most == -INFINITY ? 0.0f : most;
            float4 total = make_float4(0, 0, 0, 0);
            float weights = 0;
#pragma unroll
            for (int w = 0; w < kWarps; ++w)
            {
                const float factor = exp2Fast(states[w][row].x - from);
                const float4 term = *reinterpret_cast<const float4*>(
                    reinterpret_cast<const float*>(memory + w * warp_bytes) + row * kSumStride + d);
                weights += factor * states[w][row].y;
                total.x += factor * term.x;
                total.y += factor * term.y;
                total.z += factor * term.z;
                total.w += factor * term.w;
            }
            *reinterpret_cast<float4*>(partial.output + row * D + d) = total;
            if (d == 0)
            {
                partial.states[row] = make_float2(most, weights);
            }
        }
    }
};

// What a pass over the attended tokens does. Under a value threshold there are three: sums of all weights, marks of the chosen
// tokens that some row does not leave out, and attention to what is left.
enum class Pass
{
    kWhole,
    kSums,
    kMarks,
    kMarked
};

// A thread block's part of the attention on tensor cores.
template <typename T, int D, int RowTiles>
struct AttendOnTensorCores
{
    using Attention = MatrixAttention<T, D, RowTiles>;
    static constexpr Pass kPass = Pass::kWhole;
    static constexpr int kRows = Attention::kRows;

    Attention attention;

    __device__ __forceinline__ AttendOnTensorCores(const Step& step, const AttendPlace& place, const Sequence& sequence)
        : attention(step, place, sequence)
    {
    }

    static int roomBytes(int stages)
    {
        return kWarps * Attention::warpBytes(stages);
    }

    __device__ __forceinline__ void run(const AttendedTiles& tiles, const Partial& partial, char* memory)
    {
        __shared__ float2 states[kWarps][kRows];
        const int warp_bytes = Attention::warpBytes(attention.step.stages);
        char* const own = memory + warp() * warp_bytes;
        attention.run(tiles, reinterpret_cast<T*>(own));
        attention.store(reinterpret_cast<float*>(own), states[warp()]);
        __syncthreads();
        Attention::combineWarps(partial, memory, warp_bytes, states);
    }
};

// On plain arithmetic: a warp per row, lanes over dimensions.
template <typename T, Pass kOfPass>
struct AttendPlainly
{
    static constexpr Pass kPass = kOfPass;
    static constexpr bool kAttends = kPass == Pass::kWhole || kPass == Pass::kMarked;
    static constexpr int kRows = kWarps;
    static constexpr int kDims = 8; // of a lane: head_dim is at most 256

    const Step& step;
    const AttendPlace& place;
    const QueryRow row;
    const int visible; // position of the row
    float query[kDims];

    __device__ __forceinline__ AttendPlainly(const Step& step, const AttendPlace& place, const Sequence& sequence)
        : step(step)
        , place(place)
        , row(step, place, sequence, warp())
        , visible(row.valid ? sequence.past + row.row : -1)
    {
        const int dims = step.shape.head_dim;
#pragma unroll
        for (int i = 0; i < kDims; ++i)
        {
            const int d = i * kLanes + lane();
            query[i] = row.valid && d < dims ? toFloat(static_cast<const T*>(step.query) + row.index * dims + d)
                    * step.config.scale * 1.4426950408889634f
                                             : 0.0f;
        }
    }

    static int roomBytes(int)
    {
        return 0;
    }

    // log2 of the sum of all weights of this warp's row, of all parts.
    __device__ __forceinline__ float logWeights() const
    {
        float most = -INFINITY, total = 0;
        for (int part = 0; part < step.attend_parts; ++part)
        {
            most = fmaxf(most, Partial(step, place, part).state(warp()).x);
        }
        for (int part = 0; part < step.attend_parts; ++part)
        {
            const float2 state = Partial(step, place, part).state(warp());
            total += exp2Fast(state.x - most) * state.y;
        }
        return most + log2f(total);
    }

    // The word of marks for the 16 tokens of a tile of chosen blocks, and where they begin in it.
    __device__ __forceinline__ uint32_t* marksOf(const AttendedTiles& tiles, int tile, int& shift) const
    {
        const int index = tile - (tiles.first << tiles.tilesLog2());
        shift = index % 2 * kTileRows;
        return step.marks + place.pair * step.mark_words + index / 2;
    }

    __device__ __forceinline__ void run(const AttendedTiles& tiles, const Partial& partial, char*) const
    {
        const int dims = step.shape.head_dim;
        const Pages pages(step, place.b, place.kv_head);
        float sum[kDims] = {}, largest = -INFINITY, weight = 0;
        const float all = kPass == Pass::kMarks && row.valid ? logWeights() : 0.0f;
        for (int tile = place.part; tile < tiles.count(); tile += step.attend_parts)
        {
            uint32_t left = 0xffff; // tokens of the tile that count
            int shift = 0;
            if constexpr (kPass == Pass::kMarks || kPass == Pass::kMarked)
            {
                if (tiles.isChosen(tile))
                {
                    const int32_t* const marks = reinterpret_cast<const int32_t*>(marksOf(tiles, tile, shift));
                    left = kPass == Pass::kMarked ? static_cast<uint32_t>(loadCurrent(marks)) >> shift : 0;
                }
                else if (kPass == Pass::kMarks)
                {
                    continue;
                }
            }
            const int token = tiles.token(tile);
            const int64_t first = (static_cast<int64_t>(pages.inPool(token >> step.block_log2)) << step.block_log2)
                + (token & (step.config.decode_block_k - 1));
            for (int i = 0; i < kTileRows && token + i <= visible; ++i)
            {
                const T* const key = static_cast<const T*>(step.present_key) + (first + i) * dims;
                const T* const value = static_cast<const T*>(step.present_value) + (first + i) * dims;
                if (kPass == Pass::kMarked && (left >> i & 1) == 0)
                {
                    continue;
                }
                float logit = 0;
#pragma unroll
                for (int j = 0; j < kDims; ++j)
                {
                    const int d = j * kLanes + lane();
                    logit += d < dims ? query[j] * toFloat(key + d) : 0.0f;
                }
                logit = reduceSum(logit);
                if constexpr (kPass == Pass::kMarks)
                {
                    // NaN is not below.
                    left |= exp2Fast(logit - all) < step.config.value_threshold ? 0u : 1u << i;
                    continue;
                }
                const float most = fmaxf(largest, logit);
                const float from = most == -INFINITY ? 0.0f : most;
                const float decay = exp2Fast(largest - from), factor = exp2Fast(logit - from);
                largest = most;
                weight = weight * decay + factor;
                if constexpr (kAttends)
                {
#pragma unroll
                    for (int j = 0; j < kDims; ++j)
                    {
                        const int d = j * kLanes + lane();
                        sum[j] = sum[j] * decay + (d < dims ? factor * toFloat(value + d) : 0.0f);
                    }
                }
            }
            if constexpr (kPass == Pass::kMarks)
            {
                uint32_t* const marks = marksOf(tiles, tile, shift);
                if (lane() == 0 && left != 0)
                {
                    atomicOr(marks, left << shift);
                }
            }
        }
        if constexpr (kAttends)
        {
#pragma unroll
            for (int j = 0; j < kDims; ++j)
            {
                const int d = j * kLanes + lane();
                if (d < dims)
                {
                    partial.output[warp() * dims + d] = sum[j];
                }
            }
        }
        if (kPass != Pass::kMarks && lane() == 0)
        {
            partial.states[warp()] = make_float2(largest, weight);
        }
    }
};

// What each part's sums count in the output: factors [rows, kMaxParts]. A warp per row.
__device__ inline void findFactors(const Step& step, const AttendPlace& place, float* factors)
{
    for (int row = warp(); row < step.row_group; row += kWarps)
    {
        float2 states[kMaxParts / kLanes];
        float most = -INFINITY, total = 0;
#pragma unroll
        for (int i = 0; i < kMaxParts / kLanes; ++i)
        {
            const int part = i * kLanes + lane();
            states[i] = make_float2(-INFINITY, 0);
            if (part < step.attend_parts)
            {
                states[i] = Partial(step, place, part).state(row);
            }
            most = fmaxf(most, states[i].x);
        }
        most = reduceMax(most);
        const float from = most == -INFINITY ? 0.0f : most;
#pragma unroll
        for (int i = 0; i < kMaxParts / kLanes; ++i)
        {
            states[i].x = exp2Fast(states[i].x - from);
            total += states[i].x * states[i].y;
        }
        total = reduceSum(total);
#pragma unroll
        for (int i = 0; i < kMaxParts / kLanes; ++i)
        {
            factors[row * kMaxParts + i * kLanes + lane()] = states[i].x / total;
        }
    }
}

// The output from all parts, by the thread block that ends last. `factors`: shared, [row_group, kMaxParts].
template <typename T>
__device__ __forceinline__ void combineParts(
    const Step& step, const AttendPlace& place, const Sequence& sequence, float* factors)
{
    constexpr int kAtOnce = 8; // loads under way
    __shared__ bool ends;
    __threadfence(); // this part can be read before its ticket is drawn
    __syncthreads();
    if (threadIdx.x == 0)
    {
        ends = atomicAdd(step.tickets + place.pair * step.row_groups + place.group, 1) == step.attend_parts - 1;
    }
    __syncthreads();
    if (!ends)
    {
        return;
    }
    __threadfence();
    findFactors(step, place, factors);
    __syncthreads();
    const int dims = step.shape.head_dim;
    const float* const partials = Partial(step, place, 0).output;
    const int64_t part_size = static_cast<int64_t>(step.row_group) * dims;
    for (int i = threadIdx.x; i < step.row_group * dims / 4; i += kThreads)
    {
        const int at = 4 * i, row = at / dims;
        const QueryRow query(step, place, sequence, row);
        if (!query.valid)
        {
            continue;
        }
        float4 total = make_float4(0, 0, 0, 0);
        for (int base = 0; base < step.attend_parts; base += kAtOnce)
        {
            uint4 terms[kAtOnce];
#pragma unroll
            for (int p = 0; p < kAtOnce; ++p)
            {
                terms[p] = base + p < step.attend_parts ? loadCurrent(partials + (base + p) * part_size + at)
                                                        : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int p = 0; p < kAtOnce; ++p)
            {
                const float factor = base + p < step.attend_parts ? factors[row * kMaxParts + base + p] : 0.0f;
                total.x += factor * __uint_as_float(terms[p].x);
                total.y += factor * __uint_as_float(terms[p].y);
                total.z += factor * __uint_as_float(terms[p].z);
                total.w += factor * __uint_as_float(terms[p].w);
            }
        }
        storeFour<T>(static_cast<T*>(step.output) + query.index * dims + at - row * dims, total);
    }
}

template <typename T>
__device__ __forceinline__ void clearPadding(const Step& step, const AttendPlace& place, const Sequence& sequence)
{
    const int dims = step.shape.head_dim;
    for (int i = threadIdx.x; i < step.row_group * dims / 4; i += kThreads)
    {
        const QueryRow row(step, place, sequence, 4 * i / dims);
        if (row.exists && !row.valid)
        {
            storeFour<T>(static_cast<T*>(step.output) + row.index * dims + 4 * i % dims, make_float4(0, 0, 0, 0));
        }
    }
}

inline __host__ __device__ int chosenBytes(const Step& step)
{
    return ((step.budget + 2) * static_cast<int>(sizeof(int)) + 15) / 16 * 16;
}

template <typename T, typename Attend>
__global__ void __launch_bounds__(kThreads, 1) attendKernel(const __grid_constant__ Step step)
{
    int* const chosen = reinterpret_cast<int*>(dynamicShared());
    char* const room = dynamicShared() + chosenBytes(step);
    AttendPlace place;
    place.b = blockIdx.z;
    place.mask = blockIdx.y;
    place.kv_head = place.mask * step.heads_per_mask / step.heads_per_kv;
    place.part = blockIdx.x % step.attend_parts;
    place.group = blockIdx.x / step.attend_parts;
    place.pair = pairIndex(step, place.b, place.mask);
    // The kernel before this one has waited for the first one, and that for what was before the call, so its inputs and
    // what it decided can be read. (Without a second kernel there is no search, and that is known here too.)
    const int searches = loadCurrent(step.searches + place.pair);
    const Sequence sequence(step, place.b);
    Attend attend(step, place, sequence);
    waitForEarlierKernels();
    letNextKernelStart();
    if constexpr (Attend::kPass == Pass::kSums || Attend::kPass == Pass::kMarks)
    {
        if (sequence.rows > 0 && !sequence.attendsAll(step))
        {
            const AttendedTiles tiles
                = findAttended(step, place, sequence, searches != 0, reinterpret_cast<uint32_t*>(room), chosen);
            for (int i = threadIdx.x; Attend::kPass == Pass::kSums && place.writes() && i < step.mark_words; i += kThreads)
            {
                step.marks[place.pair * step.mark_words + i] = 0;
            }
            attend.run(tiles, Partial(step, place, place.part), room);
        }
        return;
    }
    if (place.part == 0 && sequence.rows < step.shape.new_tokens)
    {
        clearPadding<T>(step, place, sequence);
    }
    if (sequence.rows == 0)
    {
        if (place.writes() && step.present_blocks != step.past_blocks)
        {
            for (int i = threadIdx.x; i < step.budget; i += kThreads)
            {
                step.present_blocks[place.pair * step.budget + i] = step.past_blocks[place.pair * step.budget + i];
            }
        }
        return;
    }
    const AttendedTiles tiles
        = findAttended(step, place, sequence, searches != 0, reinterpret_cast<uint32_t*>(room), chosen);
    attend.run(tiles, Partial(step, place, place.part), room);
    combineParts<T>(step, place, sequence, reinterpret_cast<float*>(room));
}

// Shared memory beside the chosen blocks: what the attention takes, or what choosing blocks and combining parts do.
template <typename Attend>
int attendRoom(const Step& step, int stages)
{
    const int choosing = choosingBytes(step);
    const int uniting = (step.capacity + 31) / 32 * static_cast<int>(sizeof(uint32_t));
    const int combining = step.row_group * kMaxParts * static_cast<int>(sizeof(float));
    return (std::max({Attend::roomBytes(stages), choosing, uniting, combining}) + 15) / 16 * 16;
}

template <typename T, typename Attend>
cudaError_t launchAttendKernel(Step step, int max_shared_bytes, cudaStream_t stream)
{
    constexpr int kMaxStages = 3, kStaticBytes = 8 * 1024; // shared memory that the kernel declares is less
    const auto bytes = [&](int stages) { return chosenBytes(step) + attendRoom<Attend>(step, stages); };
    step.stages = kMaxStages;
    while (step.stages > 1 && bytes(step.stages) + kStaticBytes > max_shared_bytes)
    {
        --step.stages;
    }
    return launchOverlapped(step.overlap, attendKernel<T, Attend>,
        dim3(step.attend_parts * step.row_groups, step.mask_heads, step.shape.batch), kThreads, bytes(step.stages),
        stream, step);
}

template <typename T>
cudaError_t launchAttend(const Step& step, int max_shared_bytes, cudaStream_t stream)
{
    // What is searched can be left out too.
    if (step.config.value_threshold > 0 && !step.config.dense && step.capacity > step.budget)
    {
        cudaError_t error = launchAttendKernel<T, AttendPlainly<T, Pass::kSums>>(step, max_shared_bytes, stream);
        if (error == cudaSuccess)
        {
            error = launchAttendKernel<T, AttendPlainly<T, Pass::kMarks>>(step, max_shared_bytes, stream);
        }
        return error == cudaSuccess
            ? launchAttendKernel<T, AttendPlainly<T, Pass::kMarked>>(step, max_shared_bytes, stream)
            : error;
    }
    if constexpr (sizeof(T) == 2)
    {
        const bool one = step.row_group == 8;
        switch (step.shape.head_dim)
        {
        case 64:
            return one ? launchAttendKernel<T, AttendOnTensorCores<T, 64, 1>>(step, max_shared_bytes, stream)
                       : launchAttendKernel<T, AttendOnTensorCores<T, 64, 2>>(step, max_shared_bytes, stream);
        case 128:
            return one ? launchAttendKernel<T, AttendOnTensorCores<T, 128, 1>>(step, max_shared_bytes, stream)
                       : launchAttendKernel<T, AttendOnTensorCores<T, 128, 2>>(step, max_shared_bytes, stream);
        }
    }
    return launchAttendKernel<T, AttendPlainly<T, Pass::kWhole>>(step, max_shared_bytes, stream);
}

} // namespace hip_trt::decode
