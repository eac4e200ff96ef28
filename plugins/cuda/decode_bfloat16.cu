#include "decode_kernels.cuh"

template cudaError_t hip_trt::decode::runAppend<__nv_bfloat16>(const Step&, cudaStream_t);
template cudaError_t hip_trt::decode::runDecode<__nv_bfloat16>(const Step&, const Device&, cudaStream_t);
