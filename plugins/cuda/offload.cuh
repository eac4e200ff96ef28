// Calls on pools in host memory: see hip_offload.h.
#pragma once

#include "call.cuh"
#include "offload_fill.cuh"

namespace hip_trt
{

// What is attached to a call's pools. False: nothing.
bool findOffload(const Call& call, HipTrtOffload& offload);

// Whether what is attached knows every block of the call's pools.
bool cachesCover(const Call& call, const HipTrtOffload& offload);

// Wait for what earlier calls left in the lane.
cudaError_t settle(const HipTrtOffload& offload, cudaStream_t stream);

// What a layer's decode step is to fill on the way: the caches of the layer before.
LayerCaches fillBeside(const Call& call, const HipTrtOffload& offload);

// What is attached, as kernels get it.
LayerCaches cachesOf(const Call& call, const HipTrtOffload& offload);

// Write a single-token call's new rows to the copies of their blocks in call.caches.
cudaError_t updateCopies(const Call& call, cudaStream_t stream);

// Before and after a decode step of a layer whose caches are used.
cudaError_t beginDecode(const HipTrtOffload& offload, cudaStream_t stream);
cudaError_t endDecode(const Call& call, const HipTrtOffload& offload, cudaStream_t stream);

// Drop cached copies of the blocks that a call writes to its pools.
cudaError_t forgetWritten(const Call& call, const HipTrtOffload& offload, cudaStream_t stream);

// Whether the staging area holds every page that a call may use.
bool canStage(const Call& call, const HipTrtOffload& offload);

// Copy the committed pages of a call's sequences to the staging area. Returns the call on that area, whose new rows are
// yet to be written.
cudaError_t stagePages(const Call& call, const HipTrtOffload& offload, Call& staged, cudaStream_t stream);

// Copy the new rows of a staged call to the pools of `call`, beside the layers that follow.
cudaError_t writeOut(const Call& call, const Call& staged, const HipTrtOffload& offload, cudaStream_t stream);

} // namespace hip_trt
