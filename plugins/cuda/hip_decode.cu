// The C ABI of decode, version 2: checks, then the kernels of one call in order.
#include "hip_decode.h"

#include "complaint.cuh"
#include "decode_plan.cuh"

#include <algorithm>
#include <initializer_list>

namespace hip_trt::decode
{

namespace
{

constexpr int kMaxChunkRows = 1 << 22; // of a prompt, that one call appends

thread_local cudaError_t last_error = cudaSuccess;

bool complete(std::initializer_list<const void*> pointers)
{
    return std::all_of(pointers.begin(), pointers.end(),
        [](const void* pointer) { return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % 16 == 0; });
}

// What every call reads and writes.
bool hasState(const HipTrtDecodeParams& params)
{
    return complete({params.key, params.value, params.past_key, params.past_value, params.page_table,
               params.past_lengths, params.query_lengths, params.present_key, params.present_value})
        && (params.config.dense || complete({params.past_bounds, params.past_codes, params.present_bounds, params.present_codes}));
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
        {step.present_bounds, step.past_bounds, bytes / step.config.block * 2},
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

cudaError_t run(const Step& step, const Device& device, bool append_only, cudaStream_t stream)
{
    const cudaError_t error = copyState(step, stream);
    if (error != cudaSuccess)
    {
        return error;
    }
    switch (step.shape.type)
    {
    case HIP_TRT_FLOAT16: return append_only ? runAppend<__half>(step, stream) : runDecode<__half>(step, device, stream);
    case HIP_TRT_BFLOAT16:
        return append_only ? runAppend<__nv_bfloat16>(step, stream) : runDecode<__nv_bfloat16>(step, device, stream);
    default: return append_only ? runAppend<float>(step, stream) : runDecode<float>(step, device, stream);
    }
}

HipTrtStatus launchAll(const HipTrtDecodeParams& params, bool append_only, cudaStream_t stream)
{
    Device device{};
    last_error = findDevice(device);
    if (last_error == cudaSuccess)
    {
        last_error = run(makeStep(params, device), device, append_only, stream);
    }
    return last_error == cudaSuccess ? HIP_TRT_SUCCESS : HIP_TRT_CUDA_ERROR;
}

} // namespace

} // namespace hip_trt::decode

HipTrtStatus hipTrtDecodeValidate(
    const HipTrtDecodeConfig* config, const HipTrtShape* shape, char* message, size_t message_size)
{
    if (config == nullptr || shape == nullptr)
    {
        return hip_trt::missing(message, message_size);
    }
    return hip_trt::decode::validate(*config, *shape, false, hip_trt::decode::kMaxRows, message, message_size);
}

HipTrtStatus hipTrtDecodeWorkspace(const HipTrtDecodeConfig* config, const HipTrtShape* shape, size_t* bytes)
{
    if (config == nullptr || shape == nullptr || bytes == nullptr)
    {
        return HIP_TRT_INVALID_ARGUMENT;
    }
    const HipTrtStatus status
        = hip_trt::decode::validate(*config, *shape, true, hip_trt::decode::kMaxRows, nullptr, 0);
    if (status == HIP_TRT_SUCCESS)
    {
        *bytes = hip_trt::decode::workspaceSize(*config, *shape);
    }
    return status;
}

HipTrtStatus hipTrtDecode(const HipTrtDecodeParams* params, cudaStream_t stream)
{
    if (params == nullptr)
    {
        return HIP_TRT_INVALID_ARGUMENT;
    }
    const HipTrtStatus status
        = hip_trt::decode::validate(params->config, params->shape, true, hip_trt::decode::kMaxRows, nullptr, 0);
    if (status != HIP_TRT_SUCCESS)
    {
        return status;
    }
    if (!hip_trt::decode::hasState(*params)
        || !hip_trt::decode::complete({params->query, params->past_blocks, params->refresh_mask, params->output,
            params->present_blocks, params->workspace}))
    {
        return HIP_TRT_INVALID_ARGUMENT;
    }
    if (params->workspace_size < hip_trt::decode::workspaceSize(params->config, params->shape))
    {
        return HIP_TRT_WORKSPACE_TOO_SMALL;
    }
    return hip_trt::decode::launchAll(*params, false, stream);
}

HipTrtStatus hipTrtDecodeAppend(const HipTrtDecodeParams* params, cudaStream_t stream)
{
    if (params == nullptr)
    {
        return HIP_TRT_INVALID_ARGUMENT;
    }
    const HipTrtStatus status
        = hip_trt::decode::validate(params->config, params->shape, true, hip_trt::decode::kMaxChunkRows, nullptr, 0);
    if (status != HIP_TRT_SUCCESS)
    {
        return status;
    }
    if (!hip_trt::decode::hasState(*params))
    {
        return HIP_TRT_INVALID_ARGUMENT;
    }
    return hip_trt::decode::launchAll(*params, true, stream);
}

const char* hipTrtDecodeLastCudaError(void)
{
    return cudaGetErrorName(hip_trt::decode::last_error);
}
