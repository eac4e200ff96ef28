// Barriers in shared memory that threads arrive at and that copies complete on (compute capability 9.0 and later). A phase
// ends once all arrivals have been made and all expected bytes have come.
#ifndef HIP_TRT_MBARRIER_CUH // not #pragma once: plugins/tests/emulation puts its own in place
#define HIP_TRT_MBARRIER_CUH

#include "ptx.cuh"

namespace hip_trt
{

__device__ __forceinline__ void initBarrier(uint64_t* barrier, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(sharedAddress(barrier)), "r"(arrivals) : "memory");
}

// Make this thread's initialized barriers known to the copy engine, and to the cluster with its next barrier.
__device__ __forceinline__ void publishBarriers()
{
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void arrive(uint64_t* barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(sharedAddress(barrier)) : "memory");
}

// Arrive, and expect so many bytes before the phase ends. They may come before they are expected.
__device__ __forceinline__ void arriveExpectBytes(uint64_t* barrier, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(sharedAddress(barrier)), "r"(bytes)
                 : "memory");
}

// Wait until the phase of this parity has ended.
__device__ __forceinline__ void waitBarrier(uint64_t* barrier, uint32_t parity)
{
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
        "@!complete bra WAIT;\n"
        "}\n" ::"r"(sharedAddress(barrier)),
        "r"(parity)
        : "memory");
}

} // namespace hip_trt

#endif // HIP_TRT_MBARRIER_CUH
