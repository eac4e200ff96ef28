#include "offload_fill.cuh"

#include "block_cache_fill.cuh"
#include "launch.cuh"

namespace hip_trt
{

namespace
{

constexpr int kThreads = kCacheThreads;

__global__ void __launch_bounds__(kThreads) fillKernel(const __grid_constant__ LayerCaches work)
{
    fillCaches(work, reinterpret_cast<BlockCache*>(dynamicShared()), blockIdx.x, gridDim.x);
}

} // namespace

cudaError_t launchFill(const LayerCaches& work, cudaStream_t stream)
{
    return work.empty() ? cudaSuccess : launch(fillKernel, dim3(kFillBlocks), kThreads, 2 * sizeof(BlockCache), stream, work);
}

} // namespace hip_trt
