// The steps of one call, in launch order. Each returns the error of its launches.
#pragma once

#include "call.cuh"

namespace hip_trt
{

// The past pools' rows in present pools that do not share their buffers.
cudaError_t copyPools(const Call& call, cudaStream_t stream);

// present pools: past pools and the new rows. Also clears the output of padding rows.
cudaError_t updateCache(const Call& call, cudaStream_t stream);

// Chosen blocks of every query block and mask head, and present_nodes. Reads keys of the present pool.
template <typename T, int D>
cudaError_t searchMasks(const Call& call, cudaStream_t stream);

// The output, from chosen blocks and the present pools.
template <typename T, int D>
cudaError_t attend(const Call& call, cudaStream_t stream);

// Head sizes that kernels are compiled for; other ones are padded with zeros in shared memory.
constexpr int kSmallHeadDim = 64;
constexpr int kLargeHeadDim = 128;

} // namespace hip_trt
