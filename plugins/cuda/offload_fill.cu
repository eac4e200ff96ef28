#include "offload_fill.cuh"

#include "block_cache_fill.cuh"
#include "launch.cuh"

#include <new>

namespace hip_trt
{

namespace
{

constexpr int kThreads = kCacheThreads;
constexpr int kFillBlocks = 16; // thread blocks that fill a cache: 128 blocks on their way at once keep the bus busy

// A warp per missed block; then the lists are emptied, and the step is counted. blockIdx.y: keys, or values.
__global__ void __launch_bounds__(kThreads) fillKernel(const __grid_constant__ FillWork work)
{
    const bool is_key = blockIdx.y == 0;
    Word* const counters = reinterpret_cast<Word*>(work.counters);
    BlockCache& cache = *reinterpret_cast<BlockCache*>(dynamicShared());
    if (threadIdx.x == 0)
    {
        new (&cache) BlockCache(is_key ? work.keys : work.values, is_key ? work.key_pool : work.value_pool,
            work.landing, work.block_k_log2, work.row_bytes, work.counters);
    }
    __syncthreads();
    const int count = cache.blocks == 0 ? 0 : min(cache.missed[0], cache.blocks);
    const int warp = threadIdx.x / kWarpSize * gridDim.x + blockIdx.x;
    for (int i = warp; i < count; i += gridDim.x * (kThreads / kWarpSize))
    {
        const int2 missed = reinterpret_cast<const int2*>(cache.missed + HIP_TRT_CACHE_MISSED_HEADER)[i];
        place(cache, static_cast<uint32_t>(missed.x), missed.y);
    }
    __syncthreads();
    if (threadIdx.x < HIP_TRT_CACHE_EVENTS && cache.events[threadIdx.x] != 0)
    {
        Word* const events = counters + HIP_TRT_OFFLOAD_EVENTS_AT + blockIdx.y * HIP_TRT_CACHE_EVENTS;
        atomicAdd(events + threadIdx.x, static_cast<Word>(cache.events[threadIdx.x]));
    }
    __threadfence(); // what was read here may be written anew by who finds the tickets given back
    if (threadIdx.x == 0 && atomicAdd(counters + 1, static_cast<Word>(1)) == gridDim.x * gridDim.y - 1)
    {
        // All thread blocks have read the lists, what landed, and the step.
        for (int32_t* const missed : {work.keys.missed, work.values.missed})
        {
            if (missed != nullptr)
            {
                if (work.landing.blocks != 0)
                {
                    atomicAdd(work.landing.tickets + 1, static_cast<uint32_t>(missed[0]));
                }
                missed[0] = 0;
            }
        }
        counters[1] = 0;
        ++counters[0];
    }
}

} // namespace

cudaError_t launchFill(const FillWork& work, cudaStream_t stream)
{
    return launch(fillKernel, dim3(kFillBlocks, 2), kThreads, sizeof(BlockCache), stream, work);
}

} // namespace hip_trt
