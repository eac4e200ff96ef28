// As much of CUDA as samples/04_engine_in_cpp asks for, on the CPU. New memory is poisoned.
#pragma once

#include <cstdlib>
#include <cstring>

enum cudaError_t
{
    cudaSuccess,
    cudaErrorMemoryAllocation
};
enum cudaMemcpyKind
{
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost
};
using cudaStream_t = void*;
constexpr unsigned cudaStreamNonBlocking{1};

inline char const* cudaGetErrorString(cudaError_t)
{
    return "out of memory";
}
inline cudaError_t cudaGetDeviceCount(int* count)
{
    *count = 1;
    return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** data, size_t size)
{
    *data = std::malloc(size);
    std::memset(*data, 0xa5, size);
    return cudaSuccess;
}
inline cudaError_t cudaFree(void* data)
{
    std::free(data);
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t size, cudaStream_t)
{
    std::memset(data, value, size);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, void const* from, size_t size, cudaMemcpyKind, cudaStream_t)
{
    std::memcpy(to, from, size);
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned)
{
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t)
{
    return cudaSuccess;
}
