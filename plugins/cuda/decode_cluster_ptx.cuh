// What thread-block clusters need beyond ptx.cuh (compute capability 9.0 and later): their own barrier, stores into a
// neighbour's shared memory, loads and copies of the decode kernel.
#ifndef HIP_TRT_DECODE_CLUSTER_PTX_CUH // not #pragma once: plugins/tests/emulation puts its own in place
#define HIP_TRT_DECODE_CLUSTER_PTX_CUH

#include "mbarrier.cuh"

namespace hip_trt
{

// ---- Cluster ----

// Announce that this thread has come here. Of what it wrote before, only published barriers are sure to be seen by who
// waits.
__device__ __forceinline__ void clusterArrive()
{
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n" ::: "memory");
}

// Wait until all threads of the cluster have announced themselves.
__device__ __forceinline__ void clusterWait()
{
    asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

// The address, in the shared memory of the thread block of this rank, of what lies at `address` in this one's.
__device__ __forceinline__ uint32_t peerAddress(uint32_t address, int rank)
{
    uint32_t peer;
    asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(peer) : "r"(address), "r"(rank));
    return peer;
}

// Store to a peer's shared memory, and count the bytes on the peer's barrier once they are there.
__device__ __forceinline__ void storeAsync(uint32_t peer_address, uint32_t value, uint32_t peer_barrier)
{
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];\n" ::"r"(peer_address),
        "r"(value), "r"(peer_barrier)
        : "memory");
}

__device__ __forceinline__ void storeAsync(uint32_t peer_address, float2 value, uint32_t peer_barrier)
{
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];\n" ::"r"(
                     peer_address),
        "r"(__float_as_uint(value.x)), "r"(__float_as_uint(value.y)), "r"(peer_barrier)
        : "memory");
}

__device__ __forceinline__ void storeAsync(uint32_t peer_address, float4 value, uint32_t peer_barrier)
{
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];\n" ::"r"(
                     peer_address),
        "r"(__float_as_uint(value.x)), "r"(__float_as_uint(value.y)), "r"(__float_as_uint(value.z)),
        "r"(__float_as_uint(value.w)), "r"(peer_barrier)
        : "memory");
}

// ---- Data ----

// 16 bytes that nobody writes during the kernel and that will not be read again soon.
__device__ __forceinline__ uint4 loadOnce(const void* address)
{
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
    return value;
}

// Have these values in these registers from now on: the compiler would else move words together before every use.
__device__ __forceinline__ void settle(uint32_t (&words)[4])
{
    asm volatile("" : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3]));
}

// Start to copy 4 bytes to shared memory.
__device__ __forceinline__ void copyAsync4(void* shared, const void* global)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(sharedAddress(shared)), "l"(global) : "memory");
}

// An 8x8 matrix of 2-byte elements, transposed: lane i holds elements 2 (i % 4) and 2 (i % 4) + 1 of row i / 4.
__device__ __forceinline__ uint32_t transposeMatrix(uint32_t matrix)
{
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(transposed) : "r"(matrix));
    return transposed;
}

// Add 1 to `count` if a > b. The compiler's own way takes a third instruction.
__device__ __forceinline__ void countGreater(int& count, uint32_t a, uint32_t b)
{
    asm("{\n.reg .pred greater;\nsetp.gt.u32 greater, %1, %2;\n@greater add.s32 %0, %0, 1;\n}\n"
        : "+r"(count)
        : "r"(a), "r"(b));
}

constexpr int kPrefetchBytes = 128;

// Start to bring the kPrefetchBytes around an address into the L2 cache.
__device__ __forceinline__ void prefetchToL2(const void* address)
{
    asm volatile("prefetch.global.L2 [%0];\n" ::"l"(address));
}

// 2^x, to about 2 units in the last place; 0 for -infinity.
__device__ __forceinline__ float exp2Fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

} // namespace hip_trt

#endif // HIP_TRT_DECODE_CLUSTER_PTX_CUH
