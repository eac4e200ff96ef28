#include "decode_kernels.cuh"

template cudaError_t hip_trt::decode::runAppend<__half>(const Step&, cudaStream_t);
template cudaError_t hip_trt::decode::runDecode<__half>(const Step&, const Device&, cudaStream_t);
