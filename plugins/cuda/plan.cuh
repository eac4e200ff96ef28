// Sizes that follow from configuration and shape alone, on the host: launch geometry and workspace.
#pragma once

#include "call.cuh"

namespace hip_trt
{

constexpr size_t kMaxSharedBytes = 99 * 1024; // of a thread block, on every supported GPU
constexpr int kSearchQueries = 64; // sampled queries that are scored at once
constexpr int kPrefillSearchThreads = 128;
constexpr int kDecodeSearchThreads = 256;

// Rows of one query head in a query block, and their samples, rounded up to what a warp loads at once.
inline __host__ __device__ int searchQueryRows(const HipTrtConfig& config, const HipTrtShape& shape)
{
    const int heads = config.mask_per_query_head ? 1 : shape.num_query_heads / shape.num_kv_heads;
    const int rows = config.block_q < shape.new_tokens ? config.block_q : shape.new_tokens;
    const int queries = heads * ((rows + config.stride_q - 1) / config.stride_q);
    return queries < kSearchQueries ? (queries + 15) / 16 * 16 : kSearchQueries;
}

// Scores of the candidates, and two lists of nodes.
inline __host__ __device__ size_t searchListBytes(int candidate_capacity, int kept_capacity)
{
    return sizeof(uint32_t) * candidate_capacity + 2 * sizeof(int) * kept_capacity;
}

// Largest number of nodes that a level of a search holds, with the nodes that decode steps add.
int64_t candidateCapacity(const HipTrtConfig& config, bool decode);

// Bytes of workspace for exactly this shape.
size_t callWorkspaceSize(const HipTrtConfig& config, const HipTrtShape& shape, bool decode);

// The call with everything but the caller's parameters filled in. `decode`: see Call.
Call makeCall(const HipTrtParams& params, bool decode);

} // namespace hip_trt
