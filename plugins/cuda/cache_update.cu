// Cache update: mirrors append in hip_trt/reference/cache.py.
#include "kernels.cuh"
#include "launch.cuh"
#include "paged_cache.cuh"

namespace hip_trt
{

namespace
{

constexpr int kThreads = 128;

// One thread block per new token: write its key and value rows to the present pools, or, for padding, clear its output.
__global__ void __launch_bounds__(kThreads) appendKernel(const __grid_constant__ Call call)
{
    const int token = blockIdx.x;
    const int b = blockIdx.y;
    const HipTrtShape& shape = call.shape;
    const int chunks = call.row_bytes / 16;
    // Row of a head of this token in a tensor [B, heads, S, D].
    auto row = [&](int head, int heads)
    { return (static_cast<int64_t>(b) * heads + head) * shape.new_tokens + token; };

    if (token >= call.query_lengths[b])
    {
        uint4* const output = static_cast<uint4*>(call.output);
        for (int i = threadIdx.x; i < shape.num_query_heads * chunks; i += kThreads)
        {
            output[row(i / chunks, shape.num_query_heads) * chunks + i % chunks] = make_uint4(0, 0, 0, 0);
        }
        return;
    }
    const int position = call.past_lengths[b] + token;
    if (!PagedRows(call, b, 0).holds(position))
    {
        return;
    }
    for (int i = threadIdx.x; i < shape.num_kv_heads * chunks; i += kThreads)
    {
        const int head = i / chunks;
        const int64_t from = row(head, shape.num_kv_heads) * chunks + i % chunks;
        const int64_t to = PagedRows(call, b, head).row(position) * chunks + i % chunks;
        static_cast<uint4*>(call.present_key)[to] = static_cast<const uint4*>(call.key)[from];
        static_cast<uint4*>(call.present_value)[to] = static_cast<const uint4*>(call.value)[from];
    }
}

// The past rows of a pool that does not share its buffer.
cudaError_t copyPool(const Call& call, void* present, const void* past, cudaStream_t stream)
{
    if (present == past)
    {
        return cudaSuccess;
    }
    const size_t rows
        = static_cast<size_t>(call.shape.num_pages) * call.shape.num_kv_heads * call.config.page_size;
    return cudaMemcpyAsync(present, past, rows * call.row_bytes, cudaMemcpyDefault, stream);
}

} // namespace

cudaError_t copyPools(const Call& call, cudaStream_t stream)
{
    const cudaError_t error = copyPool(call, call.present_key, call.past_key, stream);
    return error == cudaSuccess ? copyPool(call, call.present_value, call.past_value, stream) : error;
}

cudaError_t updateCache(const Call& call, cudaStream_t stream)
{
    cudaError_t error = copyPools(call, stream);
    if (error == cudaSuccess)
    {
        error = launch(appendKernel, dim3(call.shape.new_tokens, call.shape.batch), kThreads, 0, stream, call);
    }
    return error;
}

} // namespace hip_trt
