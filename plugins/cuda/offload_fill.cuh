// What fills caches after decode steps: a layer's kernel on the way, or one of its own.
#pragma once

#include "layer_caches.cuh"

namespace hip_trt
{

// Place the blocks that the step missed, and count the step, by a kernel of its own.
cudaError_t launchFill(const LayerCaches& caches, cudaStream_t stream);

} // namespace hip_trt
