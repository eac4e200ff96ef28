// Maps of the page pools for Hopper's bulk tensor copy engine, and which calls can use it.
#pragma once

#include "call.cuh"

#include <cuda.h>

namespace hip_trt
{

// A map of a pool [P, Hkv, page_size, D] as rows of D elements, copied in boxes of one key block by 64 columns, swizzled
// as wgmma.cuh expects. False if the driver cannot make it.
bool makePoolMap(CUtensorMap* map, const Call& call, const void* pool);

// Largest number of sampled queries that a mask head's query block has.
int sampledQueries(const Call& call);

} // namespace hip_trt
