#include "plugin_host_check.h"
#include "plugin_host_device.h"

#define CHECK_CUDA(call) CHECK_EQUAL(std::string{cudaGetErrorString(call)}, "no error")

namespace
{

class Stream
{
public:
    Stream()
    {
        // Does not wait for the default stream, so a kernel that was launched there instead would be seen.
        CHECK_CUDA(cudaStreamCreateWithFlags(&mStream, cudaStreamNonBlocking));
    }

    Stream(Stream const&) = delete;
    Stream& operator=(Stream const&) = delete;

    ~Stream()
    {
        CHECK_CUDA(cudaStreamDestroy(mStream));
    }

    cudaStream_t get() const
    {
        return mStream;
    }

    void wait() const
    {
        CHECK_CUDA(cudaStreamSynchronize(mStream));
    }

private:
    cudaStream_t mStream{};
};

} // namespace

bool device::available()
{
    int count = 0;
    return CHECK_CUDA(cudaGetDeviceCount(&count)) && CHECK(count > 0);
}

void* device::allocate(size_t bytes)
{
    void* memory = nullptr;
    CHECK_CUDA(cudaMalloc(&memory, bytes));
    return memory;
}

void device::release(void* memory)
{
    CHECK_CUDA(cudaFree(memory));
}

void device::copy(void* to, void const* from, size_t bytes)
{
    CHECK_CUDA(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
    CHECK_CUDA(cudaDeviceSynchronize());
}

void device::fill(void* memory, int byte, size_t bytes)
{
    CHECK_CUDA(cudaMemset(memory, byte, bytes));
    CHECK_CUDA(cudaDeviceSynchronize());
}

void device::run(std::function<void(cudaStream_t)> const& work)
{
    Stream const stream;
    work(stream.get());
    stream.wait();
}

void device::replay(std::function<void(cudaStream_t)> const& work, std::function<void()> const& prepare, int times)
{
    Stream const stream;
    cudaGraph_t graph{};
    cudaGraphExec_t executable{};
    CHECK_CUDA(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal));
    work(stream.get());
    if (!CHECK_CUDA(cudaStreamEndCapture(stream.get(), &graph))
        || !CHECK_CUDA(cudaGraphInstantiate(&executable, graph, 0)))
    {
        return;
    }
    for (int i = 0; i < times; ++i)
    {
        prepare();
        CHECK_CUDA(cudaGraphLaunch(executable, stream.get()));
        stream.wait();
    }
    CHECK_CUDA(cudaGraphExecDestroy(executable));
    CHECK_CUDA(cudaGraphDestroy(graph));
}
