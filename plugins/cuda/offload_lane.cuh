// A stream beside that of the calls, for work that may wait.
#pragma once

#include "hip_offload.h"

#include <functional>
#include <mutex>

// Work is forked off a call's stream, runs in order beside it, and is joined by a later call. Both also happen in a capture,
// where they become edges of the graph.
struct HipTrtOffloadLane
{
public:
    static cudaError_t create(HipTrtOffloadLane*& lane);
    ~HipTrtOffloadLane();

    HipTrtOffloadLane(const HipTrtOffloadLane&) = delete;
    HipTrtOffloadLane& operator=(const HipTrtOffloadLane&) = delete;

    // Have `work` of a layer, which launches on the stream that it is given, begin once what is in `stream` now has run.
    cudaError_t fork(cudaStream_t stream, const std::function<cudaError_t(cudaStream_t)>& work);

    // What comes in `stream` from now on runs after all that was forked.
    cudaError_t join(cudaStream_t stream);

private:
    HipTrtOffloadLane() = default;

    cudaError_t enter(cudaStream_t stream);

    std::mutex mutex_;
    cudaStream_t stream_ = nullptr;
    cudaEvent_t forked_ = nullptr;
    cudaEvent_t done_ = nullptr;
    bool left_ = false;              // something was forked, and is not joined
    unsigned long long capture_ = 0; // in which that was; 0: in none
};
