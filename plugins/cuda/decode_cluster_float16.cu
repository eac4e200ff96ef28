#include "decode_cluster_kernel.cuh"

template <>
hip_trt::DecodeKernel hip_trt::findDecodeKernel<__half>(int head_dim, int heads_per_mask)
{
    return decodeKernelOn<__half, ResidentPools>(head_dim, heads_per_mask);
}
