// Kernels that are launched while those before them in the stream still run (programmatic dependent launch, compute
// capability 9.0 and later). Elsewhere one ends before the next begins.
#ifndef HIP_TRT_OVERLAP_CUH // not #pragma once: plugins/tests/emulation puts its own in place
#define HIP_TRT_OVERLAP_CUH

#include "launch.cuh"

namespace hip_trt
{

// Wait until all earlier kernels have ended and what they wrote can be read. Every thread block must, before it touches
// what they write or read, and even if it does nothing: the next kernel relies on it.
__device__ __forceinline__ void waitForEarlierKernels()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// Let thread blocks of the next kernel take what room is left on the GPU; they wait there.
__device__ __forceinline__ void letNextKernelStart()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// `overlap`: the device can, and the kernel waits as above.
template <typename... Parameters>
cudaError_t launchOverlapped(bool overlap, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
    size_t shared_bytes, cudaStream_t stream, const Parameters&... arguments)
{
    if (!overlap)
    {
        return launch(kernel, grid, threads, shared_bytes, stream, arguments...);
    }
    if (shared_bytes > kDefaultSharedBytes)
    {
        const cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
        if (error != cudaSuccess)
        {
            return error;
        }
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

} // namespace hip_trt

#endif // HIP_TRT_OVERLAP_CUH
