#include "plan.cuh"

#include "arena.cuh"

#include <algorithm>

namespace hip_trt
{

namespace
{

// Lists up to this size fit in shared memory beside the tiles of a search, on every supported GPU.
constexpr size_t kSharedListBytes = 12 * 1024;
// More thread blocks than this share the lists in the workspace, one search after the other.
constexpr int64_t kSearchSlots = 256;

// A single-token call gives each thread block about this many tokens to attend to, but splits no row further than
// kMaxSplits. Neither depends on the batch, so a sequence gets the same bits alone and in company.
constexpr int64_t kSplitTokens = 64;
constexpr int64_t kMaxSplits = 64;

int64_t ceilDivide(int64_t value, int64_t divisor)
{
    return (value + divisor - 1) / divisor;
}

int64_t splitCount(const HipTrtConfig& config, const HipTrtShape& shape, bool decode)
{
    if (!decode)
    {
        return 1;
    }
    const int64_t sequence = static_cast<int64_t>(shape.pages_per_sequence) * config.page_size;
    // Sink and window are rounded up to whole blocks.
    const int64_t sparse
        = static_cast<int64_t>(config.sink_tokens) + config.decode_mask_k + config.window_tokens + 2 * config.block_k;
    const int64_t attended = config.dense ? sequence : std::min(sequence, sparse);
    return std::clamp<int64_t>(ceilDivide(attended, kSplitTokens), 1, kMaxSplits);
}

// Fill in everything; pointers into the workspace only if it has a base. Returns the bytes used.
size_t plan(Call& call)
{
    const HipTrtConfig& config = call.config;
    const HipTrtShape& shape = call.shape;
    call.mask_heads = config.mask_per_query_head ? shape.num_query_heads : shape.num_kv_heads;
    call.heads_per_mask = shape.num_query_heads / call.mask_heads;
    call.heads_per_kv = shape.num_query_heads / shape.num_kv_heads;
    call.budget = (call.decode ? config.decode_mask_k : config.mask_k) / config.block_k;
    call.query_blocks = static_cast<int>(ceilDivide(shape.new_tokens, config.block_q));
    call.block_k_log2 = 0;
    while (1 << call.block_k_log2 < config.block_k)
    {
        ++call.block_k_log2;
    }
    call.row_bytes = shape.head_dim * (shape.type == HIP_TRT_FLOAT32 ? 4 : 2);
    call.candidate_capacity = static_cast<int>(candidateCapacity(config, call.decode));
    call.kept_capacity = call.budget + 2;
    call.splits = static_cast<int>(splitCount(config, shape, call.decode));

    Arena arena(call.workspace);
    const int64_t searches = static_cast<int64_t>(shape.batch) * call.mask_heads * call.query_blocks;
    call.chosen_count = arena.take<int32_t>(searches);
    int32_t* chosen = arena.take<int32_t>(searches * call.budget);
    call.chosen = call.chosen_blocks != nullptr ? call.chosen_blocks : chosen;
    const size_t list_bytes = searchListBytes(call.candidate_capacity, call.kept_capacity);
    call.search_slots = 0;
    call.search_lists = nullptr;
    if (list_bytes > kSharedListBytes)
    {
        call.search_slots = static_cast<int>(std::min(searches, kSearchSlots));
        call.search_lists = arena.take<char>(call.search_slots * static_cast<int64_t>(list_bytes));
    }
    if (call.splits > 1)
    {
        const int64_t rows = static_cast<int64_t>(shape.batch) * shape.num_query_heads * call.splits;
        call.partial_state = arena.take<float2>(rows);
        call.partial_output = arena.take<float>(rows * shape.head_dim);
    }
    return arena.used();
}

} // namespace

int64_t candidateCapacity(const HipTrtConfig& config, bool decode)
{
    const int64_t budget = (decode ? config.decode_mask_k : config.mask_k) / config.block_k;
    // A decode step adds the two newest level-1 nodes to those it reuses.
    return std::max(budget * config.branch, (budget + (decode ? 2 : 0)) * config.leaf_branch);
}

size_t callWorkspaceSize(const HipTrtConfig& config, const HipTrtShape& shape, bool decode)
{
    Call call{};
    call.decode = decode;
    call.config = config;
    call.shape = shape;
    return plan(call);
}

Call makeCall(const HipTrtParams& params, bool decode)
{
    Call call{};
    call.decode = decode;
    static_cast<HipTrtParams&>(call) = params;
    plan(call);
    return call;
}

} // namespace hip_trt
