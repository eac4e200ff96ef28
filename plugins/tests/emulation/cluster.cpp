#include "cluster.h"

#include "decode_cluster.cuh"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace emulation
{

namespace
{

// Eight bytes of shared memory. A phase ends once one arrival has been made and all expected bytes have come, which may
// be before they are expected.
struct Barrier
{
    int32_t bytes; // expected, less those that came
    int16_t arrivals;
    int16_t phase;

    void settle()
    {
        if (arrivals == 0 && bytes == 0)
        {
            arrivals = 1;
            ++phase;
        }
    }
};

struct Store
{
    uint32_t address;
    uint32_t barrier;
    std::vector<char> bytes;
};

std::vector<Store> stores;
std::mt19937 random_numbers;

char* sharedPointer(uint32_t address)
{
    return sharedMemory(address >> 24) + (address & 0xffffff);
}

} // namespace

void deliverStores(bool all)
{
    while (!stores.empty() && (all || random_numbers() % 4 == 0))
    {
        std::swap(stores[random_numbers() % stores.size()], stores.back());
        const Store& store = stores.back();
        std::memcpy(sharedPointer(store.address), store.bytes.data(), store.bytes.size());
        Barrier* const barrier = reinterpret_cast<Barrier*>(sharedPointer(store.barrier));
        barrier->bytes -= static_cast<int32_t>(store.bytes.size());
        barrier->settle();
        stores.pop_back();
    }
}

} // namespace emulation

namespace hip_trt
{

namespace
{

template <typename Value>
void store(uint32_t address, const Value& value, uint32_t barrier)
{
    if (address % sizeof(value) != 0)
    {
        std::fprintf(stderr, "a store to a peer is not aligned\n");
        std::abort();
    }
    const char* const bytes = reinterpret_cast<const char*>(&value);
    emulation::stores.push_back({address, barrier, {bytes, bytes + sizeof(value)}});
}

} // namespace

uint32_t sharedAddress(const void* pointer)
{
    const unsigned rank = emulation::rank();
    return rank << 24 | static_cast<uint32_t>(static_cast<const char*>(pointer) - emulation::sharedMemory(rank));
}

uint32_t peerAddress(uint32_t address, int rank)
{
    return (address & 0xffffff) | static_cast<uint32_t>(rank) << 24;
}

void initBarrier(uint64_t* barrier, int arrivals)
{
    if (arrivals != 1)
    {
        std::fprintf(stderr, "a barrier of %d arrivals is not emulated\n", arrivals);
        std::abort();
    }
    *reinterpret_cast<emulation::Barrier*>(barrier) = {0, 1, 0};
}

void arriveExpectBytes(uint64_t* barrier, uint32_t bytes)
{
    emulation::Barrier* const expecting = reinterpret_cast<emulation::Barrier*>(barrier);
    if (expecting->arrivals != 1)
    {
        std::fprintf(stderr, "a barrier's phase has a second arrival\n");
        std::abort();
    }
    expecting->bytes += static_cast<int32_t>(bytes);
    expecting->arrivals = 0;
    expecting->settle();
}

void waitBarrier(uint64_t* barrier, uint32_t parity)
{
    while ((reinterpret_cast<const emulation::Barrier*>(barrier)->phase & 1) == static_cast<int>(parity))
    {
        emulation::letOthersRun();
    }
}

void storeAsync(uint32_t peer_address, uint32_t value, uint32_t peer_barrier)
{
    store(peer_address, value, peer_barrier);
}

void storeAsync(uint32_t peer_address, float2 value, uint32_t peer_barrier)
{
    store(peer_address, value, peer_barrier);
}

void storeAsync(uint32_t peer_address, float4 value, uint32_t peer_barrier)
{
    store(peer_address, value, peer_barrier);
}

} // namespace hip_trt

// The part of the CUDA runtime that launches of clusters need.

cudaError_t cudaGetDevice(int* device)
{
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaGetLastError()
{
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int)
{
    constexpr int kMultiprocessors = 16; // few, so that calls are split in different ways
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9
        : attribute == cudaDevAttrMultiProcessorCount       ? kMultiprocessors
                                                            : static_cast<int>(emulation::kSharedBytes);
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int)
{
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config)
{
    const unsigned blocks = config->attrs[0].val.clusterDim.x;
    *clusters = blocks > 4 ? 0 : 4 / static_cast<int>(blocks);
    return cudaSuccess;
}
