#include "decode_cluster.cuh"

#include "kernels.cuh"
#include "decode_cluster_select.cuh"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

namespace hip_trt
{
namespace
{

constexpr int kMaxHeads = 16; // query heads per mask

// Shared memory that the kernels declare themselves is less than this.
constexpr int kStaticSharedBytes = 2048;

// Page tables up to this size are copied to shared memory.
constexpr int kMaxTableBytes = 28 * 1024;

constexpr int kMaxClusterLog2 = 4; // 16 thread blocks, what compute capability 9.0 grants on request

DecodeKernel findKernel(const Call& call)
{
    const bool offloaded = call.host_pools;
    const int head_dim = call.shape.head_dim, heads = call.heads_per_mask;
    if (call.shape.type == HIP_TRT_FLOAT16)
    {
        return offloaded ? findOffloadedDecodeKernel<__half>(head_dim, heads) : findDecodeKernel<__half>(head_dim, heads);
    }
    return offloaded ? findOffloadedDecodeKernel<__nv_bfloat16>(head_dim, heads)
                     : findDecodeKernel<__nv_bfloat16>(head_dim, heads);
}

int roundUp(int value, int multiple)
{
    return (value + multiple - 1) / multiple * multiple;
}

DecodeLayout layOut(const DecodeCall& decode)
{
    const Call& call = decode.call;
    const int heads = call.heads_per_mask, dims = call.shape.head_dim, warps = kDecodeThreads / kWarpSize;
    int end = kHeaderBytes;
    const auto take = [&end](int count, int bytes) {
        const int begin = end;
        end = roundUp(end + count * bytes, 16);
        return begin;
    };
    DecodeLayout layout;
    layout.keys = take(2 * decode.capacity, sizeof(uint32_t));
    layout.marks = take(2 * decode.capacity / 32, sizeof(uint32_t));
    layout.lists = take(3 * decode.list_capacity, sizeof(int));
    layout.table = take(decode.table_entries, sizeof(int));
    layout.queries = take(16, call.row_bytes);
    layout.scratch = take(warps, decode.scratch_bytes);
    layout.states = take(warps * heads, sizeof(float2));
    layout.inbox = take(heads * dims, sizeof(float));
    layout.inbox_states = take(heads << decode.cluster_log2, sizeof(float2));
    layout.bytes = end;
    return layout;
}

DecodeCall describe(const Call& call, int cluster_log2)
{
    const HipTrtConfig& config = call.config;
    DecodeCall decode;
    decode.call = call;
    decode.page_size = Divisor(config.page_size);
    int64_t blocks = 1;
    for (int level = 0; level < kMaxLevels; ++level)
    {
        decode.level_size[level] = Divisor(static_cast<int>(blocks));
        blocks = std::min<int64_t>(blocks * (level == 0 ? config.leaf_branch : config.branch), 1 << 28);
    }
    decode.branch_reciprocal = ((1 << kReciprocalShift) + config.branch - 1) / config.branch;
    decode.leaf_branch_reciprocal = ((1 << kReciprocalShift) + config.leaf_branch - 1) / config.leaf_branch;
    decode.cluster_log2 = cluster_log2;
    decode.capacity = roundUp(call.candidate_capacity + 3, kSetAlignment);
    decode.list_capacity = roundUp(call.kept_capacity, 4);
    const int64_t table_bytes = static_cast<int64_t>(call.shape.pages_per_sequence) * sizeof(int32_t);
    decode.table_entries = table_bytes <= kMaxTableBytes ? call.shape.pages_per_sequence : 0;
    decode.scale_log2e = config.scale * 1.4426950408889634f;
    const int staged_bytes = 16 * call.row_bytes;
    const int partial_floats = call.heads_per_mask * (call.shape.head_dim + kPartialPadding);
    decode.scratch_bytes = std::max<int>(staged_bytes, partial_floats * sizeof(float));
    decode.layout = layOut(decode);
    return decode;
}

struct Device
{
    int index;
    int major;
    int max_shared_bytes; // that a launch can ask for
};

cudaError_t currentDevice(Device& device)
{
    static std::mutex mutex;
    static std::map<int, Device> devices;
    cudaError_t error = cudaGetDevice(&device.index);
    if (error != cudaSuccess)
    {
        return error;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = devices.find(device.index);
    if (found != devices.end())
    {
        device = found->second;
        return cudaSuccess;
    }
    error = cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, device.index);
    if (error == cudaSuccess)
    {
        error = cudaDeviceGetAttribute(
            &device.max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index);
    }
    if (error == cudaSuccess)
    {
        device.max_shared_bytes -= kStaticSharedBytes;
        devices[device.index] = device;
    }
    return error;
}

// `beside`: clusters per sequence that do not compute the step, but fill caches.
cudaLaunchConfig_t launchConfig(const DecodeCall& decode, unsigned beside, cudaLaunchAttribute (&attributes)[2])
{
    const unsigned cluster = 1u << decode.cluster_log2;
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {cluster, 1, 1};
    // Two thread blocks fit on a multiprocessor, but where others are idle they had better not meet there.
    attributes[1].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
    attributes[1].val.clusterSchedulingPolicyPreference = cudaClusterSchedulingPolicyLoadBalancing;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(cluster, decode.call.mask_heads + beside, decode.call.shape.batch);
    config.blockDim = dim3(kDecodeThreads);
    config.dynamicSmemBytes = decode.layout.bytes;
    config.attrs = attributes;
    config.numAttrs = 2;
    return config;
}

// Per sequence, so that enough thread blocks fill to keep memory busy, and few enough to leave the others alone.
unsigned fillClusters(const DecodeCall& decode)
{
    const int each = decode.call.shape.batch << decode.cluster_log2;
    return (kFillBlocks + each - 1) / each;
}

// How many clusters of a launch the device holds at once; also prepares the kernel for it. Remembers what it was asked.
cudaError_t clustersAtOnce(const Device& device, DecodeKernel kernel, const DecodeCall& decode, int& clusters)
{
    static std::mutex mutex;
    static std::map<std::tuple<int, DecodeKernel, int, int>, int> known;
    constexpr int kStep = 8 * 1024; // of shared memory, so that few entries are kept
    const int shared_bytes = std::min(roundUp(decode.layout.bytes, kStep), device.max_shared_bytes);
    const std::lock_guard<std::mutex> lock(mutex);
    const auto key = std::make_tuple(device.index, kernel, decode.cluster_log2, shared_bytes);
    const auto found = known.find(key);
    if (found != known.end())
    {
        clusters = found->second;
        return cudaSuccess;
    }
    const void* const function = reinterpret_cast<const void*>(kernel);
    cudaError_t error = cudaFuncSetAttribute(
        function, cudaFuncAttributeMaxDynamicSharedMemorySize, device.max_shared_bytes);
    if (error == cudaSuccess)
    {
        error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    if (error != cudaSuccess)
    {
        return error;
    }
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = launchConfig(decode, 0, attributes);
    config.dynamicSmemBytes = shared_bytes;
    if (cudaOccupancyMaxActiveClusters(&clusters, function, &config) != cudaSuccess)
    {
        cudaGetLastError(); // a cluster of this size fits nowhere
        clusters = 0;
    }
    known[key] = clusters;
    return cudaSuccess;
}

// The largest clusters that all run at once, or else the smallest that run at all.
cudaError_t chooseCluster(const Device& device, const Call& call, DecodeKernel kernel, int& cluster_log2)
{
    const int64_t needed = static_cast<int64_t>(call.shape.batch) * call.mask_heads;
    cluster_log2 = -1;
    for (int candidate = kMaxClusterLog2; candidate >= 0; --candidate)
    {
        const DecodeCall decode = describe(call, candidate);
        int clusters = 0;
        const cudaError_t error = clustersAtOnce(device, kernel, decode, clusters);
        if (error != cudaSuccess)
        {
            return error;
        }
        if (clusters > 0)
        {
            cluster_log2 = candidate;
        }
        if (clusters >= needed)
        {
            break;
        }
    }
    return cluster_log2 < 0 ? cudaErrorInvalidConfiguration : cudaSuccess;
}

} // namespace

bool decodeClusterSupports(const Call& call)
{
    const HipTrtShape& shape = call.shape;
    const int64_t rows = static_cast<int64_t>(shape.num_pages) * shape.num_kv_heads * call.config.page_size;
    Device device;
    if (!call.decode || shape.type == HIP_TRT_FLOAT32 || (shape.head_dim != 64 && shape.head_dim != 128)
        || call.config.block_k < 8 || call.config.stride_k != 1 || call.heads_per_mask > kMaxHeads
        || call.candidate_capacity > kMaxCandidates || rows >= INT64_C(0xffffffff) || shape.batch > 65535
        || currentDevice(device) != cudaSuccess || device.major < 9)
    {
        return false;
    }
    return describe(call, kMaxClusterLog2).layout.bytes <= device.max_shared_bytes;
}

cudaError_t launchDecodeCluster(
    const Call& call, const LayerCaches& fill, cudaStream_t stream, int cluster_log2)
{
    const DecodeKernel kernel = findKernel(call);
    Device device;
    cudaError_t error = currentDevice(device);
    if (error == cudaSuccess && cluster_log2 < 0)
    {
        error = chooseCluster(device, call, kernel, cluster_log2);
    }
    if (error != cudaSuccess)
    {
        return error;
    }
    DecodeCall decode = describe(call, cluster_log2);
    decode.fill = fill;
    int clusters = 0;
    error = clustersAtOnce(device, kernel, decode, clusters);
    if (error == cudaSuccess)
    {
        error = copyPools(call, stream);
    }
    if (error != cudaSuccess)
    {
        return error;
    }
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = launchConfig(decode, fill.empty() ? 0 : fillClusters(decode), attributes);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, decode);
}

} // namespace hip_trt
