#include "decode_cluster_kernel.cuh"

template <>
hip_trt::DecodeKernel hip_trt::findDecodeKernel<__nv_bfloat16>(int head_dim, int heads_per_mask)
{
    return decodeKernelOn<__nv_bfloat16, ResidentPools>(head_dim, heads_per_mask);
}
