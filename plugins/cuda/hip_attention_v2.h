/* HipAttention, version 2, on CUDA: one call, prefill or decode.
 *
 * The function computed is the one of hip_trt/reference/operator_v2.py; names and shapes follow docs/decode_version_2.md.
 * As in hip_attention.h, whose place this header takes when version 2 replaces version 1, nothing allocates, synchronizes
 * with the host or keeps state, so calls can be captured in a CUDA graph and run on any stream.
 */
#ifndef HIP_TRT_HIP_ATTENTION_V2_H
#define HIP_TRT_HIP_ATTENTION_V2_H

#include "hip_attention.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Version of this contract, as HIP_TRT_OPERATOR_VERSION is version 1's. */
#define HIP_TRT_V2_OPERATOR_VERSION 2

/* The values are sizes of the operator's input call_kind. */
typedef enum HipTrtCallKind
{
    HIP_TRT_ANY_CALL = 0, /* both, for questions ahead of a call */
    HIP_TRT_PREFILL = 1,  /* a prompt, or a chunk of one, of any number of rows */
    HIP_TRT_DECODE = 2    /* 1 to 8 rows a sequence */
} HipTrtCallKind;

/* Attributes of the operator; the meaning of each is in hip_trt/config_v2.py. */
typedef struct HipTrtV2Config
{
    int32_t mask_k; /* from here to leaf_branch: prefill's search */
    int32_t block_q;
    int32_t block_k;
    int32_t stride_q;
    int32_t stride_k;
    int32_t branch;
    int32_t leaf_branch;
    int32_t decode_mask_k;   /* tokens of the blocks that a decode call chooses; K is decode_mask_k / decode_block_k */
    int32_t decode_search_k; /* tokens whose codes it reads; F is decode_search_k / decode_block_k, at least K */
    int32_t decode_block_k;  /* 16, 32 or 64 */
    int32_t page_size;       /* a multiple of block_k and decode_block_k */
    int32_t sink_tokens;
    int32_t window_tokens;
    int32_t mask_per_query_head; /* 0: one mask per key/value head; 1: one per query head */
    int32_t dense;               /* 1: attend to everything; bounds and codes are neither read nor written */
    float value_threshold;       /* 0 to less than 1; above 0 decode takes plainer, slower kernels so far */
    float scale;                 /* factor on q.k */
} HipTrtV2Config;

/* One call. All pointers are device pointers, 16-byte aligned, contiguous. A present tensor may be its past tensor: then
 * nothing but what is new is written. */
typedef struct HipTrtV2Params
{
    HipTrtV2Config config;
    HipTrtShape shape;
    int32_t call_kind;             /* HIP_TRT_PREFILL or HIP_TRT_DECODE */
    const void* query;             /* [B, Hq, S, D] */
    const void* key;               /* [B, Hkv, S, D] */
    const void* value;             /* [B, Hkv, S, D] */
    const void* past_key;          /* [P, Hkv, page_size, D] */
    const void* past_value;        /* [P, Hkv, page_size, D] */
    const int32_t* page_table;     /* [B, M] */
    const int32_t* past_lengths;   /* [B] */
    const int32_t* query_lengths;  /* [B]; 0: idle */
    const void* past_bounds;       /* [P, Hkv, page_size / decode_block_k, 2, D]; NULL is allowed where dense */
    const int32_t* past_codes;     /* [P, Hkv, page_size, D / 16]; likewise */
    const int32_t* past_blocks;    /* [B, Hm, K] */
    const int32_t* refresh_mask;   /* [B] */
    void* output;                  /* [B, Hq, S, D]; rows of padding become 0 */
    void* present_key;
    void* present_value;
    void* present_bounds;
    int32_t* present_codes;
    int32_t* present_blocks;       /* [B, Hm, K] */
    int32_t* chosen_blocks;        /* as in HipTrtParams, of prefill; not written by decode, whose present_blocks tell */
    void* workspace;
    size_t workspace_size;         /* bytes */
} HipTrtV2Params;

/* Whether kernels exist for calls of a kind; see hipTrtValidate. */
HIP_TRT_API HipTrtStatus hipTrtV2Validate(const HipTrtV2Config* config, const HipTrtShape* shape, HipTrtCallKind kind,
    char* message, size_t message_size);

/* Bytes of workspace, 256-byte aligned, that a call of this kind and shape, or of any smaller batch, new_tokens, num_pages
 * or pages_per_sequence, needs. Touches no GPU. */
HIP_TRT_API HipTrtStatus hipTrtV2WorkspaceSize(
    const HipTrtV2Config* config, const HipTrtShape* shape, HipTrtCallKind kind, size_t* bytes);

/* Launch the operator on a stream. Lengths, the page table, past_blocks and refresh_mask are read on the device only.
 * hipTrtLastCudaError() names the error behind a HIP_TRT_CUDA_ERROR. */
HIP_TRT_API HipTrtStatus hipTrtV2Attention(const HipTrtV2Params* params, cudaStream_t stream);

/* Launch only what a prefill does to the state, for tests and benchmarks: new rows to the pools, and bounds and codes of the
 * blocks that they fill. query, past_blocks, refresh_mask, output, present_blocks and workspace may be NULL. */
HIP_TRT_API HipTrtStatus hipTrtV2Append(const HipTrtV2Params* params, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif /* HIP_TRT_HIP_ATTENTION_V2_H */
