#include "tensor_map.h"

#include "kernels.cuh"
#include "prefill_sm90.cuh"

#include <cuda_runtime.h>

#include <algorithm>

namespace hip_trt
{

namespace
{

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
    const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
    CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, found at run time so that the library does not link the driver; nullptr if there is none.
EncodeTiled encodeTiled()
{
    static const EncodeTiled function = []
    {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result{};
        const cudaError_t error
            = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        const bool usable = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
        return usable ? reinterpret_cast<EncodeTiled>(found) : nullptr;
    }();
    return function;
}

} // namespace

bool makePoolMap(CUtensorMap* map, const Call& call, const void* pool)
{
    const HipTrtShape& shape = call.shape;
    const cuuint64_t rows = static_cast<cuuint64_t>(shape.num_pages) * shape.num_kv_heads * call.config.page_size;
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(shape.head_dim), rows};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(call.row_bytes)};
    const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(call.config.block_k)};
    const cuuint32_t steps[2] = {1, 1};
    return encodeTiled() != nullptr
        && encodeTiled()(map,
               shape.type == HIP_TRT_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
               const_cast<void*>(pool), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
        == CUDA_SUCCESS;
}

int sampledQueries(const Call& call)
{
    const int rows = std::min(call.config.block_q, call.shape.new_tokens);
    return call.heads_per_mask * ((rows + call.config.stride_q - 1) / call.config.stride_q);
}

namespace
{

bool suits(const Call& call)
{
    const HipTrtShape& shape = call.shape;
    int device = 0, major = 0;
    const bool hopper = cudaGetDevice(&device) == cudaSuccess
        && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
    return hopper && encodeTiled() != nullptr && shape.new_tokens > 1 && shape.type != HIP_TRT_FLOAT32
        && (shape.head_dim == kSmallHeadDim || shape.head_dim == kLargeHeadDim)
        // A key block is a whole number of swizzle groups, and of a tile.
        && call.config.block_k >= 8 && call.config.block_k <= 64
        // Rows of the pool are counted in 32 bits.
        && static_cast<int64_t>(shape.num_pages) * shape.num_kv_heads * call.config.page_size <= INT32_MAX;
}

} // namespace

bool searchesOnHopper(const Call& call)
{
    return suits(call) && call.config.stride_k == 1 && call.search_lists == nullptr && sampledQueries(call) <= 128;
}

bool attendsOnHopper(const Call& call)
{
    return suits(call);
}

} // namespace hip_trt
