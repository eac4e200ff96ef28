// Where calls run: a CUDA GPU, or this machine's CPU, when the plugin's kernels were compiled for it as C++.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <functional>

namespace device
{

//! Whether calls can be run; a failed check if not.
bool available();

//! Memory that kernels can reach.
void* allocate(size_t bytes);
void release(void* memory);

//! Copy between host and device, or within either.
void copy(void* to, void const* from, size_t bytes);

void fill(void* memory, int byte, size_t bytes);

//! Do work on a stream of its own, and wait for it.
void run(std::function<void(cudaStream_t)> const& work);

//! Capture work in a CUDA graph and launch it, each time after prepare(); on a CPU do it again.
void replay(std::function<void(cudaStream_t)> const& work, std::function<void()> const& prepare, int times);

} // namespace device
