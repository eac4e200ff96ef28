#include "decode_cluster.cuh"

#include "kernels.cuh"
#include "paged_cache.cuh"

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
constexpr int kMaxTableBytes = 64 * 1024;

// From most to least thread blocks per sequence and mask head: the first one that the GPU can hold at once is taken.
constexpr DecodePlan kPlans[] = {
    {512, 4}, {256, 4}, {512, 3}, {256, 3}, {512, 2}, {256, 2}, {512, 1}, {256, 1}, {512, 0}, {256, 0}};

DecodeKernel findKernel(const Call& call, int threads)
{
    const int head_dim = call.shape.head_dim;
    return call.shape.type == HIP_TRT_FLOAT16 ? findDecodeKernel<__half>(head_dim, call.heads_per_mask, threads)
                                              : findDecodeKernel<__nv_bfloat16>(head_dim, call.heads_per_mask, threads);
}

int roundUp(int value, int multiple)
{
    return (value + multiple - 1) / multiple * multiple;
}

int log2Of(int value)
{
    int log2 = 0;
    while (1 << log2 < value)
    {
        ++log2;
    }
    return log2;
}

DecodeLayout layOut(const DecodeCall& decode, const DecodePlan& plan)
{
    const Call& call = decode.call;
    const int heads = call.heads_per_mask, dims = call.shape.head_dim, warps = plan.threads / kWarpSize;
    int end = 4 * sizeof(uint64_t); // three barriers
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
    layout.scratch = take(warps, decode.scratch_bytes);
    layout.states = take(warps * heads, sizeof(float2));
    layout.inbox = take(heads * dims, sizeof(float));
    layout.inbox_states = take(heads << plan.cluster_log2, sizeof(float2));
    layout.bytes = end;
    return layout;
}

DecodeCall describe(const Call& call, const DecodePlan& plan)
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
    decode.cluster_log2 = plan.cluster_log2;
    decode.stride_k_log2 = log2Of(config.stride_k);
    decode.scored_rows_log2 = call.block_k_log2 - decode.stride_k_log2;
    decode.capacity = roundUp(call.candidate_capacity, 32);
    decode.list_capacity = roundUp(call.kept_capacity, 4);
    const int64_t table_bytes = static_cast<int64_t>(call.shape.pages_per_sequence) * sizeof(int32_t);
    decode.table_entries = table_bytes <= kMaxTableBytes ? call.shape.pages_per_sequence : 0;
    decode.scale_log2e = config.scale * 1.4426950408889634f;
    const int staged_bytes = 16 * call.row_bytes;
    const int partial_bytes = call.heads_per_mask * (call.shape.head_dim + kPartialPadding) * static_cast<int>(sizeof(float));
    decode.scratch_bytes = std::max(staged_bytes, partial_bytes);
    decode.layout = layOut(decode, plan);
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

cudaLaunchConfig_t launchConfig(const DecodeCall& decode, const DecodePlan& plan, cudaLaunchAttribute (&attributes)[2])
{
    const Call& call = decode.call;
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {1u << plan.cluster_log2, 1, 1};
    // The kernel itself waits for the one before, where it first reads.
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1u << plan.cluster_log2, call.mask_heads, call.shape.batch);
    config.blockDim = dim3(plan.threads);
    config.dynamicSmemBytes = decode.layout.bytes;
    config.attrs = attributes;
    config.numAttrs = plan.overlapped ? 2 : 1;
    return config;
}

// How many clusters of a launch the device holds at once; also prepares the kernel for it.
cudaError_t clustersAtOnce(
    const Device& device, DecodeKernel kernel, const DecodeCall& decode, const DecodePlan& plan, int& clusters)
{
    static std::mutex mutex;
    static std::map<std::tuple<int, DecodeKernel, int, int>, int> known;
    constexpr int kStep = 8 * 1024; // of shared memory, so that few entries are kept
    const int shared_bytes = std::min(roundUp(decode.layout.bytes, kStep), device.max_shared_bytes);
    const std::lock_guard<std::mutex> lock(mutex);
    const auto key = std::make_tuple(device.index, kernel, plan.cluster_log2, shared_bytes);
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
    cudaLaunchConfig_t config = launchConfig(decode, plan, attributes);
    config.dynamicSmemBytes = shared_bytes;
    config.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&clusters, function, &config) != cudaSuccess)
    {
        cudaGetLastError(); // a cluster of this size fits nowhere
        clusters = 0;
    }
    known[key] = clusters;
    return cudaSuccess;
}

// The first plan whose clusters all run at once, or else the last one that runs at all.
cudaError_t choosePlan(const Device& device, const Call& call, DecodePlan& plan)
{
    const int64_t needed = static_cast<int64_t>(call.shape.batch) * call.mask_heads;
    plan = DecodePlan{0, 0};
    for (const DecodePlan& candidate : kPlans)
    {
        const DecodeKernel kernel = findKernel(call, candidate.threads);
        if (kernel == nullptr)
        {
            continue;
        }
        const DecodeCall decode = describe(call, candidate);
        if (decode.layout.bytes > device.max_shared_bytes)
        {
            continue;
        }
        int clusters = 0;
        const cudaError_t error = clustersAtOnce(device, kernel, decode, candidate, clusters);
        if (error != cudaSuccess)
        {
            return error;
        }
        if (clusters > 0)
        {
            plan = candidate;
        }
        if (clusters >= needed)
        {
            break;
        }
    }
    return plan.threads == 0 ? cudaErrorInvalidConfiguration : cudaSuccess;
}

} // namespace

bool decodeClusterSupports(const Call& call)
{
    const HipTrtShape& shape = call.shape;
    const int64_t rows = static_cast<int64_t>(shape.num_pages) * shape.num_kv_heads * call.config.page_size;
    Device device;
    if (shape.new_tokens != 1 || shape.type == HIP_TRT_FLOAT32 || (shape.head_dim != 64 && shape.head_dim != 128)
        || call.config.block_k / call.config.stride_k < 8 || call.heads_per_mask > kMaxHeads || call.candidate_capacity > kMaxCandidates
        || rows >= INT64_C(0xffffffff) || shape.batch > 65535 || currentDevice(device) != cudaSuccess || device.major < 9)
    {
        return false;
    }
    const DecodePlan smallest{256, 4};
    return describe(call, smallest).layout.bytes <= device.max_shared_bytes;
}

cudaError_t launchDecodeCluster(const Call& call, cudaStream_t stream, const DecodePlan* forced)
{
    Device device;
    cudaError_t error = currentDevice(device);
    DecodePlan plan{};
    if (error == cudaSuccess && forced == nullptr)
    {
        error = choosePlan(device, call, plan);
    }
    if (error != cudaSuccess)
    {
        return error;
    }
    if (forced != nullptr)
    {
        plan = *forced;
    }
    error = copyPools(call, stream);
    if (error != cudaSuccess)
    {
        return error;
    }
    const DecodeKernel kernel = findKernel(call, plan.threads);
    const DecodeCall decode = describe(call, plan);
    int clusters = 0;
    if (kernel == nullptr || (error = clustersAtOnce(device, kernel, decode, plan, clusters)) != cudaSuccess)
    {
        return kernel == nullptr ? cudaErrorInvalidValue : error;
    }
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = launchConfig(decode, plan, attributes);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, decode);
}

} // namespace hip_trt
