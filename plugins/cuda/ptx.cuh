// The few instructions that CUDA C++ has no name for (compute capability 8.0 and later).
#ifndef HIP_TRT_PTX_CUH // not #pragma once: plugins/tests/emulation puts its own in place
#define HIP_TRT_PTX_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace hip_trt
{

__device__ __forceinline__ unsigned sharedAddress(const void* pointer)
{
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Shared memory whose size the launch gives.
__device__ __forceinline__ char* dynamicShared()
{
    extern __shared__ uint4 memory[];
    return reinterpret_cast<char*>(memory);
}

// Start to copy 16 bytes to shared memory; zeros, and no read, if not `valid`.
__device__ __forceinline__ void copyAsync16(void* shared, const void* global, bool valid)
{
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(sharedAddress(shared)), "l"(global), "r"(bytes)
                 : "memory");
}

// What memory holds now: for what is written while the kernel runs.
__device__ __forceinline__ uint4 loadCurrent(const void* address)
{
    uint4 value;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address)
                 : "memory");
    return value;
}

__device__ __forceinline__ unsigned long long loadCurrent(const unsigned long long* address)
{
    unsigned long long value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];\n" : "=l"(value) : "l"(address) : "memory");
    return value;
}

__device__ __forceinline__ int32_t loadCurrent(const int32_t* address)
{
    int32_t value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];\n" : "=r"(value) : "l"(address) : "memory");
    return value;
}

// Close the group of copies that this thread started since the last call.
__device__ __forceinline__ void commitCopies()
{
    asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Wait until at most `Pending` of this thread's newest groups are under way.
template <int Pending>
__device__ __forceinline__ void waitCopies()
{
    asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
}

// Four 8x8 matrices of 2-byte elements: lane i names row i % 8 of matrix i / 8 and receives, of each matrix, the
// elements 2 (i % 4) and 2 (i % 4) + 1 of row i / 4.
__device__ __forceinline__ void loadMatrices(uint32_t (&matrix)[4], const void* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                 : "r"(sharedAddress(row))
                 : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void loadMatricesTransposed(uint32_t (&matrix)[4], const void* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                 : "r"(sharedAddress(row))
                 : "memory");
}

// sum[16x8] += a[16x16] b[16x8] on the tensor cores. With g = lane / 4 and t = lane % 4, a lane holds of `sum` row g,
// columns 2t and 2t + 1, then the same of row g + 8; the operands are laid out as loadMatrices returns them.
template <typename T>
__device__ __forceinline__ void multiplyAdd(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiplyAdd<__half>(
    float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiplyAdd<__nv_bfloat16>(
    float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

} // namespace hip_trt

#endif // HIP_TRT_PTX_CUH
