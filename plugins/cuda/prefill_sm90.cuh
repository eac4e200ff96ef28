// The steps of a prefill that have kernels of their own for compute capability 9.0, and which calls those suit.
#pragma once

#include "call.cuh"

namespace hip_trt
{

// Asks about the current device.
bool searchesOnHopper(const Call& call);
bool attendsOnHopper(const Call& call);

// As searchMasks and attend of kernels.cuh, for calls that suit.
template <typename T, int D>
cudaError_t searchPrefillSm90(const Call& call, cudaStream_t stream);

template <typename T, int D>
cudaError_t attendPrefillSm90(const Call& call, cudaStream_t stream);

} // namespace hip_trt
