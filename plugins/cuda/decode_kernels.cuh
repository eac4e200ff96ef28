// The kernels of one type, in launch order; included by one source per type, which are compiled side by side.
#pragma once

#include "decode_attend.cuh"
#include "decode_codes.cuh"
#include "decode_scan.cuh"

namespace hip_trt::decode
{

template <typename T>
cudaError_t runAppend(const Step& step, cudaStream_t stream)
{
    return launchAppend<T>(step, stream);
}

template <typename T>
cudaError_t runDecode(const Step& step, const Device& device, cudaStream_t stream)
{
    cudaError_t error = launchScan<T>(step, stream);
    // Nothing is searched where the page table holds no more than what is attended anyway.
    if (error == cudaSuccess && !step.config.dense && step.capacity > step.budget)
    {
        error = launchCodes<T>(step, stream);
    }
    if (error == cudaSuccess)
    {
        error = launchAttend<T>(step, device.max_shared_bytes, stream);
    }
    return error;
}

} // namespace hip_trt::decode
