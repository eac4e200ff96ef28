// The C ABI of version 2: checks, then the kernels of one call in order.
#include "hip_attention_v2.h"

#include "complaint.cuh"
#include "decode_plan.cuh"
#include "entry.cuh"
#include "plan.cuh"
#include "validation.cuh"

#include <algorithm>

namespace hip_trt
{

namespace
{

using decode::Device;
using decode::Step;

constexpr int kMaxChunkRows = 1 << 22; // of a prompt, that one call appends

// Prefill as version 1's kernels know it. They write -1 to as many nodes as there are blocks to keep.
HipTrtConfig prefillConfig(const HipTrtV2Config& config)
{
    HipTrtConfig prefill{};
    prefill.mask_k = config.mask_k;
    prefill.decode_mask_k = config.decode_mask_k / config.decode_block_k * config.block_k;
    prefill.block_q = config.block_q;
    prefill.block_k = config.block_k;
    prefill.stride_q = config.stride_q;
    prefill.stride_k = config.stride_k;
    prefill.branch = config.branch;
    prefill.leaf_branch = config.leaf_branch;
    prefill.page_size = config.page_size;
    prefill.sink_tokens = config.sink_tokens;
    prefill.window_tokens = config.window_tokens;
    prefill.mask_per_query_head = config.mask_per_query_head;
    prefill.dense = config.dense;
    prefill.scale = config.scale;
    return prefill;
}

Call prefillCall(const HipTrtV2Params& params)
{
    HipTrtParams prefill{};
    prefill.config = prefillConfig(params.config);
    prefill.shape = params.shape;
    prefill.query = params.query;
    prefill.key = params.key;
    prefill.value = params.value;
    prefill.past_key = params.past_key;
    prefill.past_value = params.past_value;
    prefill.page_table = params.page_table;
    prefill.past_lengths = params.past_lengths;
    prefill.query_lengths = params.query_lengths;
    prefill.past_nodes = params.past_blocks;
    prefill.refresh_mask = params.refresh_mask;
    prefill.output = params.output;
    prefill.present_key = params.present_key;
    prefill.present_value = params.present_value;
    prefill.present_nodes = params.present_blocks;
    prefill.chosen_blocks = params.chosen_blocks;
    prefill.workspace = params.workspace;
    Call call = makeCall(prefill, false);
    call.appended = true;
    return call;
}

HipTrtStatus validateKind(const HipTrtV2Config& config, const HipTrtShape& shape, HipTrtCallKind kind, bool complete,
    char* message, size_t message_size)
{
    const int rows = kind == HIP_TRT_DECODE ? decode::kMaxRows : kMaxChunkRows;
    const HipTrtStatus status = decode::validate(config, shape, complete, rows, message, message_size);
    return status != HIP_TRT_SUCCESS || kind == HIP_TRT_DECODE
        ? status
        : validate(prefillConfig(config), shape, complete, message, message_size);
}

// For exactly this shape, but for the rows of a decode call where either kind may come.
size_t workspaceSize(const HipTrtV2Config& config, const HipTrtShape& shape, HipTrtCallKind kind)
{
    HipTrtShape decode_shape = shape;
    decode_shape.new_tokens = std::min(shape.new_tokens, decode::kMaxRows);
    const size_t decode = kind == HIP_TRT_PREFILL ? 0 : decode::workspaceSize(config, decode_shape);
    const size_t prefill = kind == HIP_TRT_DECODE ? 0 : callWorkspaceSize(prefillConfig(config), shape, false);
    return std::max(decode, prefill);
}

// What every call reads and writes.
bool hasState(const HipTrtV2Params& params)
{
    return complete({params.key, params.value, params.past_key, params.past_value, params.page_table,
               params.past_lengths, params.query_lengths, params.present_key, params.present_value})
        && (params.config.dense
            || complete({params.past_bounds, params.past_codes, params.present_bounds, params.present_codes}));
}

cudaError_t copyState(const Step& step, cudaStream_t stream)
{
    const HipTrtShape& shape = step.shape;
    const size_t rows = static_cast<size_t>(shape.num_pages) * shape.num_kv_heads * step.config.page_size;
    const size_t bytes = rows * step.row_bytes;
    const struct
    {
        void* present;
        const void* past;
        size_t bytes;
    } pools[] = {{step.present_key, step.past_key, bytes}, {step.present_value, step.past_value, bytes},
        {step.present_bounds, step.past_bounds, bytes / step.config.decode_block_k * 2},
        {step.present_codes, step.past_codes, rows * shape.head_dim / 4}};
    cudaError_t error = cudaSuccess;
    for (const auto& pool : pools)
    {
        const bool copies = pool.present != pool.past && pool.present != nullptr && pool.past != nullptr;
        if (copies && error == cudaSuccess)
        {
            error = cudaMemcpyAsync(pool.present, pool.past, pool.bytes, cudaMemcpyDefault, stream);
        }
    }
    return error;
}

// The kernels of a decode call, or only those that a prefill begins with.
cudaError_t runDecodeSteps(const HipTrtV2Params& params, bool append_only, cudaStream_t stream)
{
    Device device{};
    cudaError_t error = decode::findDevice(device);
    if (error != cudaSuccess)
    {
        return error;
    }
    const Step step = decode::makeStep(params, device);
    error = copyState(step, stream);
    if (error != cudaSuccess)
    {
        return error;
    }
    switch (step.shape.type)
    {
    case HIP_TRT_FLOAT16:
        return append_only ? decode::runAppend<__half>(step, stream) : decode::runDecode<__half>(step, device, stream);
    case HIP_TRT_BFLOAT16:
        return append_only ? decode::runAppend<__nv_bfloat16>(step, stream)
                           : decode::runDecode<__nv_bfloat16>(step, device, stream);
    default: return append_only ? decode::runAppend<float>(step, stream) : decode::runDecode<float>(step, device, stream);
    }
}

cudaError_t runPrefill(const HipTrtV2Params& params, cudaStream_t stream)
{
    const cudaError_t error = runDecodeSteps(params, true, stream);
    return error == cudaSuccess ? runSteps(prefillCall(params), stream) : error;
}

} // namespace

} // namespace hip_trt

HipTrtStatus hipTrtV2Validate(const HipTrtV2Config* config, const HipTrtShape* shape, HipTrtCallKind kind, char* message,
    size_t message_size)
{
    if (config == nullptr || shape == nullptr)
    {
        return hip_trt::missing(message, message_size);
    }
    return hip_trt::validateKind(*config, *shape, kind, false, message, message_size);
}

HipTrtStatus hipTrtV2WorkspaceSize(
    const HipTrtV2Config* config, const HipTrtShape* shape, HipTrtCallKind kind, size_t* bytes)
{
    if (config == nullptr || shape == nullptr || bytes == nullptr)
    {
        return HIP_TRT_INVALID_ARGUMENT;
    }
    const HipTrtStatus status = hip_trt::validateKind(*config, *shape, kind, true, nullptr, 0);
    if (status == HIP_TRT_SUCCESS)
    {
        *bytes = hip_trt::workspaceSize(*config, *shape, kind);
    }
    return status;
}

HipTrtStatus hipTrtV2Attention(const HipTrtV2Params* params, cudaStream_t stream)
{
    if (params == nullptr)
    {
        return HIP_TRT_INVALID_ARGUMENT;
    }
    const auto kind = static_cast<HipTrtCallKind>(params->call_kind);
    if (kind != HIP_TRT_PREFILL && kind != HIP_TRT_DECODE)
    {
        return HIP_TRT_INVALID_ARGUMENT;
    }
    const HipTrtStatus status = hip_trt::validateKind(params->config, params->shape, kind, true, nullptr, 0);
    if (status != HIP_TRT_SUCCESS)
    {
        return status;
    }
    if (reinterpret_cast<uintptr_t>(params->chosen_blocks) % 16 != 0 // which may be null
        || !hip_trt::hasState(*params)
        || !hip_trt::complete({params->query, params->past_blocks, params->refresh_mask, params->output,
            params->present_blocks, params->workspace}))
    {
        return HIP_TRT_INVALID_ARGUMENT;
    }
    if (params->workspace_size < hip_trt::workspaceSize(params->config, params->shape, kind))
    {
        return HIP_TRT_WORKSPACE_TOO_SMALL;
    }
    return hip_trt::statusOf(kind == HIP_TRT_PREFILL ? hip_trt::runPrefill(*params, stream)
                                                     : hip_trt::runDecodeSteps(*params, false, stream));
}

HipTrtStatus hipTrtV2Append(const HipTrtV2Params* params, cudaStream_t stream)
{
    if (params == nullptr)
    {
        return HIP_TRT_INVALID_ARGUMENT;
    }
    const HipTrtStatus status
        = hip_trt::decode::validate(params->config, params->shape, true, hip_trt::kMaxChunkRows, nullptr, 0);
    if (status != HIP_TRT_SUCCESS)
    {
        return status;
    }
    return hip_trt::hasState(*params) ? hip_trt::statusOf(hip_trt::runDecodeSteps(*params, true, stream))
                                      : HIP_TRT_INVALID_ARGUMENT;
}
