// Thread-block clusters in the emulation, in place of plugins/cuda/decode_cluster_ptx.cuh; and the launches that use them,
// on a GPU that holds few and small clusters, so that large batches take a plan of their own.
#pragma once

#include "emulation.h"

namespace emulation
{

// Stores to other thread blocks arrive late and in any order: some of them now, or all.
void deliverStores(bool all);

} // namespace emulation

template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Parameters&... arguments)
{
    return emulation::runGrid(config->gridDim, config->blockDim.x, config->dynamicSmemBytes,
        [&] { kernel(arguments...); }, config->attrs[0].val.clusterDim.x);
}

namespace hip_trt
{

// Addresses in shared memory carry the rank of the thread block in their upper half.
uint32_t sharedAddress(const void* pointer);
uint32_t peerAddress(uint32_t address, int rank);

// In place of mbarrier.cuh: barriers of one arrival.
void initBarrier(uint64_t* barrier, int arrivals);
void arriveExpectBytes(uint64_t* barrier, uint32_t bytes);
void waitBarrier(uint64_t* barrier, uint32_t parity);
void storeAsync(uint32_t peer_address, uint32_t value, uint32_t peer_barrier);
void storeAsync(uint32_t peer_address, float2 value, uint32_t peer_barrier);
void storeAsync(uint32_t peer_address, float4 value, uint32_t peer_barrier);

inline void clusterArrive()
{
    emulation::waitForCluster();
}

inline void clusterWait()
{
}

inline void publishBarriers()
{
}

constexpr int kPrefetchBytes = 128;

inline void prefetchToL2(const void*)
{
}

inline void settle(uint32_t (&)[4])
{
}

inline uint4 loadOnce(const void* address)
{
    return *static_cast<const uint4*>(address);
}

inline void copyAsync4(void* shared, const void* global)
{
    emulation::startCopy(shared, global, true, 4);
}

inline uint32_t transposeMatrix(uint32_t matrix)
{
    const unsigned lane = emulation::lane(), row = lane / 4, column = lane % 4 * 2;
    const uint32_t* const pairs = static_cast<const uint32_t*>(emulation::exchange(&matrix, sizeof(matrix)));
    const auto element = [&](unsigned i, unsigned j) { return pairs[4 * i + j / 2] >> 16 * (j % 2) & 0xffff; };
    return element(column, row) | element(column + 1, row) << 16;
}

inline void countGreater(int& count, uint32_t a, uint32_t b)
{
    count += a > b;
}

inline float exp2Fast(float x)
{
    return std::exp2(x);
}

} // namespace hip_trt

#define HIP_TRT_DECODE_CLUSTER_PTX_CUH
#define HIP_TRT_MBARRIER_CUH
