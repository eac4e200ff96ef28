#include "validation.cuh"

#include "complaint.cuh"
#include "kernels.cuh"
#include "plan.cuh"

#include <algorithm>
#include <cmath>

namespace hip_trt
{

namespace
{

constexpr int kMaxTokens = 1 << 22;
constexpr int kMaxGridDim = 65535; // of y and z
constexpr int kMaxHeadsPerKv = 16;
constexpr int64_t kMaxCandidates = 1 << 16;

void checkConfig(Complaint& complaint, const HipTrtConfig& config)
{
    // The ranges of HipConfig, in its order.
    complaint.range("mask_k", config.mask_k, 1, kMaxTokens);
    complaint.range("decode_mask_k", config.decode_mask_k, 1, kMaxTokens);
    complaint.range("block_q", config.block_q, 1, 128);
    complaint.range("block_k", config.block_k, 2, 128);
    complaint.range("stride_q", config.stride_q, 1, 128);
    complaint.range("stride_k", config.stride_k, 1, 128);
    complaint.range("branch", config.branch, 2, 16);
    complaint.range("leaf_branch", config.leaf_branch, 2, 16);
    complaint.range("reuse_level", config.reuse_level, 0, 1);
    complaint.range("page_size", config.page_size, 2, 4096);
    complaint.range("sink_tokens", config.sink_tokens, 0, 1 << 20);
    complaint.range("window_tokens", config.window_tokens, 1, 1 << 20);
    complaint.range("mask_per_query_head", config.mask_per_query_head, 0, 1);
    complaint.range("dense", config.dense, 0, 1);
    complaint.require(std::isfinite(config.scale), HIP_TRT_INVALID_ARGUMENT,
        "scale: %g is not allowed; it must be finite", static_cast<double>(config.scale));
    complaint.powerOfTwo("block_q", config.block_q);
    complaint.powerOfTwo("block_k", config.block_k);
    complaint.divides("stride_q", config.stride_q, "block_q", config.block_q);
    complaint.divides("stride_k", config.stride_k, "block_k", config.block_k);
    complaint.multiple("mask_k", config.mask_k, "block_k", config.block_k);
    complaint.multiple("decode_mask_k", config.decode_mask_k, "block_k", config.block_k);
    complaint.multiple("page_size", config.page_size, "block_k", config.block_k);
}

void checkCandidates(Complaint& complaint, const HipTrtConfig& config, bool decode)
{
    if (complaint.status() != HIP_TRT_SUCCESS)
    {
        return;
    }
    const int64_t candidates = candidateCapacity(config, decode);
    complaint.require(candidates <= kMaxCandidates, HIP_TRT_UNSUPPORTED,
        "%s: %d is not supported; with block_k %d, branch %d and leaf_branch %d a search level holds %lld nodes, and at "
        "most %lld are allowed",
        decode ? "decode_mask_k" : "mask_k", decode ? config.decode_mask_k : config.mask_k, config.block_k,
        config.branch, config.leaf_branch, static_cast<long long>(candidates),
        static_cast<long long>(kMaxCandidates));
}

void checkShape(Complaint& complaint, const HipTrtConfig& config, const HipTrtShape& shape, bool complete)
{
    complaint.range("type", shape.type, HIP_TRT_FLOAT16, HIP_TRT_FLOAT32);
    complaint.range("num_kv_heads", shape.num_kv_heads, 1, kMaxGridDim);
    complaint.range("num_query_heads", shape.num_query_heads, 1, kMaxGridDim);
    complaint.multiple("num_query_heads", shape.num_query_heads, "num_kv_heads", shape.num_kv_heads);
    complaint.require(complaint.status() != HIP_TRT_SUCCESS
            || shape.num_query_heads / shape.num_kv_heads <= kMaxHeadsPerKv,
        HIP_TRT_UNSUPPORTED, "num_query_heads: %d is not supported; it must be at most %d times num_kv_heads (%d)",
        shape.num_query_heads, kMaxHeadsPerKv, shape.num_kv_heads);
    complaint.require(shape.head_dim >= 8 && shape.head_dim <= kLargeHeadDim && shape.head_dim % 8 == 0,
        HIP_TRT_UNSUPPORTED, "head_dim: %d is not supported; it must be a multiple of 8, at most %d", shape.head_dim,
        kLargeHeadDim);
    const int least = complete ? 1 : 0;
    complaint.range("batch", shape.batch, least, kMaxGridDim);
    complaint.range("new_tokens", shape.new_tokens, least, kMaxTokens);
    complaint.range("num_pages", shape.num_pages, least, INT32_MAX);
    complaint.range("pages_per_sequence", shape.pages_per_sequence, least, kMaxTokens / config.page_size);
    const double query_blocks = static_cast<double>(shape.new_tokens) / std::max(config.block_q, 1) + 1;
    const double chosen = std::max(config.mask_k, config.decode_mask_k) + config.block_k; // a bound, in any unit
    complaint.addressable(shape, config.page_size, 4 * query_blocks * shape.num_query_heads * shape.batch * chosen);
}

} // namespace

HipTrtStatus validate(
    const HipTrtConfig& config, const HipTrtShape& shape, bool complete, char* message, size_t message_size)
{
    if (message != nullptr && message_size > 0)
    {
        message[0] = '\0';
    }
    Complaint complaint(message, message_size);
    checkConfig(complaint, config);
    checkCandidates(complaint, config, false);
    checkCandidates(complaint, config, true);
    if (complaint.status() == HIP_TRT_SUCCESS)
    {
        checkShape(complaint, config, shape, complete);
    }
    return complaint.status();
}

} // namespace hip_trt
