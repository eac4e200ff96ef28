#include "mask_search.cuh"

template cudaError_t hip_trt::searchMasks<__nv_bfloat16, hip_trt::kSmallHeadDim>(const Call&, cudaStream_t);
template cudaError_t hip_trt::searchMasks<__nv_bfloat16, hip_trt::kLargeHeadDim>(const Call&, cudaStream_t);
