#include "offload.cuh"

#include "block_cache.cuh"
#include "launch.cuh"
#include "offload_fill.cuh"
#include "offload_lane.cuh"

#include <algorithm>
#include <initializer_list>
#include <map>
#include <mutex>

namespace hip_trt
{

namespace
{

constexpr int kThreads = 256;

struct Attached
{
    HipTrtOffload offload;
    bool unfilled = false; // a decode step may have missed blocks, and nothing that was called since has placed them
};

// By key pool.
std::mutex attached_mutex;
std::map<const void*, Attached> all_attached;

// What is attached to a key pool, or nullptr. The caller holds the mutex.
Attached* findAttached(const void* key_pool)
{
    const auto found = all_attached.find(key_pool);
    return found == all_attached.end() ? nullptr : &found->second;
}

bool aligned(std::initializer_list<const void*> pointers)
{
    return std::all_of(pointers.begin(), pointers.end(),
        [](const void* pointer) { return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % 16 == 0; });
}

bool validCache(const HipTrtBlockCache& cache)
{
    constexpr int kMostBlocks = (INT32_MAX - HIP_TRT_CACHE_MISSED_HEADER) / 2;
    return cache.blocks == 0
        || (cache.blocks > 0 && cache.blocks <= kMostBlocks && cache.blocks % HIP_TRT_CACHE_WAYS == 0
            && cache.pool_blocks > 0 && aligned({cache.rows, cache.owners, cache.slots, cache.missed}));
}

bool validLanding(const HipTrtLanding& landing)
{
    return landing.blocks == 0
        || (landing.blocks > 0 && (landing.blocks & (landing.blocks - 1)) == 0
            && aligned({landing.rows, landing.tickets}));
}

bool validStaging(const HipTrtOffload& offload)
{
    return offload.staging_pages == 0
        || (offload.staging_pages > 0
            && aligned({offload.staging_keys, offload.staging_values, offload.staging_table}));
}

cudaError_t clearCache(const HipTrtBlockCache& cache, cudaStream_t stream)
{
    if (cache.blocks == 0)
    {
        return cudaSuccess;
    }
    const cudaError_t error = cudaMemsetAsync(cache.owners, 0, cache.blocks * sizeof(uint64_t), stream);
    return error == cudaSuccess ? cudaMemsetAsync(cache.slots, 0, cache.pool_blocks * sizeof(int32_t), stream) : error;
}

// Drop the copy of a block.
__device__ void forget(const HipTrtBlockCache& cache, uint32_t block)
{
    if (cache.blocks != 0 && cache.slots[block] != 0)
    {
        cache.owners[cache.slots[block] - 1] = 0;
        cache.slots[block] = 0;
    }
}

// What a step that went before has missed is placed no more: for one thread.
__device__ void dropAllMissed(const HipTrtOffload& offload)
{
    dropMissed(offload.keys, offload.landing);
    dropMissed(offload.values, offload.landing);
}

__global__ void dropMissedKernel(const __grid_constant__ HipTrtOffload offload)
{
    if (threadIdx.x == 0)
    {
        dropAllMissed(offload);
    }
}

// A thread per block of new rows and key/value head.
__global__ void __launch_bounds__(kThreads)
    forgetKernel(const __grid_constant__ Call call, const __grid_constant__ HipTrtOffload offload)
{
    const int b = blockIdx.y, block_k = call.config.block_k;
    const int past = call.past_lengths[b], count = call.query_lengths[b];
    const int item = blockIdx.x * kThreads + threadIdx.x;
    if (item == 0 && b == 0)
    {
        dropAllMissed(offload); // what has landed may be written anew
    }
    const int head = item % call.shape.num_kv_heads;
    const int block = (past >> call.block_k_log2) + item / call.shape.num_kv_heads;
    if (count <= 0 || block * block_k >= past + count)
    {
        return;
    }
    const uint32_t in_pool
        = static_cast<uint32_t>(PagedRows(call, b, head).row(block * block_k) >> call.block_k_log2);
    forget(offload.keys, in_pool);
    forget(offload.values, in_pool);
}

// A thread block per sequence.
__global__ void __launch_bounds__(kThreads) updateCopiesKernel(const __grid_constant__ Call call)
{
    const int b = blockIdx.x, chunks = call.row_bytes / static_cast<int>(sizeof(uint4));
    if (call.query_lengths[b] <= 0)
    {
        return;
    }
    for (int i = threadIdx.x; i < call.shape.num_kv_heads * chunks; i += kThreads)
    {
        const PagedRows rows_of_head(call, b, i / chunks);
        if (!rows_of_head.holds(call.past_lengths[b]))
        {
            continue;
        }
        const uint32_t row = static_cast<uint32_t>(rows_of_head.row(call.past_lengths[b]));
        for (const bool is_key : {true, false})
        {
            const CacheView cache(call.caches, is_key);
            const int slot = cache.slotOf(row >> call.block_k_log2, true);
            if (slot >= 0)
            {
                const uint4* const rows = static_cast<const uint4*>(is_key ? call.key : call.value);
                reinterpret_cast<uint4*>(cache.inCopy(slot, row))[i % chunks]
                    = rows[static_cast<int64_t>(b) * call.shape.num_kv_heads * chunks + i];
            }
        }
    }
}

// What the staging area keeps of a call: where its pages are, [B, M] each, and its lengths, [B]. There are no more sequences
// than slots.
struct StagingTables
{
    int32_t* staged;
    int32_t* in_pool;
    int32_t* past_lengths;
    int32_t* query_lengths;

    __host__ __device__ explicit StagingTables(const HipTrtOffload& offload)
        : staged(offload.staging_table)
        , in_pool(staged + offload.staging_pages)
        , past_lengths(in_pool + offload.staging_pages)
        , query_lengths(past_lengths + offload.staging_pages)
    {
    }
};

// Copy a call's new rows from the staging area, where `staged` has them, to its pools. A thread block per token.
__global__ void __launch_bounds__(kThreads)
    writeOutKernel(const __grid_constant__ Call call, const __grid_constant__ Call staged)
{
    const int b = blockIdx.y, chunks = call.row_bytes / static_cast<int>(sizeof(uint4));
    if (static_cast<int>(blockIdx.x) >= call.query_lengths[b])
    {
        return;
    }
    const int token = call.past_lengths[b] + blockIdx.x;
    if (!PagedRows(call, b, 0).holds(token))
    {
        return;
    }
    for (int i = threadIdx.x; i < call.shape.num_kv_heads * chunks; i += kThreads)
    {
        const int head = i / chunks;
        const int64_t from = PagedRows(staged, b, head).row(token) * chunks + i % chunks;
        const int64_t to = PagedRows(call, b, head).row(token) * chunks + i % chunks;
        static_cast<uint4*>(call.present_key)[to] = static_cast<const uint4*>(staged.present_key)[from];
        static_cast<uint4*>(call.present_value)[to] = static_cast<const uint4*>(staged.present_value)[from];
    }
}

// A thread block per page slot and sequence.
__global__ void __launch_bounds__(kThreads)
    stageKernel(const __grid_constant__ Call call, const __grid_constant__ HipTrtOffload offload)
{
    const int slot = blockIdx.x, b = blockIdx.y;
    const int64_t index = static_cast<int64_t>(b) * call.shape.pages_per_sequence + slot;
    const int entry = call.page_table[index];
    const int page = static_cast<uint32_t>(entry) < static_cast<uint32_t>(call.shape.num_pages) ? entry : -1;
    if (threadIdx.x == 0)
    {
        const StagingTables tables(offload);
        tables.staged[index] = page < 0 ? -1 : static_cast<int>(index);
        tables.in_pool[index] = page;
        if (slot == 0)
        {
            tables.past_lengths[b] = call.past_lengths[b];
            tables.query_lengths[b] = call.query_lengths[b];
        }
    }
    const int64_t first = static_cast<int64_t>(slot) * call.config.page_size;
    if (page < 0 || first >= call.past_lengths[b] || call.query_lengths[b] <= 0)
    {
        return;
    }
    const int64_t chunks
        = static_cast<int64_t>(call.shape.num_kv_heads) * call.config.page_size * call.row_bytes / sizeof(uint4);
    for (int64_t i = threadIdx.x; i < chunks; i += kThreads)
    {
        static_cast<uint4*>(offload.staging_keys)[index * chunks + i]
            = static_cast<const uint4*>(call.present_key)[page * chunks + i];
        static_cast<uint4*>(offload.staging_values)[index * chunks + i]
            = static_cast<const uint4*>(call.present_value)[page * chunks + i];
    }
}

// Launch on the layer's lane, if work may be left there.
template <typename Launch>
cudaError_t beside(const HipTrtOffload& offload, cudaStream_t stream, Launch work)
{
    return offload.lane == nullptr || offload.last_layer ? work(stream)
                                                         : offload.lane->fork(stream, work);
}

} // namespace

bool findOffload(const Call& call, HipTrtOffload& offload)
{
    const std::lock_guard<std::mutex> lock(attached_mutex);
    const Attached* const found = findAttached(call.present_key);
    if (found == nullptr || found->offload.value_pool != call.present_value)
    {
        return false;
    }
    offload = found->offload;
    return true;
}

bool cachesCover(const Call& call, const HipTrtOffload& offload)
{
    const int64_t blocks = static_cast<int64_t>(call.shape.num_pages) * call.shape.num_kv_heads
        * (call.config.page_size / call.config.block_k);
    const auto covers = [blocks](const HipTrtBlockCache& cache) { return cache.blocks == 0 || cache.pool_blocks >= blocks; };
    return covers(offload.keys) && covers(offload.values);
}

cudaError_t settle(const HipTrtOffload& offload, cudaStream_t stream)
{
    return offload.lane == nullptr ? cudaSuccess : offload.lane->join(stream);
}

LayerCaches cachesOf(const Call& call, const HipTrtOffload& offload)
{
    return {offload.keys, offload.values, offload.landing, offload.key_pool, offload.value_pool, offload.counters,
        call.block_k_log2, call.row_bytes};
}

LayerCaches fillBeside(const Call& call, const HipTrtOffload& offload)
{
    const std::lock_guard<std::mutex> lock(attached_mutex);
    Attached* const before = findAttached(offload.fills);
    return before == nullptr ? LayerCaches{} : cachesOf(call, before->offload);
}

cudaError_t updateCopies(const Call& call, cudaStream_t stream)
{
    return call.caches.empty() ? cudaSuccess
                               : launch(updateCopiesKernel, dim3(call.shape.batch), kThreads, 0, stream, call);
}

cudaError_t beginDecode(const HipTrtOffload& offload, cudaStream_t stream)
{
    const cudaError_t error = settle(offload, stream);
    bool unfilled;
    {
        const std::lock_guard<std::mutex> lock(attached_mutex);
        const Attached* const own = findAttached(offload.key_pool);
        unfilled = own != nullptr && own->unfilled;
    }
    // A round of layers was broken off. The step that comes may write what has landed: it is placed no more.
    return error == cudaSuccess && unfilled ? launch(dropMissedKernel, dim3(1), kWarpSize, 0, stream, offload) : error;
}

cudaError_t endDecode(const Call& call, const HipTrtOffload& offload, cudaStream_t stream)
{
    {
        const std::lock_guard<std::mutex> lock(attached_mutex);
        if (Attached* const own = findAttached(offload.key_pool))
        {
            own->unfilled = offload.filled_later != 0;
        }
        if (Attached* const before = findAttached(offload.fills))
        {
            before->unfilled = false;
        }
    }
    return offload.filled_later != 0 ? cudaSuccess : launchFill(cachesOf(call, offload), stream);
}

cudaError_t forgetWritten(const Call& call, const HipTrtOffload& offload, cudaStream_t stream)
{
    // New rows touch one block more than they fill, if they begin inside one.
    const int blocks = (call.shape.new_tokens + call.config.block_k - 1) / call.config.block_k + 1;
    const unsigned grid = (static_cast<unsigned>(blocks) * call.shape.num_kv_heads + kThreads - 1) / kThreads;
    return launch(forgetKernel, dim3(grid, call.shape.batch), kThreads, 0, stream, call, offload);
}

cudaError_t writeOut(const Call& call, const Call& staged, const HipTrtOffload& offload, cudaStream_t stream)
{
    // In the stream of the calls, the caller may reuse its tensors before this has run beside it.
    const StagingTables tables(offload);
    Call kept = call;
    kept.page_table = tables.in_pool;
    kept.past_lengths = tables.past_lengths;
    kept.query_lengths = tables.query_lengths;
    return beside(offload, stream, [&](cudaStream_t on) {
        return launch(writeOutKernel, dim3(call.shape.new_tokens, call.shape.batch), kThreads, 0, on, kept, staged);
    });
}

bool canStage(const Call& call, const HipTrtOffload& offload)
{
    return static_cast<int64_t>(call.shape.batch) * call.shape.pages_per_sequence <= offload.staging_pages;
}

cudaError_t stagePages(const Call& call, const HipTrtOffload& offload, Call& staged, cudaStream_t stream)
{
    staged = call;
    staged.past_key = staged.present_key = offload.staging_keys;
    staged.past_value = staged.present_value = offload.staging_values;
    staged.page_table = StagingTables(offload).staged;
    staged.shape.num_pages = offload.staging_pages;
    return launch(stageKernel, dim3(call.shape.pages_per_sequence, call.shape.batch), kThreads, 0, stream, call, offload);
}

} // namespace hip_trt

HipTrtStatus hipTrtOffloadAttach(const HipTrtOffload* offload)
{
    using namespace hip_trt;
    if (offload == nullptr || !aligned({offload->key_pool, offload->value_pool, offload->counters}) || !validCache(offload->keys)
        || !validCache(offload->values) || !validLanding(offload->landing) || !validStaging(*offload))
    {
        return HIP_TRT_INVALID_ARGUMENT;
    }
    const std::lock_guard<std::mutex> lock(attached_mutex);
    all_attached[offload->key_pool].offload = *offload;
    return HIP_TRT_SUCCESS;
}

HipTrtStatus hipTrtOffloadDetach(const void* key_pool)
{
    const std::lock_guard<std::mutex> lock(hip_trt::attached_mutex);
    hip_trt::all_attached.erase(key_pool);
    return HIP_TRT_SUCCESS;
}

HipTrtStatus hipTrtOffloadForget(const void* key_pool, cudaStream_t stream)
{
    using namespace hip_trt;
    HipTrtOffload offload;
    {
        const std::lock_guard<std::mutex> lock(attached_mutex);
        const Attached* const found = findAttached(key_pool);
        if (found == nullptr)
        {
            return HIP_TRT_SUCCESS;
        }
        offload = found->offload;
    }
    cudaError_t error = settle(offload, stream);
    if (error == cudaSuccess)
    {
        error = clearCache(offload.keys, stream);
    }
    if (error == cudaSuccess)
    {
        error = clearCache(offload.values, stream);
    }
    if (error == cudaSuccess)
    {
        error = launch(dropMissedKernel, dim3(1), kWarpSize, 0, stream, offload);
    }
    return error == cudaSuccess ? HIP_TRT_SUCCESS : HIP_TRT_CUDA_ERROR;
}
