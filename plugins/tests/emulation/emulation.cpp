#include "emulation.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <ucontext.h>
#include <vector>

namespace emulation
{

Coordinates thread_index, block_index, block_size, grid_size;

namespace
{

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxExchange = 32;

struct Copy
{
    void* to;
    const void* from;
    bool valid;
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
Barrier block_barrier;
std::deque<unsigned> ready;
unsigned current;
jmp_buf scheduler;
ucontext_t scheduler_stack;
const std::function<void()>* thread_body;
alignas(1024) char shared_memory[kSharedBytes];

void enter()
{
    (*thread_body)();
    fibers[current].finished = true;
    _longjmp(scheduler, 1);
}

void resume(unsigned thread)
{
    current = thread;
    thread_index = {thread, 0, 0};
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
        ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
        barrier.waiting.clear();
    }
    if (_setjmp(fibers[current].context) == 0)
    {
        _longjmp(scheduler, 1);
    }
}

void runBlock(unsigned threads, bool reversed)
{
    std::fill(std::begin(shared_memory), std::end(shared_memory), '\xff'); // NaN in every type
    block_barrier = {threads, {}};
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
        ready.push_back(thread);
    }
    while (!ready.empty())
    {
        const unsigned thread = ready.front();
        ready.pop_front();
        resume(thread);
    }
    for (unsigned thread = 0; thread < threads; ++thread)
    {
        if (!fibers[thread].finished)
        {
            std::fprintf(stderr, "block (%u, %u, %u): thread %u waits at a barrier that others never reach\n",
                block_index.x, block_index.y, block_index.z, thread);
            std::abort();
        }
    }
}

} // namespace

cudaError_t runGrid(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& thread)
{
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffff
        || threads == 0 || threads > kMaxThreads || threads % kWarpSize != 0 || shared_bytes > kSharedBytes)
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
            for (unsigned x = 0; x < grid.x; ++x)
            {
                block_index = {x, y, z};
                runBlock(threads, (x + y + z) % 2 == 1);
            }
        }
    }
    return cudaSuccess;
}

void waitForBlock()
{
    wait(block_barrier);
}

void waitForWarp()
{
    wait(warp_barriers[current / kWarpSize]);
}

char* sharedMemory()
{
    return shared_memory;
}

const void* exchange(const void* value, size_t bytes)
{
    char* const values = warp_values[current / kWarpSize].values[fibers[current].exchanges++ % 2];
    std::memcpy(values + current % kWarpSize * bytes, value, bytes);
    waitForWarp();
    return values;
}

void startCopy(void* to, const void* from, bool valid)
{
    fibers[current].open.push_back({to, from, valid});
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
            copy.valid ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
        }
        groups.erase(groups.begin());
    }
}

} // namespace emulation

int __syncthreads_and(int predicate)
{
    static int refused[2];
    static unsigned round; // of the whole block: two of them never overlap, thanks to the second barrier
    refused[round % 2] |= predicate == 0;
    emulation::waitForBlock();
    const int all = refused[round % 2] == 0;
    emulation::waitForBlock();
    if (emulation::thread_index.x == 0)
    {
        refused[round++ % 2] = 0;
    }
    emulation::waitForBlock();
    return all;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t)
{
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t error)
{
    return error == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidValue";
}
