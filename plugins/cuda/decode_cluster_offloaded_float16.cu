#include "decode_cluster_kernel.cuh"

template <>
hip_trt::DecodeKernel hip_trt::findOffloadedDecodeKernel<__half>(int head_dim, int heads_per_mask)
{
    return decodeKernelOn<__half, OffloadedPools>(head_dim, heads_per_mask);
}
