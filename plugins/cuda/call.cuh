// One call of the operator as the kernels see it: the caller's parameters, and what follows from them on the host.
#pragma once

#include "hip_attention.h"
#include "layer_caches.cuh"

#include <cuda_runtime.h>

namespace hip_trt
{

struct Call : HipTrtParams
{
    bool decode;        // a single-token call that is no prefill
    int mask_heads;     // Hm
    int heads_per_mask; // query heads that share a mask
    int heads_per_kv;   // query heads that share a key/value head
    int budget;         // K, blocks that a search chooses
    int query_blocks;   // of one sequence, counting padding
    int block_k_log2;
    int row_bytes; // of one head of one token
    bool host_pools; // the present pools are in host memory, where tensor maps do not reach
    bool appended;   // the new rows are in the present pools
    LayerCaches caches; // of the present pools, for a single-token call that reads them row by row

    // What the search hands to the attention, for every query block of every mask head: [B, Hm, query_blocks].
    int32_t* chosen;       // [.., K] ascending; the caller's chosen_blocks, or workspace
    int32_t* chosen_count; // how many

    // A mask search works on lists of candidate nodes; one set per thread block.
    int candidate_capacity;
    int kept_capacity;
    char* search_lists; // in the workspace, or nullptr: in shared memory
    int search_slots;   // sets in the workspace

    // A single-token call splits the attended tokens over `splits` thread blocks, whose results are combined.
    int splits;
    float* partial_output; // [B, Hq, S, splits, D] weighted sums of values
    float2* partial_state; // [B, Hq, S, splits] largest logit (base 2), sum of weights
};

} // namespace hip_trt
