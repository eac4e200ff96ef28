#include "sparse_attention.cuh"

template cudaError_t hip_trt::attend<float, hip_trt::kSmallHeadDim>(const Call&, cudaStream_t);
template cudaError_t hip_trt::attend<float, hip_trt::kLargeHeadDim>(const Call&, cudaStream_t);
