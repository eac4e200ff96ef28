// What the entries of the C ABI share.
#pragma once

#include "call.cuh"

#include <algorithm>
#include <initializer_list>

namespace hip_trt
{

// Whether all pointers are there, and aligned.
inline bool complete(std::initializer_list<const void*> pointers)
{
    return std::all_of(pointers.begin(), pointers.end(),
        [](const void* pointer) { return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % 16 == 0; });
}

// The status of launches, whose error is kept for hipTrtLastCudaError().
HipTrtStatus statusOf(cudaError_t error);

// Append, unless that was done, search and attention, with the kernels of the call's type and head size.
cudaError_t runSteps(const Call& call, cudaStream_t stream);

} // namespace hip_trt
