#include "plugin_host_check.h"
#include "plugin_host_device.h"

#include <cstdlib>
#include <cstring>

namespace
{

int gStream; // any address but null: the kernels are to be given it, and run at once

} // namespace

bool device::available()
{
    return true;
}

void* device::allocate(size_t bytes)
{
    void* const memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    CHECK(memory != nullptr);
    return memory;
}

void device::release(void* memory)
{
    std::free(memory);
}

void device::copy(void* to, void const* from, size_t bytes)
{
    std::memcpy(to, from, bytes);
}

void device::fill(void* memory, int byte, size_t bytes)
{
    std::memset(memory, byte, bytes);
}

void device::run(std::function<void(cudaStream_t)> const& work)
{
    work(reinterpret_cast<cudaStream_t>(&gStream));
}

void device::replay(std::function<void(cudaStream_t)> const& work, std::function<void()> const& prepare, int times)
{
    for (int i = 0; i < times; ++i)
    {
        prepare();
        run(work);
    }
}
