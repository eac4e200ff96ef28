#include "mask_search.cuh"

template cudaError_t hip_trt::searchMasks<__half, hip_trt::kSmallHeadDim>(const Call&, cudaStream_t);
template cudaError_t hip_trt::searchMasks<__half, hip_trt::kLargeHeadDim>(const Call&, cudaStream_t);
