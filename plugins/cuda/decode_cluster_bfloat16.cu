#include "decode_cluster_kernel.cuh"

template hip_trt::DecodeKernel hip_trt::findDecodeKernel<__nv_bfloat16>(int, int);
