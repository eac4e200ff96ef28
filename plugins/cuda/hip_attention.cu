// The C ABI: checks, then the steps of one call in order.
#include "hip_attention.h"

#include "complaint.cuh"
#include "decode_cluster.cuh"
#include "entry.cuh"
#include "kernels.cuh"
#include "offload.cuh"
#include "plan.cuh"
#include "prefill_sm90.cuh"
#include "validation.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#ifndef HIP_TRT_VERSION
#error "define HIP_TRT_VERSION as the package version, a string"
#endif

namespace hip_trt
{

namespace
{

thread_local cudaError_t last_error = cudaSuccess;

// The build defines HIP_TRT_HOPPER where it compiles the kernels that only sm_90a can run.
template <typename T, int D>
cudaError_t search(const Call& call, cudaStream_t stream)
{
#ifdef HIP_TRT_HOPPER
    if constexpr (sizeof(T) == 2)
    {
        if (!call.host_pools && searchesOnHopper(call))
        {
            return searchPrefillSm90<T, D>(call, stream);
        }
    }
#endif
    return searchMasks<T, D>(call, stream);
}

template <typename T, int D>
cudaError_t attendChosen(const Call& call, cudaStream_t stream)
{
#ifdef HIP_TRT_HOPPER
    if constexpr (sizeof(T) == 2)
    {
        if (!call.host_pools && attendsOnHopper(call))
        {
            return attendPrefillSm90<T, D>(call, stream);
        }
    }
#endif
    return attend<T, D>(call, stream);
}

// On pools in host memory: cached copies of what the call writes are dropped, and if the staging area has room, the call goes
// on in that area, from where new rows are copied to the pools meanwhile.
cudaError_t moveToStaging(Call& call, const HipTrtOffload& offload, cudaStream_t stream)
{
    cudaError_t error = forgetWritten(call, offload, stream);
    if (!canStage(call, offload))
    {
        call.host_pools = true;
        return error;
    }
    Call staged;
    if (error == cudaSuccess)
    {
        error = stagePages(call, offload, staged, stream);
    }
    if (error == cudaSuccess)
    {
        error = updateCache(staged, stream);
        staged.appended = true;
    }
    if (error == cudaSuccess)
    {
        error = writeOut(call, staged, offload, stream);
    }
    call = staged;
    return error;
}

template <typename T, int D>
cudaError_t run(const Call& call, cudaStream_t stream)
{
    cudaError_t error = call.appended ? cudaSuccess : updateCache(call, stream);
    if (error == cudaSuccess)
    {
        error = search<T, D>(call, stream);
    }
    if (error == cudaSuccess)
    {
        error = attendChosen<T, D>(call, stream);
    }
    return error;
}

template <typename T>
cudaError_t runHeadDim(const Call& call, cudaStream_t stream)
{
    return call.shape.head_dim <= kSmallHeadDim ? run<T, kSmallHeadDim>(call, stream)
                                                : run<T, kLargeHeadDim>(call, stream);
}

// A single-token call on pools in host memory: one kernel does it all, or, where no cluster computes it, some read row by row.
cudaError_t decodeOffloaded(Call call, const HipTrtOffload& offload, cudaStream_t stream)
{
    call.host_pools = true;
    call.caches = cachesOf(call, offload);
    const LayerCaches before = fillBeside(call, offload);
    cudaError_t error = beginDecode(offload, stream);
    if (error == cudaSuccess && decodeClusterSupports(call))
    {
        error = launchDecodeCluster(call, before, stream);
    }
    else if (error == cudaSuccess)
    {
        error = launchFill(before, stream);
        if (error == cudaSuccess)
        {
            error = updateCopies(call, stream);
        }
        if (error == cudaSuccess)
        {
            error = runSteps(call, stream);
        }
    }
    return error == cudaSuccess ? endDecode(call, offload, stream) : error;
}

// `offload`: what is attached to the pools, or nullptr.
cudaError_t runType(Call call, const HipTrtOffload* offload, cudaStream_t stream)
{
    if (offload != nullptr && call.decode)
    {
        return decodeOffloaded(call, *offload, stream);
    }
    if (decodeClusterSupports(call))
    {
        return launchDecodeCluster(call, LayerCaches{}, stream);
    }
    if (offload != nullptr)
    {
        cudaError_t error = settle(*offload, stream);
        if (error == cudaSuccess)
        {
            error = moveToStaging(call, *offload, stream);
        }
        if (error != cudaSuccess)
        {
            return error;
        }
    }
    return runSteps(call, stream);
}

} // namespace

cudaError_t runSteps(const Call& call, cudaStream_t stream)
{
    switch (call.shape.type)
    {
    case HIP_TRT_FLOAT16: return runHeadDim<__half>(call, stream);
    case HIP_TRT_BFLOAT16: return runHeadDim<__nv_bfloat16>(call, stream);
    default: return runHeadDim<float>(call, stream);
    }
}

HipTrtStatus statusOf(cudaError_t error)
{
    last_error = error;
    return error == cudaSuccess ? HIP_TRT_SUCCESS : HIP_TRT_CUDA_ERROR;
}

} // namespace hip_trt

int32_t hipTrtAbiVersion(void)
{
    return HIP_TRT_ABI_VERSION;
}

int32_t hipTrtOperatorVersion(void)
{
    return HIP_TRT_OPERATOR_VERSION;
}

const char* hipTrtVersion(void)
{
    return HIP_TRT_VERSION;
}

const char* hipTrtStatusText(HipTrtStatus status)
{
    switch (status)
    {
    case HIP_TRT_SUCCESS: return "success";
    case HIP_TRT_INVALID_ARGUMENT:
        return "an argument is out of range, a pointer is missing or not 16-byte aligned, or pools that caches are attached "
               "to are not both past and present, or larger than the caches know";
    case HIP_TRT_UNSUPPORTED: return "no kernel computes this configuration";
    case HIP_TRT_WORKSPACE_TOO_SMALL: return "the workspace is smaller than hipTrtWorkspaceSize says";
    case HIP_TRT_CUDA_ERROR: return "a CUDA call failed";
    }
    return "unknown status";
}

const char* hipTrtLastCudaError(void)
{
    return cudaGetErrorName(hip_trt::last_error);
}

HipTrtStatus hipTrtValidate(const HipTrtConfig* config, const HipTrtShape* shape, char* message, size_t message_size)
{
    if (config == nullptr || shape == nullptr)
    {
        return hip_trt::missing(message, message_size);
    }
    return hip_trt::validate(*config, *shape, false, message, message_size);
}

HipTrtStatus hipTrtWorkspaceSize(const HipTrtConfig* config, const HipTrtShape* shape, size_t* bytes)
{
    if (config == nullptr || shape == nullptr || bytes == nullptr)
    {
        return HIP_TRT_INVALID_ARGUMENT;
    }
    const HipTrtStatus status = hip_trt::validate(*config, *shape, true, nullptr, 0);
    if (status == HIP_TRT_SUCCESS)
    {
        HipTrtShape decode = *shape;
        decode.new_tokens = 1;
        *bytes = std::max(hip_trt::callWorkspaceSize(*config, *shape, shape->new_tokens == 1),
            hip_trt::callWorkspaceSize(*config, decode, true));
    }
    return status;
}

HipTrtStatus hipTrtAttention(const HipTrtParams* params, cudaStream_t stream)
{
    if (params == nullptr)
    {
        return HIP_TRT_INVALID_ARGUMENT;
    }
    const HipTrtStatus status = hip_trt::validate(params->config, params->shape, true, nullptr, 0);
    if (status != HIP_TRT_SUCCESS)
    {
        return status;
    }
    if (reinterpret_cast<uintptr_t>(params->chosen_blocks) % 16 != 0 // which may be null
        || !hip_trt::complete({params->query, params->key, params->value, params->past_key, params->past_value,
            params->page_table, params->past_lengths, params->query_lengths, params->past_nodes, params->refresh_mask,
            params->output, params->present_key, params->present_value, params->present_nodes, params->workspace}))
    {
        return HIP_TRT_INVALID_ARGUMENT;
    }
    const bool decode = params->shape.new_tokens == 1;
    if (params->workspace_size < hip_trt::callWorkspaceSize(params->config, params->shape, decode))
    {
        return HIP_TRT_WORKSPACE_TOO_SMALL;
    }
    const hip_trt::Call call = hip_trt::makeCall(*params, decode);
    HipTrtOffload offload;
    const bool offloaded = hip_trt::findOffload(call, offload);
    if (offloaded
        && (call.past_key != call.present_key || call.past_value != call.present_value || !hip_trt::cachesCover(call, offload)))
    {
        return HIP_TRT_INVALID_ARGUMENT; // caches are copies of what these very pools hold
    }
    return hip_trt::statusOf(hip_trt::runType(call, offloaded ? &offload : nullptr, stream));
}
