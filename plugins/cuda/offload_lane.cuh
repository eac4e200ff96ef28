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

    // Have `work`, which launches on the stream that it is given, begin once what is in `stream` now has run. `layer` tells
    // whose it is.
    cudaError_t fork(cudaStream_t stream, const void* layer, const std::function<cudaError_t(cudaStream_t)>& work);

    // What comes in `stream` from now on runs after all forked work. With `layer`, only if that was the first to fork: it
    // begins a new round, and the last one has not been joined as it should have been.
    cudaError_t join(cudaStream_t stream, const void* layer = nullptr);

private:
    HipTrtOffloadLane() = default;

    std::mutex mutex_;
    cudaStream_t stream_ = nullptr;
    cudaEvent_t forked_ = nullptr;
    cudaEvent_t done_ = nullptr;
    bool pending_ = false;
    const void* first_ = nullptr;    // layer that forked since the last join
    unsigned long long capture_ = 0; // in which the pending work was forked; 0: in none
};
