// Hopper's own instructions: the bulk tensor copy engine and what warpgroups need. Names follow the
// PTX ISA. Everything here exists on sm_90a only: kernels guard with HIP_TRT_SM90A.
#pragma once

#include "mbarrier.cuh"

#include <cuda.h>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HIP_TRT_SM90A 1
#endif

namespace hip_trt
{

// --- Bulk tensor copy.

// Start to copy the box of `map` at (column, row) to shared memory, completing on `barrier`.
__device__ __forceinline__ void copyBoxAsync(
    void* shared, const CUtensorMap* map, int column, int row, uint64_t* barrier)
{
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];\n" ::"r"(
            sharedAddress(shared)),
        "l"(map), "r"(column), "r"(row), "r"(sharedAddress(barrier))
        : "memory");
}

__device__ __forceinline__ void prefetchMap(const CUtensorMap* map)
{
    asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// Order this thread's ordinary writes to shared memory before later reads by the tensor cores or the copy engine.
__device__ __forceinline__ void fenceSharedForAsync()
{
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// --- Registers and barriers of a warpgroup.

template <int Registers>
__device__ __forceinline__ void growRegisters()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(Registers));
}

template <int Registers>
__device__ __forceinline__ void shrinkRegisters()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(Registers));
}

// Barrier `id` (1 to 15) of `threads` threads of the block.
__device__ __forceinline__ void namedBarrier(int id, int threads)
{
    asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

} // namespace hip_trt
