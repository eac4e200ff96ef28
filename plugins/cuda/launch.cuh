// Kernel launches whose error is returned, never lost.
#ifndef HIP_TRT_LAUNCH_CUH // not #pragma once: plugins/tests/emulation puts its own in place
#define HIP_TRT_LAUNCH_CUH

#include <cuda_runtime.h>

namespace hip_trt
{

// Shared memory that a kernel gets without asking.
constexpr size_t kDefaultSharedBytes = 48 * 1024;

template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes,
    cudaStream_t stream, const Parameters&... arguments)
{
    if (shared_bytes > kDefaultSharedBytes)
    {
        const cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
        if (error != cudaSuccess)
        {
            return error;
        }
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

} // namespace hip_trt

#endif // HIP_TRT_LAUNCH_CUH
