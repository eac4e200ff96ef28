// One call of version 2 as the kernels of its decode see it: the caller's parameters, what follows from them on the host, and
// where things are. docs/decode_version_2.md is the contract.
#pragma once

#include "decode_cluster_ptx.cuh"
#include "divisor.cuh"
#include "hip_attention_v2.h"
#include "overlap.cuh"
#include "ptx.cuh"

namespace hip_trt::decode
{

constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kLanes = 32;
constexpr int kThreads = 256; // of every thread block
constexpr int kWarps = kThreads / kLanes;
constexpr int kTileRows = 16; // rows of a left operand of the tensor cores: bounds, codes or keys
constexpr int kHeadTile = 8;  // columns of a right operand: query heads

struct Step : HipTrtV2Params
{
    int mask_heads;     // Hm
    int heads_per_mask; // query heads that share a mask
    int heads_per_kv;   // query heads that share a key/value head
    int budget;         // K
    int searched;       // F
    int sink_blocks;
    int block_log2;
    Divisor blocks_per_page;
    Divisor new_tokens; // S
    int row_bytes; // of one head of one token
    int capacity;  // blocks that the page table has room for
    int score_stride;  // capacity, rounded up to 16 bytes of scores
    int append_blocks; // that new rows of a sequence can touch
    bool stage_log_sums; // thread blocks of the attention have room for those of a mask head

    // Thread blocks of a sequence and mask head, for each phase.
    int scan_parts;
    int code_parts;
    int attend_parts;
    int stages;         // tiles of keys and values that a warp of the attention has under way
    int row_group;      // rows, of all heads of the mask, that a thread block attends with
    int row_groups;
    int mark_words; // 0 without a value threshold
    bool overlap; // kernels may start before earlier ones have ended

    // The workspace.
    int32_t* searches;     // [B, Hm] whether the mask head searches
    uint32_t* scores;      // [B, Hm, score_stride] first stage, of candidates in order, as scoreKey gives them
    int32_t* kept;         // [B, Hm, F] the blocks that stay, ascending
    float* log_sums;       // [B, Hm, heads of the mask, F] second stage, base 2
    int32_t* tickets;      // [B, Hm, row_groups] thread blocks that have attended
    float* partial_output; // [B, Hm, row_groups, attend_parts, row_group, D] weighted sums of values
    uint32_t* marks;       // [B, Hm, mark_words] a bit for each token of chosen blocks that the value threshold leaves
    float2* partial_state; // [B, Hm, row_groups, attend_parts, row_group] largest logit (base 2), sum of weights
};

__device__ __forceinline__ int lane()
{
    return threadIdx.x % kLanes;
}

__device__ __forceinline__ int warp()
{
    return threadIdx.x / kLanes;
}

// A sequence, and the blocks that may be chosen for it.
struct Sequence
{
    int past; // position of the first new row
    int rows; // new ones that are valid
    int first, last; // candidates, from the first after the sink to the window's first

    __device__ __forceinline__ Sequence(const Step& step, int b)
        : past(loadCurrent(step.past_lengths + b))
        , rows(loadCurrent(step.query_lengths + b))
    {
        last = max(0, past - step.config.window_tokens + 1) >> step.block_log2;
        first = min(step.sink_blocks, last);
    }

    __device__ __forceinline__ int candidates() const
    {
        return last - first;
    }

    // After the last token.
    __device__ __forceinline__ int end() const
    {
        return past + rows;
    }

    __device__ __forceinline__ bool attendsAll(const Step& step) const
    {
        return step.config.dense || candidates() <= step.budget;
    }
};

// One key/value head of one sequence in the pools.
struct Pages
{
    const int32_t* table;
    int num_pages;
    int capacity; // blocks
    Divisor blocks_per_page;
    int heads;
    int head;

    __device__ __forceinline__ Pages(const Step& step, int b, int kv_head)
        : table(step.page_table + static_cast<int64_t>(b) * step.shape.pages_per_sequence)
        , num_pages(step.shape.num_pages)
        , capacity(step.capacity)
        , blocks_per_page(step.blocks_per_page)
        , heads(step.shape.num_kv_heads)
        , head(kv_head)
    {
    }

    // The page of a block of the sequence; -1 for none, as for one outside the pool.
    __device__ __forceinline__ int page(int block) const
    {
        const int page = block < capacity ? loadCurrent(table + blocks_per_page.divide(block)) : -1;
        return static_cast<uint32_t>(page) < static_cast<uint32_t>(num_pages) ? page : -1;
    }

    // Index of a block in the pool, counted in blocks, from its page; negative for none.
    __device__ __forceinline__ int inPool(int block, int page) const
    {
        const int in_page = block - blocks_per_page.divide(block) * blocks_per_page.divisor;
        return page < 0 ? -1 : (page * heads + head) * blocks_per_page.divisor + in_page;
    }

    __device__ __forceinline__ int inPool(int block) const
    {
        return inPool(block, page(block));
    }
};

__device__ __forceinline__ int64_t pairIndex(const Step& step, int b, int mask)
{
    return static_cast<int64_t>(b) * step.mask_heads + mask;
}

} // namespace hip_trt::decode
