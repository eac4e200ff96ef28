#include "emulation.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <set>
#include <ucontext.h>
#include <vector>

namespace emulation
{

Coordinates thread_index, block_index, block_size, grid_size;

namespace
{

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kMaxThreads = 2048; // of a cluster
constexpr size_t kMaxExchange = 32;

struct Copy
{
    void* to;
    const void* from;
    bool valid;
    size_t bytes;
};

struct Barrier
{
    unsigned expected;
    std::vector<unsigned> waiting;
};

struct Fiber
{
    jmp_buf context;
    std::unique_ptr<char[]> stack;
    bool started, finished;
    std::vector<std::vector<Copy>> groups; // committed
    std::vector<Copy> open;
    unsigned exchanges; // a lane can be one exchange ahead of others, so values alternate between two places
};

struct WarpValues
{
    alignas(16) char values[2][kWarpSize * kMaxExchange];
};

std::vector<Fiber> fibers(kMaxThreads);
std::vector<WarpValues> warp_values(kMaxThreads / kWarpSize);
std::vector<Barrier> warp_barriers(kMaxThreads / kWarpSize);
Barrier block_barriers[kMaxBlocks];
Barrier cluster_barrier;
// Threads that can run. Those of one thread block go first until none is left, so that variables declared __shared__ can
// be one for all: no thread block waits for another between its barriers.
std::deque<unsigned> ready[kMaxBlocks];
std::vector<unsigned> polling; // threads that wait for what another thread block sends
unsigned current;
jmp_buf scheduler;
ucontext_t scheduler_stack;
const std::function<void()>* thread_body;
alignas(1024) char shared_memory[kMaxBlocks][kSharedBytes];
Coordinates first_block; // of the cluster

void enter()
{
    (*thread_body)();
    fibers[current].finished = true;
    _longjmp(scheduler, 1);
}

void resume(unsigned thread)
{
    current = thread;
    thread_index = {thread % block_size.x, 0, 0};
    block_index = {first_block.x + thread / block_size.x, first_block.y, first_block.z};
    Fiber& fiber = fibers[thread];
    if (_setjmp(scheduler) != 0)
    {
        return;
    }
    if (fiber.started)
    {
        _longjmp(fiber.context, 1);
    }
    // The first switch to a fiber's stack; later ones need no system call.
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
    swapcontext(&scheduler_stack, &context);
}

void wait(Barrier& barrier)
{
    barrier.waiting.push_back(current);
    if (barrier.waiting.size() == barrier.expected)
    {
        for (const unsigned thread : barrier.waiting)
        {
            ready[thread / block_size.x].push_back(thread);
        }
        barrier.waiting.clear();
    }
    if (_setjmp(fibers[current].context) == 0)
    {
        _longjmp(scheduler, 1);
    }
}

void runCluster(unsigned block_threads, unsigned blocks, bool reversed)
{
    std::memset(shared_memory, 0xff, sizeof(shared_memory[0]) * blocks); // NaN in every type
    std::fill_n(block_barriers, blocks, Barrier{block_threads, {}});
    const unsigned threads = block_threads * blocks;
    cluster_barrier = {threads, {}};
    for (unsigned warp = 0; warp < threads / kWarpSize; ++warp)
    {
        warp_barriers[warp] = {kWarpSize, {}};
    }
    for (unsigned i = 0; i < threads; ++i)
    {
        const unsigned thread = reversed ? threads - 1 - i : i;
        Fiber& fiber = fibers[thread];
        if (fiber.stack == nullptr)
        {
            fiber.stack = std::make_unique<char[]>(kStackBytes);
        }
        fiber.started = fiber.finished = false;
        fiber.groups.clear();
        fiber.open.clear();
        fiber.exchanges = 0;
        ready[thread / block_threads].push_back(thread);
    }
    constexpr unsigned kMaxRounds = 1000000;
    unsigned rounds = 0;
    for (bool any = true; any;)
    {
        if (++rounds > kMaxRounds)
        {
            std::fprintf(stderr, "thread blocks wait for each other forever\n");
            std::abort();
        }
        any = false;
        for (unsigned block = 0; block < blocks; ++block)
        {
            while (!ready[block].empty())
            {
                const unsigned thread = ready[block].front();
                ready[block].pop_front();
                resume(thread);
                deliverStores(false);
                any = true;
            }
        }
        deliverStores(!any);
        for (const unsigned thread : polling)
        {
            ready[thread / block_threads].push_back(thread);
        }
        any = any || !polling.empty();
        polling.clear();
    }
    for (unsigned thread = 0; thread < threads; ++thread)
    {
        if (!fibers[thread].finished)
        {
            std::fprintf(stderr, "block (%u, %u, %u): thread %u waits at a barrier that others never reach\n",
                first_block.x + thread / block_threads, first_block.y, first_block.z, thread % block_threads);
            std::abort();
        }
    }
}

} // namespace

cudaError_t runGrid(
    dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& thread, unsigned cluster)
{
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffff
        || threads == 0 || threads > 1024 || threads % kWarpSize != 0 || shared_bytes > kSharedBytes || cluster == 0
        || cluster > kMaxBlocks || grid.x % cluster != 0 || threads * cluster > kMaxThreads)
    {
        return cudaErrorInvalidValue;
    }
    thread_body = &thread;
    grid_size = {grid.x, grid.y, grid.z};
    block_size = {threads, 1, 1};
    for (unsigned z = 0; z < grid.z; ++z)
    {
        for (unsigned y = 0; y < grid.y; ++y)
        {
            for (unsigned x = 0; x < grid.x; x += cluster)
            {
                first_block = {x, y, z};
                runCluster(threads, cluster, (x / cluster + y + z) % 2 == 1);
            }
        }
    }
    return cudaSuccess;
}

void waitForBlock()
{
    wait(block_barriers[rank()]);
}

void waitForWarp()
{
    wait(warp_barriers[current / kWarpSize]);
}

void waitForCluster()
{
    wait(cluster_barrier);
}

void letOthersRun()
{
    polling.push_back(current);
    if (_setjmp(fibers[current].context) == 0)
    {
        _longjmp(scheduler, 1);
    }
}

unsigned rank()
{
    return current / block_size.x;
}

char* sharedMemory(unsigned rank)
{
    return shared_memory[rank];
}

const void* exchange(const void* value, size_t bytes)
{
    char* const values = warp_values[current / kWarpSize].values[fibers[current].exchanges++ % 2];
    std::memcpy(values + current % kWarpSize * bytes, value, bytes);
    waitForWarp();
    return values;
}

void startCopy(void* to, const void* from, bool valid, size_t bytes)
{
    fibers[current].open.push_back({to, from, valid, bytes});
}

void commitCopies()
{
    Fiber& fiber = fibers[current];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}

void waitCopies(int pending)
{
    std::vector<std::vector<Copy>>& groups = fibers[current].groups;
    while (groups.size() > static_cast<size_t>(pending))
    {
        for (const Copy& copy : groups.front())
        {
            copy.valid ? std::memcpy(copy.to, copy.from, copy.bytes) : std::memset(copy.to, 0, copy.bytes);
        }
        groups.erase(groups.begin());
    }
}

} // namespace emulation

int __syncthreads_count(int predicate)
{
    static int counts[emulation::kMaxBlocks];
    int& count = counts[emulation::rank()];
    count += predicate != 0;
    emulation::waitForBlock();
    const int all = count;
    emulation::waitForBlock();
    count = 0;
    emulation::waitForBlock();
    return all;
}

int __syncthreads_and(int predicate)
{
    return __syncthreads_count(predicate) == static_cast<int>(emulation::block_size.x);
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t)
{
    std::memset(memory, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t)
{
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}

// Calls come in streams of the caller's, which run what they are given at once. One that is made here runs it as late as it
// may: when one of the former waits for it. So what is read or written too late shows; what overlaps does not.
struct CUstream_st
{
    std::vector<std::function<cudaError_t()>> waiting;
};

struct CUevent_st
{
    cudaStream_t stream = nullptr;
    size_t after = 0; // how much of it
};

namespace
{

std::set<cudaStream_t> streams; // that were made here

bool isLate(cudaStream_t stream)
{
    return streams.count(stream) != 0;
}

cudaError_t runWaiting(cudaStream_t stream, size_t count)
{
    cudaError_t error = cudaSuccess;
    for (size_t i = 0; i < count && error == cudaSuccess; ++i)
    {
        error = stream->waiting[i]();
    }
    stream->waiting.erase(stream->waiting.begin(), stream->waiting.begin() + count);
    return error;
}

} // namespace

// For tests, which wait for the device as a host would.
extern "C" void emulationSynchronize()
{
    for (const cudaStream_t stream : streams)
    {
        runWaiting(stream, stream->waiting.size());
    }
}

namespace emulation
{

cudaError_t enqueue(cudaStream_t stream, std::function<cudaError_t()> work)
{
    if (!isLate(stream))
    {
        return work();
    }
    stream->waiting.push_back(std::move(work));
    return cudaSuccess;
}

} // namespace emulation

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned)
{
    *stream = new CUstream_st;
    streams.insert(*stream);
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    return isLate(stream) ? runWaiting(stream, stream->waiting.size()) : cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    streams.erase(stream);
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*)
{
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*)
{
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned)
{
    return isLate(stream) ? cudaSuccess : cudaEventSynchronize(event);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned)
{
    *event = new CUevent_st;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    *event = isLate(stream) ? CUevent_st{stream, stream->waiting.size()} : CUevent_st{};
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    const size_t count = event->stream == nullptr ? 0 : std::min(event->after, event->stream->waiting.size());
    event->after = 0;
    return count == 0 ? cudaSuccess : runWaiting(event->stream, count);
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    delete event;
    return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t error)
{
    return error == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidValue";
}
