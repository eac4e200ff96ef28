#include "prefill_attention_sm90.cuh"
#include "prefill_search_sm90.cuh"

template cudaError_t hip_trt::searchPrefillSm90<__nv_bfloat16, hip_trt::kSmallHeadDim>(const Call&, cudaStream_t);
template cudaError_t hip_trt::searchPrefillSm90<__nv_bfloat16, hip_trt::kLargeHeadDim>(const Call&, cudaStream_t);
template cudaError_t hip_trt::attendPrefillSm90<__nv_bfloat16, hip_trt::kSmallHeadDim>(const Call&, cudaStream_t);
template cudaError_t hip_trt::attendPrefillSm90<__nv_bfloat16, hip_trt::kLargeHeadDim>(const Call&, cudaStream_t);
