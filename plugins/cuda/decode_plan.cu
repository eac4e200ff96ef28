#include "decode_plan.cuh"

#include "arena.cuh"
#include "complaint.cuh"

#include <algorithm>
#include <cmath>

namespace hip_trt::decode
{

namespace
{

constexpr int kMaxTokens = 1 << 22;
constexpr int kMaxGridDim = 65535; // of y and z
constexpr int kMaxHeadsPerKv = 16;
constexpr int kMaxSearched = 2048; // blocks of the second stage, what shared memory has room for
constexpr int kStagedLogSums = 8192; // scores of the second stage that fit in shared memory beside the rest

// Thread blocks that the attention of a call is split into at most, but for one per sequence and mask head.
constexpr int64_t kAttendBlocks = 512;

int64_t ceilDivide(int64_t value, int64_t divisor)
{
    return (value + divisor - 1) / divisor;
}

int log2Of(int value)
{
    int log2 = 0;
    while (1 << log2 < value)
    {
        ++log2;
    }
    return log2;
}

// Under a value threshold there are none so far.
bool usesTensorCores(const HipTrtV2Config& config, const HipTrtShape& shape)
{
    return config.value_threshold == 0 && shape.type != HIP_TRT_FLOAT32 && (shape.head_dim == 64 || shape.head_dim == 128);
}

// Tokens that a row attends to at most.
int64_t attendedTokens(const Step& step)
{
    const HipTrtV2Config& config = step.config;
    const int64_t all = static_cast<int64_t>(step.capacity) * config.decode_block_k;
    // Sink and window are rounded up to whole blocks.
    const int64_t sparse = static_cast<int64_t>(config.sink_tokens) + config.decode_mask_k + config.window_tokens + 4 * config.decode_block_k;
    return config.dense ? all : std::min(all, sparse);
}

int64_t attendPairs(const Step& step)
{
    return static_cast<int64_t>(step.shape.batch) * step.mask_heads * step.row_groups;
}

int mostAttendParts(const Step& step)
{
    return static_cast<int>(std::clamp<int64_t>(ceilDivide(kAttendBlocks, attendPairs(step)), 1, kMaxParts));
}

// The number of thread blocks per sequence and mask head that ends first: a multiprocessor holds one at a time, and each takes
// its tokens and what all of them do, which is choosing blocks and putting results together.
int attendParts(const Step& step, int multiprocessors)
{
    constexpr int64_t kOverheadTokens = 160;
    int64_t best = INT64_MAX;
    int parts = 1;
    for (int candidate = 1; candidate <= mostAttendParts(step); ++candidate)
    {
        const int64_t rounds = ceilDivide(attendPairs(step) * candidate, multiprocessors);
        const int64_t time = rounds * (ceilDivide(attendedTokens(step), candidate) + kOverheadTokens);
        if (time < best)
        {
            best = time;
            parts = candidate;
        }
    }
    return parts;
}

// Thread blocks for so many pieces of work of a sequence and mask head, of which a warp takes one at a time; two to a
// multiprocessor over all.
int searchParts(const Step& step, int64_t pieces, int multiprocessors)
{
    const int64_t pairs = static_cast<int64_t>(step.shape.batch) * step.mask_heads;
    return static_cast<int>(
        std::clamp<int64_t>(2 * multiprocessors / pairs, 1, std::max<int64_t>(1, ceilDivide(pieces, kWarps))));
}

// Fill in what follows from the parameters alone; pointers into the workspace only if it has a base. Returns the bytes used.
size_t plan(Step& step)
{
    const HipTrtV2Config& config = step.config;
    const HipTrtShape& shape = step.shape;
    step.mask_heads = config.mask_per_query_head ? shape.num_query_heads : shape.num_kv_heads;
    step.heads_per_mask = shape.num_query_heads / step.mask_heads;
    step.heads_per_kv = shape.num_query_heads / shape.num_kv_heads;
    step.budget = config.decode_mask_k / config.decode_block_k;
    step.searched = config.decode_search_k / config.decode_block_k;
    step.sink_blocks = static_cast<int>(ceilDivide(config.sink_tokens, config.decode_block_k));
    step.block_log2 = log2Of(config.decode_block_k);
    step.blocks_per_page = Divisor(config.page_size / config.decode_block_k);
    step.new_tokens = Divisor(shape.new_tokens);
    step.row_bytes = shape.head_dim * (shape.type == HIP_TRT_FLOAT32 ? 4 : 2);
    step.capacity = shape.pages_per_sequence * step.blocks_per_page.divisor;
    step.score_stride = (step.capacity + 3) / 4 * 4;
    step.stage_log_sums = step.searched * step.heads_per_mask <= kStagedLogSums;
    step.append_blocks = (shape.new_tokens + 2 * config.decode_block_k - 2) / config.decode_block_k;
    step.row_group = usesTensorCores(config, shape) && step.heads_per_mask * shape.new_tokens > 8 ? 16 : 8;
    step.row_groups = static_cast<int>(ceilDivide(static_cast<int64_t>(step.heads_per_mask) * shape.new_tokens, step.row_group));

    Arena arena(step.workspace);
    const int64_t pairs = static_cast<int64_t>(shape.batch) * step.mask_heads;
    step.searches = arena.take<int32_t>(pairs);
    step.scores = arena.take<uint32_t>(pairs * step.score_stride);
    step.kept = arena.take<int32_t>(pairs * step.searched);
    step.log_sums = arena.take<float>(pairs * step.heads_per_mask * step.searched);
    step.tickets = arena.take<int32_t>(pairs * step.row_groups);
    step.mark_words = config.value_threshold > 0 ? (step.budget + 2) * config.decode_block_k / 32 + 1 : 0;
    step.marks = arena.take<uint32_t>(pairs * step.mark_words);
    // As for the most thread blocks, so that a smaller batch, which is split further, needs no more.
    const int64_t rows = (kAttendBlocks + attendPairs(step)) * step.row_group;
    step.partial_state = arena.take<float2>(rows);
    step.partial_output = arena.take<float>(rows * shape.head_dim);
    return arena.used();
}

void checkConfig(Complaint& complaint, const HipTrtV2Config& config)
{
    complaint.range("decode_block_k", config.decode_block_k, 16, 64);
    complaint.powerOfTwo("decode_block_k", config.decode_block_k);
    complaint.range("decode_mask_k", config.decode_mask_k, 1, kMaxTokens);
    complaint.range("decode_search_k", config.decode_search_k, config.decode_mask_k, kMaxTokens);
    complaint.range("page_size", config.page_size, 2, 4096);
    complaint.range("sink_tokens", config.sink_tokens, 0, 1 << 20);
    complaint.range("window_tokens", config.window_tokens, 1, 1 << 20);
    complaint.range("mask_per_query_head", config.mask_per_query_head, 0, 1);
    complaint.range("dense", config.dense, 0, 1);
    complaint.require(std::isfinite(config.scale), HIP_TRT_INVALID_ARGUMENT,
        "scale: %g is not allowed; it must be finite", static_cast<double>(config.scale));
    complaint.multiple("decode_mask_k", config.decode_mask_k, "decode_block_k", config.decode_block_k);
    complaint.multiple("decode_search_k", config.decode_search_k, "decode_block_k", config.decode_block_k);
    complaint.multiple("page_size", config.page_size, "decode_block_k", config.decode_block_k);
    complaint.require(config.value_threshold >= 0 && config.value_threshold < 1, HIP_TRT_INVALID_ARGUMENT,
        "value_threshold: %g is not allowed; it must be at least 0 and less than 1",
        static_cast<double>(config.value_threshold));
    complaint.require(complaint.status() != HIP_TRT_SUCCESS || config.decode_search_k / config.decode_block_k <= kMaxSearched,
        HIP_TRT_UNSUPPORTED, "decode_search_k: %d is not supported; it must be at most %d times decode_block_k (%d)",
        config.decode_search_k, kMaxSearched, config.decode_block_k);
}

void checkShape(Complaint& complaint, const HipTrtV2Config& config, const HipTrtShape& shape, bool complete, int rows)
{
    complaint.range("type", shape.type, HIP_TRT_FLOAT16, HIP_TRT_FLOAT32);
    complaint.range("num_kv_heads", shape.num_kv_heads, 1, kMaxGridDim);
    complaint.range("num_query_heads", shape.num_query_heads, 1, kMaxGridDim);
    complaint.multiple("num_query_heads", shape.num_query_heads, "num_kv_heads", shape.num_kv_heads);
    complaint.require(complaint.status() != HIP_TRT_SUCCESS
            || shape.num_query_heads / shape.num_kv_heads <= kMaxHeadsPerKv,
        HIP_TRT_UNSUPPORTED, "num_query_heads: %d is not supported; it must be at most %d times num_kv_heads (%d)",
        shape.num_query_heads, kMaxHeadsPerKv, shape.num_kv_heads);
    complaint.require(shape.head_dim >= 16 && shape.head_dim <= kLargestHeadDim && shape.head_dim % 16 == 0,
        HIP_TRT_UNSUPPORTED, "head_dim: %d is not supported; it must be a multiple of 16, at most %d", shape.head_dim,
        kLargestHeadDim);
    const int least = complete ? 1 : 0;
    complaint.range("batch", shape.batch, least, kMaxGridDim);
    complaint.range("new_tokens", shape.new_tokens, least, rows);
    complaint.range("num_pages", shape.num_pages, least, INT32_MAX);
    complaint.range("pages_per_sequence", shape.pages_per_sequence, least, kMaxTokens / config.page_size);
    complaint.require(complaint.status() != HIP_TRT_SUCCESS
            || static_cast<int64_t>(shape.num_pages) * shape.num_kv_heads * config.page_size <= INT32_MAX,
        HIP_TRT_UNSUPPORTED, "num_pages: %d is not supported; num_pages, num_kv_heads (%d) and page_size (%d) together "
        "must be less than 2^31", shape.num_pages, shape.num_kv_heads, config.page_size);
    complaint.addressable(shape, config.page_size, 0);
}

} // namespace

cudaError_t findDevice(Device& device)
{
    int index = 0, major = 0;
    cudaError_t error = cudaGetDevice(&index);
    if (error == cudaSuccess)
    {
        error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
    }
    if (error == cudaSuccess)
    {
        error = cudaDeviceGetAttribute(&device.max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    }
    if (error == cudaSuccess)
    {
        error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    }
    device.overlaps = major >= 9;
    return error;
}

HipTrtStatus validate(const HipTrtV2Config& config, const HipTrtShape& shape, bool complete, int rows, char* message,
    size_t message_size)
{
    if (message != nullptr && message_size > 0)
    {
        message[0] = '\0';
    }
    Complaint complaint(message, message_size);
    checkConfig(complaint, config);
    if (complaint.status() == HIP_TRT_SUCCESS)
    {
        checkShape(complaint, config, shape, complete, rows);
    }
    return complaint.status();
}

size_t workspaceSize(const HipTrtV2Config& config, const HipTrtShape& shape)
{
    Step step{};
    step.config = config;
    step.shape = shape;
    step.workspace = nullptr;
    return plan(step);
}

Step makeStep(const HipTrtV2Params& params, const Device& device)
{
    Step step{};
    static_cast<HipTrtV2Params&>(step) = params;
    plan(step);
    const int units = step.heads_per_mask <= kHeadTile / 2 ? 2 : 1; // blocks that a warp scores at once
    step.scan_parts = searchParts(step, ceilDivide(step.capacity, kTileRows), device.multiprocessors);
    step.code_parts = searchParts(step, ceilDivide(step.searched, units), device.multiprocessors);
    step.attend_parts = attendParts(step, device.multiprocessors);
    step.overlap = device.overlaps;
    return step;
}

} // namespace hip_trt::decode
