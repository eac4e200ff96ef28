// The caches of one layer, and the pools behind them, as kernels get them.
#pragma once

#include "hip_offload.h"

#include <cuda_runtime.h>

namespace hip_trt
{

// Both without blocks: there are none, or nothing shall use them.
struct LayerCaches
{
    HipTrtBlockCache keys;
    HipTrtBlockCache values;
    HipTrtLanding landing;
    const void* key_pool;
    const void* value_pool;
    uint64_t* counters;
    int block_k_log2;
    int row_bytes;

    __host__ __device__ bool empty() const
    {
        return keys.blocks == 0 && values.blocks == 0;
    }
};

} // namespace hip_trt
