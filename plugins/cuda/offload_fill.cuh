// What fills caches after decode steps: a layer's kernel on the way, or one of its own.
#pragma once

#include "layer_caches.cuh"

namespace hip_trt
{

constexpr int kFillBlocks = 32; // thread blocks, at least: 256 cache blocks on their way at once

// Place the blocks that the step missed, and count the step, by a kernel of its own.
cudaError_t launchFill(const LayerCaches& caches, cudaStream_t stream);

} // namespace hip_trt
