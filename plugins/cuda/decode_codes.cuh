// Second kernel of a decode call: the F best blocks of the first stage are chosen, and scored by their codes.
//
// Every thread block of a sequence and mask head chooses by itself, which costs less than a kernel more. A warp then scores
// units of one or two blocks on tensor cores. With w_d = q_d r_d / 3, a token's q.k is sum q_d low_d + sum code_d w_d. Rows are
// tokens, and the inner dimension runs over codes as float16: two bits at place p of the fraction of a float16 whose other
// bits are zero are the number code 2^(p - 24), so one AND unpacks two dimensions, and 2^-p goes into w.
#pragma once

#include "decode_best.cuh"
#include "decode_elements.cuh"

namespace hip_trt::decode
{

// Blocks of a sequence and mask head that the second stage scores.
struct CodesPlace
{
    int b, mask, kv_head;
    int part;
    int count;       // blocks
    const int* kept; // in shared memory
};

// Shared memory of a warp for a unit: of each block its codes, then its bounds.
struct UnitLayout
{
    int code_bytes;
    int block_bytes;

    __host__ __device__ explicit UnitLayout(const Step& step)
        : code_bytes(step.config.decode_block_k * step.shape.head_dim / 4)
        , block_bytes(code_bytes + 2 * step.row_bytes)
    {
    }
};

// `Blocks` of a unit: 2 where four query heads or fewer share a mask, as the eight columns of a product then hold the weights
// of two blocks. D: head_dim, rounded up to 64, 128 or 256.
template <typename T, int D, int Blocks>
struct CodeScorer
{
    static constexpr int kStages = D == 256 || sizeof(T) == 4 ? 1 : 2; // units under way
    static constexpr int kWords = D / 64; // of a lane, in the codes of a key: word kWords t + i
    static constexpr int kDims = 16 * kWords;
    static constexpr int kBlockHeads = kHeadTile / Blocks; // columns of a block
    static constexpr int kMaxTiles = 4;

    const Step& step;
    const CodesPlace& place;
    const UnitLayout layout;
    char* const memory; // this warp's
    int first_head;     // of this product

    float query[kDims]; // of the head of column g, times scale log2(e) / 3
    float largest_query;

    __device__ __forceinline__ CodeScorer(const Step& step, const CodesPlace& place, char* memory)
        : step(step)
        , place(place)
        , layout(step)
        , memory(memory)
        , first_head(0)
    {
    }

    // This lane's dimensions of a row of D elements, zeros beyond head_dim.
    __device__ __forceinline__ void loadDims(float (&dims)[kDims], const T* row, bool valid) const
    {
        const int words = step.shape.head_dim / 16, t = lane() % 4;
#pragma unroll
        for (int i = 0; i < kWords; ++i)
        {
            const int word = kWords * t + i;
#pragma unroll
            for (int c = 0; c < 16 / kChunk<T>; ++c)
            {
                float chunk[kChunk<T>] = {};
                if (valid && word < words)
                {
                    unpack<T>(chunk, *reinterpret_cast<const uint4*>(row + 16 * word + c * kChunk<T>));
                }
#pragma unroll
                for (int e = 0; e < kChunk<T>; ++e)
                {
                    dims[16 * i + c * kChunk<T> + e] = chunk[e];
                }
            }
        }
    }

    __device__ __forceinline__ void loadQuery(int head_tile)
    {
        const int g = lane() / 4;
        first_head = head_tile * kHeadTile;
        const int head = first_head + g % kBlockHeads;
        const int64_t row
            = (static_cast<int64_t>(place.b) * step.shape.num_query_heads + place.mask * step.heads_per_mask + head)
            * step.shape.new_tokens;
        loadDims(query, static_cast<const T*>(step.query) + row * step.shape.head_dim, head < step.heads_per_mask);
        const float factor = step.config.scale * 1.4426950408889634f / 3.0f;
        largest_query = 0;
#pragma unroll
        for (int d = 0; d < kDims; ++d)
        {
            query[d] *= factor;
            largest_query = fmaxf(largest_query, fabsf(query[d]));
        }
        largest_query = fmaxf(largest_query, __shfl_xor_sync(kAllLanes, largest_query, 1));
        largest_query = fmaxf(largest_query, __shfl_xor_sync(kAllLanes, largest_query, 2));
    }

    __device__ __forceinline__ char* blockMemory(int stage, int block) const
    {
        return memory + (stage * Blocks + block) * layout.block_bytes;
    }

    // Start to copy a block's codes and bounds, if it is one.
    __device__ __forceinline__ void copyBlock(int stage, int block, int pool_block) const
    {
        if (pool_block < 0)
        {
            return;
        }
        char* const to = blockMemory(stage, block);
        const char* const codes
            = reinterpret_cast<const char*>(step.past_codes) + static_cast<int64_t>(pool_block) * layout.code_bytes;
        const char* const bounds
            = static_cast<const char*>(step.past_bounds) + static_cast<int64_t>(pool_block) * 2 * step.row_bytes;
#pragma unroll 4
        for (int at = lane() * 16; at < layout.code_bytes; at += kLanes * 16)
        {
            copyAsync16(to + at, codes + at, true);
        }
        for (int at = lane() * 16; at < 2 * step.row_bytes; at += kLanes * 16)
        {
            copyAsync16(to + layout.code_bytes + at, bounds + at, true);
        }
    }

    // Weights of the codes as right operands; the sum over lower bounds; and what undoes the scaling of the weights.
    struct Weights
    {
        uint32_t pairs[kWords][8]; // dimensions j and j + 8 of a word
        float base;
        float unscale;
    };

    __device__ __forceinline__ void findWeights(Weights& weights, int stage) const
    {
        const int g = lane() / 4;
        const T* const bounds
            = reinterpret_cast<const T*>(blockMemory(stage, g / kBlockHeads) + layout.code_bytes);
        float low[kDims], range[kDims];
        loadDims(low, bounds, true);
        loadDims(range, bounds + step.shape.head_dim, true);
        float base = 0, largest = 0;
#pragma unroll
        for (int d = 0; d < kDims; ++d)
        {
            range[d] -= low[d];
            base += low[d] * query[d];
            largest = fmaxf(largest, range[d]);
        }
        base += __shfl_xor_sync(kAllLanes, base, 1);
        base += __shfl_xor_sync(kAllLanes, base, 2);
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
        // So that the largest weight, times 2^8, is far inside float16's range, and the smallest that matters too.
        constexpr float kLargest = 64;
        const float bound = largest * largest_query;
        const bool any = bound > 1e-30f;
        const float scale = any ? kLargest / bound : 0.0f;
        weights.base = 3 * base;
        weights.unscale = any ? bound * (65536.0f / kLargest) : 0.0f; // and 2^16 of the codes
        constexpr int kPlace[8] = {0, 2, 4, 6, 8, 0, 2, 4}; // where unpackCodes leaves the j-th pair
#pragma unroll
        for (int i = 0; i < kWords; ++i)
        {
#pragma unroll
            for (int j = 0; j < 8; ++j)
            {
                const float factor = scale * static_cast<float>(1 << (8 - kPlace[j]));
                const int d = 16 * i + j;
                weights.pairs[i][j]
                    = packPair<__half>(range[d] * query[d] * factor, range[d + 8] * query[d + 8] * factor);
            }
        }
    }

    // Eight pairs of codes, dimensions j and j + 8 of a word, at places 0, 2, 4, 6, 8, 0, 2 and 4 of float16s.
    static __device__ __forceinline__ uint32_t unpackCodes(uint32_t word, int j)
    {
        const uint32_t from = j < 5 ? word : word >> 10;
        return from & 0x00030003u << 2 * (j < 5 ? j : j - 5);
    }

    // The words of this lane of a token's codes.
    __device__ __forceinline__ void loadWords(uint32_t (&words)[kWords], const uint32_t* codes, int token) const
    {
        const int count = step.shape.head_dim / 16, t = lane() % 4;
        const uint32_t* const from = codes + token * count + kWords * t;
        if (count == 4 * kWords && kWords == 2)
        {
            const uint2 both = *reinterpret_cast<const uint2*>(from);
            words[0] = both.x;
            words[kWords - 1] = both.y;
            return;
        }
#pragma unroll
        for (int i = 0; i < kWords; ++i)
        {
            words[i] = kWords * t + i < count ? from[i] : 0;
        }
    }

    // Sums of codes times weights: of tokens g and g + 8 of each tile, columns 2 t and 2 t + 1.
    __device__ __forceinline__ void addProducts(
        float (&sum)[kMaxTiles][4], const Weights& weights, int stage, int block) const
    {
        const int g = lane() / 4;
        const uint32_t* const codes = reinterpret_cast<const uint32_t*>(blockMemory(stage, block));
#pragma unroll
        for (int tile = 0; tile < kMaxTiles; ++tile)
        {
            if (tile * kTileRows >= step.config.decode_block_k)
            {
                break;
            }
            uint32_t words[2][kWords];
            loadWords(words[0], codes, tile * kTileRows + g);
            loadWords(words[1], codes, tile * kTileRows + g + 8);
#pragma unroll
            for (int i = 0; i < kWords; ++i)
            {
#pragma unroll
                for (int j = 0; j < 8; j += 2)
                {
                    const uint32_t a[4] = {unpackCodes(words[0][i], j), unpackCodes(words[1][i], j),
                        unpackCodes(words[0][i], j + 1), unpackCodes(words[1][i], j + 1)};
                    multiplyAdd<__half>(sum[tile], a, weights.pairs[i][j], weights.pairs[i][j + 1]);
                }
            }
        }
    }

    // log2 of the sum over the tokens of 2^(base + unscale sum), for columns 2 t (e 0) or 2 t + 1.
    __device__ __forceinline__ float logSum(const float (&sum)[kMaxTiles][4], const Weights& weights, int e) const
    {
        const int column = 4 * (2 * (lane() % 4) + e); // the first lane that knows it
        const float base = __shfl_sync(kAllLanes, weights.base, column);
        const float unscale = __shfl_sync(kAllLanes, weights.unscale, column);
        float logits[2 * kMaxTiles], largest = -INFINITY;
#pragma unroll
        for (int i = 0; i < 2 * kMaxTiles; ++i)
        {
            logits[i] = i / 2 * kTileRows < step.config.decode_block_k ? fmaf(sum[i / 2][i % 2 * 2 + e], unscale, base) : -INFINITY;
            largest = fmaxf(largest, logits[i]);
        }
#pragma unroll
        for (int distance = 4; distance < kLanes; distance *= 2)
        {
            largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
        }
        const float from = largest == -INFINITY ? 0.0f : largest;
        float total = 0;
#pragma unroll
        for (int i = 0; i < 2 * kMaxTiles; ++i)
        {
            total += exp2Fast(logits[i] - from);
        }
#pragma unroll
        for (int distance = 4; distance < kLanes; distance *= 2)
        {
            total += __shfl_xor_sync(kAllLanes, total, distance);
        }
        return from + log2f(total);
    }

    // Score a unit: blocks first, first + 1, ... of those that were kept.
    __device__ __forceinline__ void score(int stage, int first) const
    {
        const int g = lane() / 4, t = lane() % 4;
        Weights weights;
        findWeights(weights, stage);
        float sum[kMaxTiles][4] = {};
        addProducts(sum, weights, stage, 0);
        if constexpr (Blocks == 2)
        {
            // Columns 4 to 7 are the second block's.
            float second[kMaxTiles][4] = {};
            addProducts(second, weights, stage, 1);
#pragma unroll
            for (int i = 0; i < 4 * kMaxTiles; ++i)
            {
                sum[i / 4][i % 4] = t < 2 ? sum[i / 4][i % 4] : second[i / 4][i % 4];
            }
        }
        float* const to = step.log_sums
            + pairIndex(step, place.b, place.mask) * step.heads_per_mask * step.searched;
#pragma unroll
        for (int e = 0; e < 2; ++e)
        {
            const float log_sum = logSum(sum, weights, e);
            const int column = 2 * t + e;
            const int head = first_head + column % kBlockHeads, position = first + column / kBlockHeads;
            if (g == 0 && head < step.heads_per_mask && position < place.count)
            {
                to[head * step.searched + position] = log_sum;
            }
        }
    }

    // Score this warp's units, i-th of them: the (warp, part, i)-th of all.
    __device__ __forceinline__ void run()
    {
        const int units = (place.count + Blocks - 1) / Blocks;
        const int first_unit = place.part * kWarps + warp(), step_units = step.code_parts * kWarps;
        const int mine = first_unit < units ? (units - first_unit + step_units - 1) / step_units : 0;
        const Pages pages(step, place.b, place.kv_head);
        constexpr int kBatch = kLanes / Blocks; // units whose places lanes look up at once
        int pool_block = -1; // of block lane % Blocks of the batch's unit lane / Blocks
        const auto start = [&](int i) {
            if (i < mine)
            {
                if (i % kBatch == 0)
                {
                    const int block = (first_unit + (i + lane() / Blocks) * step_units) * Blocks + lane() % Blocks;
                    pool_block = block < place.count ? pages.inPool(place.kept[block]) : -1;
                }
#pragma unroll
                for (int block = 0; block < Blocks; ++block)
                {
                    copyBlock(i % kStages, block, __shfl_sync(kAllLanes, pool_block, i % kBatch * Blocks + block));
                }
            }
            commitCopies();
        };
        const int tiles = (step.heads_per_mask + kHeadTile - 1) / kHeadTile;
#pragma unroll 1
        for (int tile = 0; tile < tiles; ++tile)
        {
            loadQuery(tile);
            if (kStages == 2)
            {
                start(0);
            }
#pragma unroll 1
            for (int i = 0; i < mine; ++i)
            {
                start(i + kStages - 1);
                waitCopies<kStages - 1>();
                __syncwarp();
                score(i % kStages, (first_unit + i * step_units) * Blocks);
                __syncwarp();
            }
        }
    }
};

// Shared memory: the kept blocks, then what warps need for their units, which the keys of the selection use before, as far as
// they fit there.
inline __host__ __device__ int keptBytes(const Step& step)
{
    return (step.searched * static_cast<int>(sizeof(int)) + 15) / 16 * 16;
}

template <typename T, int D, int Blocks>
__global__ void __launch_bounds__(kThreads, D == 256 ? 1 : 2) codesKernel(const __grid_constant__ Step step)
{
    using Scorer = CodeScorer<T, D, Blocks>;
    int* const kept = reinterpret_cast<int*>(dynamicShared());
    char* const units = dynamicShared() + keptBytes(step);
    const int unit_bytes = Scorer::kStages * Blocks * UnitLayout(step).block_bytes;

    CodesPlace place;
    place.b = blockIdx.z;
    place.mask = blockIdx.y;
    place.kv_head = place.mask * step.heads_per_mask / step.heads_per_kv;
    place.part = blockIdx.x;
    place.kept = kept;
    const int64_t pair = pairIndex(step, place.b, place.mask);
    const Sequence sequence(step, place.b); // the kernel before has waited for what was before the call
    waitForEarlierKernels();
    letNextKernelStart();
    const int searches = loadCurrent(step.searches + pair);
    const int candidates = sequence.candidates();
    const uint32_t* keys = step.scores + pair * step.score_stride;
    if (candidates > step.searched && (candidates + 3) / 4 * 16 <= kWarps * unit_bytes)
    {
        // Begun before it is known whether there is a search.
        uint32_t* const here = reinterpret_cast<uint32_t*>(units);
#pragma unroll 4
        for (int i = threadIdx.x; i < (candidates + 3) / 4; i += kThreads)
        {
            reinterpret_cast<uint4*>(here)[i] = reinterpret_cast<const uint4*>(keys)[i];
        }
        keys = here;
    }
    if (searches == 0)
    {
        return;
    }
    __syncthreads();
    place.count = chooseBest(
        keys, candidates, step.searched, [&](int i, int position) { kept[position] = sequence.first + i; });
    __syncthreads();
    if (place.part == 0)
    {
        for (int i = threadIdx.x; i < place.count; i += kThreads)
        {
            step.kept[pair * step.searched + i] = kept[i];
        }
    }
    if (place.count > step.budget)
    {
        Scorer(step, place, units + warp() * unit_bytes).run();
    }
}

template <typename T, int D, int Blocks>
cudaError_t launchCodesKernel(const Step& step, cudaStream_t stream)
{
    const int units = kWarps * CodeScorer<T, D, Blocks>::kStages * Blocks * UnitLayout(step).block_bytes;
    return launchOverlapped(step.overlap, codesKernel<T, D, Blocks>,
        dim3(step.code_parts, step.mask_heads, step.shape.batch), kThreads, keptBytes(step) + units, stream, step);
}

template <typename T, int D>
cudaError_t launchCodesOf(const Step& step, cudaStream_t stream)
{
    if constexpr (sizeof(T) == 2 && D < 256)
    {
        if (step.heads_per_mask <= kHeadTile / 2)
        {
            return launchCodesKernel<T, D, 2>(step, stream);
        }
    }
    return launchCodesKernel<T, D, 1>(step, stream);
}

template <typename T>
cudaError_t launchCodes(const Step& step, cudaStream_t stream)
{
    return step.shape.head_dim <= 64 ? launchCodesOf<T, 64>(step, stream)
        : step.shape.head_dim <= 128 ? launchCodesOf<T, 128>(step, stream)
                                     : launchCodesOf<T, 256>(step, stream);
}

} // namespace hip_trt::decode
