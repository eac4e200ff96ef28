// Hopper's own instructions: warpgroup matrix products, the bulk tensor copy engine and its barriers. Names follow the
// PTX ISA. Everything here exists on sm_90a only: kernels guard with HIP_TRT_SM90A.
#pragma once

#include "ptx.cuh"

#include <cuda.h>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HIP_TRT_SM90A 1
#endif

namespace hip_trt
{

// --- mbarrier: a counter in shared memory that threads arrive at and that copies complete on.

__device__ __forceinline__ void initBarrier(uint64_t* barrier, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(sharedAddress(barrier)), "r"(arrivals) : "memory");
}

// Make the initialized barriers visible to the copy engine.
__device__ __forceinline__ void fenceBarrierInit()
{
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void arrive(uint64_t* barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(sharedAddress(barrier)) : "memory");
}

// Arrive, and expect copies of so many bytes before the phase ends.
__device__ __forceinline__ void arriveExpectBytes(uint64_t* barrier, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(sharedAddress(barrier)), "r"(bytes)
                 : "memory");
}

// Wait until the phase of this parity has ended.
__device__ __forceinline__ void wait(uint64_t* barrier, int parity)
{
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished;\n"
        "bra again;\n"
        "finished:\n"
        "}\n" ::"r"(sharedAddress(barrier)),
        "r"(parity)
        : "memory");
}

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
