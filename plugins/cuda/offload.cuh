// Calls on pools in host memory: see hip_offload.h.
#pragma once

#include "call.cuh"
#include "hip_offload.h"

namespace hip_trt
{

// What is attached to a call's pools. False: nothing.
bool findOffload(const Call& call, HipTrtOffload& offload);

// Drop cached copies of the blocks that a call writes to its pools.
cudaError_t forgetWritten(const Call& call, const HipTrtOffload& offload, cudaStream_t stream);

// Whether the staging area holds every page that a call may use.
bool canStage(const Call& call, const HipTrtOffload& offload);

// Copy the committed pages of a call's sequences to the staging area. Returns the call on that area, whose new rows are
// yet to be written.
cudaError_t stagePages(const Call& call, const HipTrtOffload& offload, Call& staged, cudaStream_t stream);

} // namespace hip_trt
