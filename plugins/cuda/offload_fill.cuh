// The kernel that fills caches after decode steps.
#pragma once

#include "hip_offload.h"

namespace hip_trt
{

// Caches of one layer whose step is over.
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
};

// Place the blocks that the step missed, and count the step.
cudaError_t launchFill(const FillWork& work, cudaStream_t stream);

} // namespace hip_trt
