// CUDA kernels on the CPU, for tests: the sources of plugins/cuda compiled as C++ with this header included first.
//
// One cluster of thread blocks, mostly of one, runs at a time, each thread as a fiber that runs until it has to wait for
// others. It is slow,
// but it finds wrong indices, missing waits for asynchronous copies, reads of shared memory that nothing wrote, and
// barriers that not all threads reach, on a machine without a GPU. What it cannot find is a missing barrier between
// threads that happen to run in the right order; odd clusters start their threads in reverse to make that rarer.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

using std::max;
using std::min;

namespace emulation
{

struct Coordinates
{
    unsigned x, y, z;
};

constexpr unsigned kWarpSize = 32;
constexpr size_t kSharedBytes = 99 * 1024; // what every supported GPU grants
constexpr unsigned kMaxBlocks = 8;        // of a cluster

// The thread that runs now.
extern Coordinates thread_index, block_index, block_size, grid_size;

// Run `thread` once for every thread of the grid; cudaErrorInvalidValue if a GPU would refuse the launch. Clusters lie
// along x.
cudaError_t runGrid(
    dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& thread, unsigned cluster = 1);

// Have work run in a stream.
cudaError_t enqueue(cudaStream_t stream, std::function<cudaError_t()> work);

void waitForBlock();
void waitForWarp();
void waitForCluster();
void letOthersRun();
unsigned rank(); // of the thread block in its cluster
char* sharedMemory(unsigned rank);

// Every lane of the warp gives `bytes` bytes and receives all lanes'.
const void* exchange(const void* value, size_t bytes);

// Asynchronous copies of the thread, done when they are waited for.
void startCopy(void* to, const void* from, bool valid, size_t bytes);
void commitCopies();
void waitCopies(int pending);

template <typename Value>
Value fromLane(Value value, unsigned lane)
{
    return static_cast<const Value*>(exchange(&value, sizeof(value)))[lane % kWarpSize];
}

inline unsigned lane()
{
    return thread_index.x % kWarpSize;
}

} // namespace emulation

inline emulation::Coordinates& threadIdx = emulation::thread_index;
inline emulation::Coordinates& blockIdx = emulation::block_index;
inline emulation::Coordinates& blockDim = emulation::block_size;
inline emulation::Coordinates& gridDim = emulation::grid_size;

inline void __syncthreads()
{
    emulation::waitForBlock();
}

int __syncthreads_and(int predicate);
int __syncthreads_count(int predicate);

inline void __syncwarp()
{
    emulation::waitForWarp();
}

template <typename Value>
Value __shfl_sync(unsigned, Value value, int lane)
{
    return emulation::fromLane(value, lane);
}

template <typename Value>
Value __shfl_xor_sync(unsigned, Value value, int mask)
{
    return emulation::fromLane(value, emulation::lane() ^ mask);
}

template <typename Value>
Value __shfl_up_sync(unsigned, Value value, unsigned distance)
{
    const unsigned lane = emulation::lane();
    return emulation::fromLane(value, lane >= distance ? lane - distance : lane);
}

inline unsigned __ballot_sync(unsigned, int predicate)
{
    const int* const predicates = static_cast<const int*>(emulation::exchange(&predicate, sizeof(predicate)));
    unsigned ballot = 0;
    for (unsigned i = 0; i < emulation::kWarpSize; ++i)
    {
        ballot |= (predicates[i] != 0 ? 1u : 0u) << i;
    }
    return ballot;
}

inline int __clz(int value)
{
    return value == 0 ? 32 : __builtin_clz(value);
}

inline unsigned __umulhi(unsigned left, unsigned right)
{
    return static_cast<unsigned>(static_cast<uint64_t>(left) * right >> 32);
}

inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift)
{
    return shift >= 32 ? low : static_cast<unsigned>(((static_cast<uint64_t>(high) << 32 | low) << shift) >> 32);
}

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift)
{
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector)
{
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    unsigned result = 0;
    for (unsigned i = 0; i < 4; ++i)
    {
        result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    }
    return result;
}

inline unsigned atomicOr(unsigned* address, unsigned value)
{
    const unsigned old = *address;
    *address |= value;
    return old;
}

template <typename Value>
Value atomicCAS(Value* address, Value expected, Value value)
{
    const Value old = *address;
    if (old == expected)
    {
        *address = value;
    }
    return old;
}

template <typename Value>
Value atomicExch(Value* address, Value value)
{
    const Value old = *address;
    *address = value;
    return old;
}

inline void __threadfence()
{
}

inline int __any_sync(unsigned mask, int predicate)
{
    return __ballot_sync(mask, predicate) != 0;
}

inline int __reduce_max_sync(unsigned, int value)
{
    const int* const values = static_cast<const int*>(emulation::exchange(&value, sizeof(value)));
    return *std::max_element(values, values + emulation::kWarpSize);
}

inline unsigned __reduce_max_sync(unsigned, unsigned value)
{
    const unsigned* const values = static_cast<const unsigned*>(emulation::exchange(&value, sizeof(value)));
    return *std::max_element(values, values + emulation::kWarpSize);
}

inline unsigned __reduce_min_sync(unsigned, unsigned value)
{
    const unsigned* const values = static_cast<const unsigned*>(emulation::exchange(&value, sizeof(value)));
    return *std::min_element(values, values + emulation::kWarpSize);
}

inline int __ffs(unsigned bits)
{
    return __builtin_ffs(static_cast<int>(bits));
}

inline int __popc(unsigned bits)
{
    return __builtin_popcount(bits);
}

inline unsigned __float_as_uint(float value)
{
    unsigned bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

inline float __uint_as_float(unsigned bits)
{
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

template <typename Value>
Value atomicAdd(Value* address, Value value)
{
    const Value old = *address;
    *address += value;
    return old;
}

namespace hip_trt
{

// In place of plugins/cuda/launch.cuh.
template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes, cudaStream_t stream,
    const Parameters&... arguments)
{
    return emulation::enqueue(
        stream, [=] { return emulation::runGrid(grid, threads, shared_bytes, [&] { kernel(arguments...); }); });
}

// In place of plugins/cuda/overlap.cuh: kernels run one after the other.
inline void waitForEarlierKernels()
{
}

inline void letNextKernelStart()
{
}

template <typename... Parameters>
cudaError_t launchOverlapped(bool, void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes,
    cudaStream_t stream, const Parameters&... arguments)
{
    return launch(kernel, grid, threads, shared_bytes, stream, arguments...);
}

// In place of plugins/cuda/ptx.cuh.
inline char* dynamicShared()
{
    return emulation::sharedMemory(emulation::rank());
}

inline void copyAsync16(void* shared, const void* global, bool valid)
{
    emulation::startCopy(shared, global, valid, 16);
}

inline uint4 loadCurrent(const void* address)
{
    return *static_cast<const uint4*>(address);
}

inline unsigned long long loadCurrent(const unsigned long long* address)
{
    return *address;
}

inline int32_t loadCurrent(const int32_t* address)
{
    return *address;
}

inline void commitCopies()
{
    emulation::commitCopies();
}

template <int Pending>
void waitCopies()
{
    emulation::waitCopies(Pending);
}

inline void loadMatrices(uint32_t (&matrix)[4], const void* row)
{
    const unsigned lane = emulation::lane();
    const void* const* rows = static_cast<const void* const*>(emulation::exchange(&row, sizeof(row)));
    for (unsigned i = 0; i < 4; ++i)
    {
        matrix[i] = static_cast<const uint32_t*>(rows[8 * i + lane / 4])[lane % 4];
    }
    emulation::waitForWarp();
}

inline void loadMatricesTransposed(uint32_t (&matrix)[4], const void* row)
{
    const unsigned lane = emulation::lane();
    const void* const* rows = static_cast<const void* const*>(emulation::exchange(&row, sizeof(row)));
    for (unsigned i = 0; i < 4; ++i)
    {
        const uint32_t low = static_cast<const uint16_t*>(rows[8 * i + lane % 4 * 2])[lane / 4];
        const uint32_t high = static_cast<const uint16_t*>(rows[8 * i + lane % 4 * 2 + 1])[lane / 4];
        matrix[i] = low | high << 16;
    }
    emulation::waitForWarp();
}

template <typename T>
float element(uint32_t pair, unsigned index);

template <>
inline float element<__half>(uint32_t pair, unsigned index)
{
    return __half2float({static_cast<uint16_t>(pair >> 16 * index)});
}

template <>
inline float element<__nv_bfloat16>(uint32_t pair, unsigned index)
{
    return __bfloat162float({static_cast<uint16_t>(pair >> 16 * index)});
}

template <typename T>
void multiplyAdd(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    struct Operands
    {
        uint32_t a[4], b[2];
    };
    const Operands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const unsigned lane = emulation::lane();
    const Operands* const all = static_cast<const Operands*>(emulation::exchange(&mine, sizeof(mine)));
    for (unsigned k = 0; k < 16; ++k)
    {
        const unsigned holder = k % 8 / 2;
        for (unsigned i = 0; i < 4; ++i)
        {
            const float left = element<T>(all[lane / 4 * 4 + holder].a[i / 2 + k / 8 * 2], k % 2);
            const float right = element<T>(all[(lane % 4 * 2 + i % 2) * 4 + holder].b[k / 8], k % 2);
            sum[i] += left * right;
        }
    }
}

} // namespace hip_trt

#define HIP_TRT_LAUNCH_CUH
#define HIP_TRT_OVERLAP_CUH
#define HIP_TRT_PTX_CUH

#include "cluster.h"
