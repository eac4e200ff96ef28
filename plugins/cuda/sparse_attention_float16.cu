#include "sparse_attention.cuh"

template cudaError_t hip_trt::attend<__half, hip_trt::kSmallHeadDim>(const Call&, cudaStream_t);
template cudaError_t hip_trt::attend<__half, hip_trt::kLargeHeadDim>(const Call&, cudaStream_t);
