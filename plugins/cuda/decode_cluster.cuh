// Decode steps on GPUs with thread-block clusters (compute capability 9.0 and later): the host's side.
#pragma once

#include "call.cuh"
#include "divisor.cuh"
#include "offload_fill.cuh"

namespace hip_trt
{

constexpr int kDecodeThreads = 256; // of a thread block

// Levels of any tree: 2^22 blocks, halved.
constexpr int kMaxLevels = 24;

// Candidates of a level that one cluster holds; bounds the reciprocal of a node's width too.
constexpr int kMaxCandidates = 8192;
constexpr int kReciprocalShift = 18;

// Floats between the heads of a partial result, so that lanes that store different heads use different banks.
constexpr int kPartialPadding = 8;

// What comes first in a thread block's shared memory: three barriers, the nodes of the last exchange, and two block caches.
constexpr int kBarrierBytes = 4 * sizeof(uint64_t);
constexpr int kCachesAt = kBarrierBytes + 32;
constexpr int kBlockCacheBytes = 1152;
constexpr int kHeaderBytes = kCachesAt + 2 * kBlockCacheBytes;

// Offsets into a thread block's shared memory.
struct DecodeLayout
{
    int keys;
    int marks;
    int lists;
    int table;
    int queries;
    int scratch;
    int states;
    int inbox;
    int inbox_states;
    int bytes;
};

// One decode step as the kernel sees it.
struct DecodeCall
{
    Call call;
    LayerCaches fill; // beside that, of another layer
    Divisor page_size;
    Divisor level_size[kMaxLevels]; // blocks that a node of each level covers
    uint32_t branch_reciprocal;      // 2^kReciprocalShift over the width, rounded up
    uint32_t leaf_branch_reciprocal;
    int cluster_log2;     // thread blocks per sequence and mask head
    int capacity;      // candidates of a level, rounded up to whole words of bits
    int list_capacity; // nodes of a list, rounded up
    int table_entries; // of the page table that are copied to shared memory; 0: it is read where it is
    float scale_log2e;
    int scratch_bytes; // of a warp
    DecodeLayout layout;
};

using DecodeKernel = void (*)(DecodeCall);

// The kernel for a type, a head size of 64 or 128, and up to 16 query heads per mask; for pools in GPU memory, and for
// pools in host memory with caches.
template <typename T>
DecodeKernel findDecodeKernel(int head_dim, int heads_per_mask);
template <typename T>
DecodeKernel findOffloadedDecodeKernel(int head_dim, int heads_per_mask);

// Whether this path computes a call: its configuration and shape, on the current device.
bool decodeClusterSupports(const Call& call);

// Launch it, cache update included, with 2^cluster_log2 thread blocks per sequence and mask head; by default as many as
// the device holds at once. Pools in host memory are read through call.caches. `fill`: what to fill beside it, of another
// layer.
cudaError_t launchDecodeCluster(
    const Call& call, const LayerCaches& fill, cudaStream_t stream, int cluster_log2 = -1);

} // namespace hip_trt
