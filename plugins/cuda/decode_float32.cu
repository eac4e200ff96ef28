#include "decode_kernels.cuh"

template cudaError_t hip_trt::decode::runAppend<float>(const Step&, cudaStream_t);
template cudaError_t hip_trt::decode::runDecode<float>(const Step&, const Device&, cudaStream_t);
