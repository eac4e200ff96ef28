// Hopper's warpgroup matrix products (sm_90a), with operands in shared memory as the bulk tensor copy engine lays them.
#pragma once

#include "ptx.cuh"

#include <type_traits>

namespace hip_trt
{

// --- wgmma: D[64 x N] += A[64 x 16] B[16 x N], issued by the four warps of a warpgroup.

// Shared-memory tiles are rows of 128 bytes (64 elements of 2 bytes), their 16-byte chunks permuted by the 128-byte
// swizzle: chunk c of row r lies at chunk c ^ (r % 8). Groups of eight rows, 1024 bytes, are the unit. Tiles start at
// multiples of 1024 bytes.
constexpr int kSwizzleRowBytes = 128;
constexpr int kSwizzleGroupBytes = 8 * kSwizzleRowBytes;

// Descriptor of a tile; `leading` is the distance in bytes between 64-column halves, read only for operands whose
// columns are the M or N dimension.
__device__ __forceinline__ uint64_t tileDescriptor(const void* shared, int leading = 16)
{
    constexpr uint64_t kSwizzle128 = 1ull << 62;
    return static_cast<uint64_t>((sharedAddress(shared) & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16
        | static_cast<uint64_t>(kSwizzleGroupBytes >> 4) << 32 | kSwizzle128;
}

// The descriptor moved by bytes.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes)
{
    return descriptor + (bytes >> 4);
}

__device__ __forceinline__ void warpgroupArrive()
{
    asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void warpgroupCommit()
{
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

template <int Pending>
__device__ __forceinline__ void warpgroupWait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(Pending) : "memory");
}

// Keep the compiler from moving uses of accumulators across the waits.
template <int N>
__device__ __forceinline__ void fenceRegisters(float (&registers)[N])
{
#pragma unroll
    for (int i = 0; i < N; ++i)
    {
        asm volatile("" : "+f"(registers[i])::"memory");
    }
}

#define HIP_TRT_OUT8(d, i)                                                                                             \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),        \
        "+f"(d[i + 7])
#define HIP_TRT_OUT32(d, i) HIP_TRT_OUT8(d, i), HIP_TRT_OUT8(d, i + 8), HIP_TRT_OUT8(d, i + 16), HIP_TRT_OUT8(d, i + 24)
#define HIP_TRT_LIST32                                                                                                 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"   \
    "%30,%31"
#define HIP_TRT_LIST64                                                                                                 \
    HIP_TRT_LIST32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,"     \
                   "%55,%56,%57,%58,%59,%60,%61,%62,%63"

// `accumulate` 0 starts the sum anew. Operands %N.. follow the accumulators.
#define HIP_TRT_WGMMA_SS(SHAPE, TYPE, LIST, A, B, P, ...)                                                              \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                                        \
                 "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" LIST "}, " A ", " B                  \
                 ", p, 1, 1, 0, 0;\n}\n"                                                                               \
                 : __VA_ARGS__                                                                                         \
                 : "l"(a), "l"(b), "r"(accumulate))
#define HIP_TRT_WGMMA_RS(SHAPE, TYPE, LIST, A, B, ...)                                                                 \
    asm volatile("wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" LIST "}, {" A "}, " B                \
                 ", 1, 1, 1, 1;\n"                                                                                     \
                 : __VA_ARGS__                                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// sum[64 x 2 Count] (+)= a . b^T: the rows of both tiles run along the dimension that is summed.
template <typename T, int Count>
__device__ __forceinline__ void multiplyTiles(float (&sum)[Count], uint64_t a, uint64_t b, int accumulate)
{
    static_assert(Count == 32 || Count == 64, "64 or 128 columns");
    constexpr bool kHalf = std::is_same_v<T, __half>;
    if constexpr (Count == 64 && kHalf)
        HIP_TRT_WGMMA_SS("m64n128k16", "f16", HIP_TRT_LIST64, "%64", "%65", "%66", HIP_TRT_OUT32(sum, 0),
            HIP_TRT_OUT32(sum, 32));
    else if constexpr (Count == 64)
        HIP_TRT_WGMMA_SS("m64n128k16", "bf16", HIP_TRT_LIST64, "%64", "%65", "%66", HIP_TRT_OUT32(sum, 0),
            HIP_TRT_OUT32(sum, 32));
    else if constexpr (kHalf)
        HIP_TRT_WGMMA_SS("m64n64k16", "f16", HIP_TRT_LIST32, "%32", "%33", "%34", HIP_TRT_OUT32(sum, 0));
    else
        HIP_TRT_WGMMA_SS("m64n64k16", "bf16", HIP_TRT_LIST32, "%32", "%33", "%34", HIP_TRT_OUT32(sum, 0));
}

// sum[64 x 2 Count] += a . b: `a` is 64 x 16 in registers, in the layout of two neighbouring 8-column groups of an
// accumulator; the rows of b run along the columns of the sum.
template <typename T, int Count>
__device__ __forceinline__ void multiplyRegisters(float (&sum)[Count], const uint32_t (&a)[4], uint64_t b)
{
    static_assert(Count == 32 || Count == 64, "64 or 128 columns");
    constexpr bool kHalf = std::is_same_v<T, __half>;
    if constexpr (Count == 64 && kHalf)
        HIP_TRT_WGMMA_RS("m64n128k16", "f16", HIP_TRT_LIST64, "%64, %65, %66, %67", "%68", HIP_TRT_OUT32(sum, 0),
            HIP_TRT_OUT32(sum, 32));
    else if constexpr (Count == 64)
        HIP_TRT_WGMMA_RS("m64n128k16", "bf16", HIP_TRT_LIST64, "%64, %65, %66, %67", "%68", HIP_TRT_OUT32(sum, 0),
            HIP_TRT_OUT32(sum, 32));
    else if constexpr (kHalf)
        HIP_TRT_WGMMA_RS("m64n64k16", "f16", HIP_TRT_LIST32, "%32, %33, %34, %35", "%36", HIP_TRT_OUT32(sum, 0));
    else
        HIP_TRT_WGMMA_RS("m64n64k16", "bf16", HIP_TRT_LIST32, "%32, %33, %34, %35", "%36", HIP_TRT_OUT32(sum, 0));
}

#undef HIP_TRT_WGMMA_SS
#undef HIP_TRT_WGMMA_RS
#undef HIP_TRT_LIST64
#undef HIP_TRT_LIST32
#undef HIP_TRT_OUT32
#undef HIP_TRT_OUT8

} // namespace hip_trt
