#include "offload_lane.cuh"

#include <memory>

namespace
{

cudaError_t captureOf(cudaStream_t stream, unsigned long long& capture)
{
    cudaStreamCaptureStatus status;
    unsigned long long id = 0;
    const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &id);
    capture = status == cudaStreamCaptureStatusActive ? id : 0;
    return error;
}

// Waits on the host, also while a stream of this thread is captured: for work that the capture is no part of.
cudaError_t waitOnHost(cudaEvent_t event)
{
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
    if (error == cudaSuccess)
    {
        error = cudaEventSynchronize(event);
        cudaThreadExchangeStreamCaptureMode(&mode);
    }
    return error;
}

} // namespace

cudaError_t HipTrtOffloadLane::create(HipTrtOffloadLane*& lane)
{
    std::unique_ptr<HipTrtOffloadLane> made(new HipTrtOffloadLane);
    cudaError_t error = cudaStreamCreateWithFlags(&made->stream_, cudaStreamNonBlocking);
    for (cudaEvent_t* const event : {&made->forked_, &made->done_})
    {
        if (error == cudaSuccess)
        {
            error = cudaEventCreateWithFlags(event, cudaEventDisableTiming);
        }
    }
    lane = error == cudaSuccess ? made.release() : nullptr;
    return error;
}

HipTrtOffloadLane::~HipTrtOffloadLane()
{
    if (stream_ != nullptr)
    {
        cudaStreamSynchronize(stream_);
        cudaStreamDestroy(stream_);
    }
    for (const cudaEvent_t event : {forked_, done_})
    {
        if (event != nullptr)
        {
            cudaEventDestroy(event);
        }
    }
}

// What was left by another capture, or outside of this one, cannot be joined in it.
cudaError_t HipTrtOffloadLane::enter(cudaStream_t stream)
{
    unsigned long long capture = 0;
    cudaError_t error = captureOf(stream, capture);
    if (error != cudaSuccess || capture == capture_)
    {
        return error;
    }
    if (left_ && capture_ == 0)
    {
        error = waitOnHost(done_);
    } // else the capture has ended, and its graph has this work
    left_ = false;
    capture_ = capture;
    return error;
}

cudaError_t HipTrtOffloadLane::fork(cudaStream_t stream, const std::function<cudaError_t(cudaStream_t)>& work)
{
    const std::lock_guard<std::mutex> lock(mutex_);
    cudaError_t error = enter(stream);
    if (error == cudaSuccess)
    {
        error = cudaEventRecord(forked_, stream);
    }
    if (error == cudaSuccess)
    {
        error = cudaStreamWaitEvent(stream_, forked_, 0);
    }
    if (error != cudaSuccess)
    {
        return error;
    }
    left_ = true;
    error = work(stream_);
    const cudaError_t recorded = cudaEventRecord(done_, stream_);
    return error == cudaSuccess ? recorded : error;
}

cudaError_t HipTrtOffloadLane::join(cudaStream_t stream)
{
    const std::lock_guard<std::mutex> lock(mutex_);
    cudaError_t error = enter(stream);
    if (error == cudaSuccess && left_)
    {
        error = cudaStreamWaitEvent(stream, done_, 0);
        left_ = false;
    }
    return error;
}

HipTrtStatus hipTrtOffloadLaneCreate(HipTrtOffloadLane** lane)
{
    if (lane == nullptr)
    {
        return HIP_TRT_INVALID_ARGUMENT;
    }
    return HipTrtOffloadLane::create(*lane) == cudaSuccess ? HIP_TRT_SUCCESS : HIP_TRT_CUDA_ERROR;
}

HipTrtStatus hipTrtOffloadLaneDestroy(HipTrtOffloadLane* lane)
{
    delete lane;
    return HIP_TRT_SUCCESS;
}
