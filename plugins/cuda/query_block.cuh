// What one query block attends to: mirrors the head of select_blocks in hip_trt/reference/operator.py.
#pragma once

#include "call.cuh"

namespace hip_trt
{

// Up to block_q consecutive rows of one sequence that share their masks.
struct QueryBlock
{
    int first_row;   // in the call
    int rows;        // valid ones; 0 or less: nothing to do
    int first, last; // positions in the sequence of the first and the last row
    int sink;        // blocks [0, sink) are attended
    int window;      // and so are the blocks from here to the last row's
    bool contiguous; // all blocks between are attended too: no search

    __device__ QueryBlock(const Call& call, int b, int index)
    {
        const HipTrtConfig& config = call.config;
        first_row = index * config.block_q;
        rows = min(config.block_q, call.query_lengths[b] - first_row);
        first = call.past_lengths[b] + first_row;
        last = first + rows - 1;
        window = max(0, first - config.window_tokens + 1) >> call.block_k_log2;
        sink = min((config.sink_tokens + config.block_k - 1) >> call.block_k_log2, window);
        contiguous = config.dense || window - sink <= call.budget;
    }
};

} // namespace hip_trt
