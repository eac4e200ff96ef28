// What the kernels of a decode call of version 2 accept, how a call is shared out over the GPU, and its workspace.
#pragma once

#include "decode_step.cuh"

namespace hip_trt::decode
{

constexpr int kMaxRows = 8;    // new rows of a sequence
constexpr int kMaxParts = 64;  // thread blocks that share the attention of a sequence and mask head
constexpr int kLargestHeadDim = 256;

// What the plan needs to know of a GPU.
struct Device
{
    int multiprocessors;
    int max_shared_bytes; // that a thread block can ask for
    bool overlaps;        // kernels may start before earlier ones have ended
};

// The current one.
cudaError_t findDevice(Device& device);

// With `complete`, shape fields that are 0 are refused; `rows`: as many new tokens are allowed.
HipTrtStatus validate(const HipTrtV2Config& config, const HipTrtShape& shape, bool complete, int rows, char* message,
    size_t message_size);

// Bytes of workspace for exactly this shape, on any GPU.
size_t workspaceSize(const HipTrtV2Config& config, const HipTrtShape& shape);

// The call with everything but the caller's parameters filled in.
Step makeStep(const HipTrtV2Params& params, const Device& device);

// The kernels of a type; each returns the error of its launches.
template <typename T>
cudaError_t runDecode(const Step& step, const Device& device, cudaStream_t stream);
template <typename T>
cudaError_t runAppend(const Step& step, cudaStream_t stream);

} // namespace hip_trt::decode
