// What fills caches after decode steps: a layer's kernel on the way, or one of its own.
#pragma once

#include "hip_offload.h"

namespace hip_trt
{

// Caches of one layer whose step is over; both without blocks: nothing to fill.
struct FillWork
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

// Place the blocks that the step missed, and count the step, by a kernel of its own.
cudaError_t launchFill(const FillWork& work, cudaStream_t stream);

} // namespace hip_trt
