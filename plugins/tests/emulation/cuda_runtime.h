// The names of the CUDA runtime that plugins/cuda uses, so that the emulation needs no CUDA toolkit.
#pragma once

#include <cstddef>
#include <cstdint>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local

enum cudaError_t
{
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9
};

enum cudaMemcpyKind
{
    cudaMemcpyDefault = 4
};

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;

struct dim3
{
    unsigned x, y, z;

    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1)
        : x(x)
        , y(y)
        , z(z)
    {
    }
};

struct alignas(8) int2
{
    int x, y;
};

struct alignas(8) uint2
{
    unsigned x, y;
};

struct alignas(8) float2
{
    float x, y;
};

struct alignas(16) float4
{
    float x, y, z, w;
};

struct alignas(16) uint4
{
    unsigned x, y, z, w;
};

inline int2 make_int2(int x, int y)
{
    return {x, y};
}

inline uint2 make_uint2(unsigned x, unsigned y)
{
    return {x, y};
}

inline float2 make_float2(float x, float y)
{
    return {x, y};
}

inline float4 make_float4(float x, float y, float z, float w)
{
    return {x, y, z, w};
}

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w)
{
    return {x, y, z, w};
}

enum cudaDeviceAttr
{
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMultiProcessorCount
};

enum cudaFuncAttribute
{
    cudaFuncAttributeMaxDynamicSharedMemorySize,
    cudaFuncAttributeNonPortableClusterSizeAllowed
};

enum cudaLaunchAttributeID
{
    cudaLaunchAttributeClusterDimension,
    cudaLaunchAttributeClusterSchedulingPolicyPreference
};

enum cudaClusterSchedulingPolicy
{
    cudaClusterSchedulingPolicyLoadBalancing = 2
};

struct cudaLaunchAttribute
{
    cudaLaunchAttributeID id;
    struct
    {
        struct
        {
            unsigned x, y, z;
        } clusterDim;
        int clusterSchedulingPolicyPreference;
    } val;
};

struct cudaLaunchConfig_t
{
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetLastError();
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value);
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function, const cudaLaunchConfig_t* config);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);

// Streams and events: every launch has ended when it returns, so there is nothing to wait for.

enum cudaStreamCaptureStatus
{
    cudaStreamCaptureStatusNone,
    cudaStreamCaptureStatusActive
};

enum cudaStreamCaptureMode
{
    cudaStreamCaptureModeRelaxed = 2
};

constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2;

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventDestroy(cudaEvent_t event);

const char* cudaGetErrorName(cudaError_t error);
