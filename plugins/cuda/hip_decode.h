/* Decode, version 2, on CUDA: one call attends to every token of the blocks that a search over bounds and codes keeps.
 *
 * The function computed is the one of docs/decode_version_2.md, whose names are used here. As in hip_attention.h nothing
 * allocates, synchronizes with the host or keeps state, so calls can be captured in a CUDA graph and run on any stream.
 */
#ifndef HIP_TRT_HIP_DECODE_H
#define HIP_TRT_HIP_DECODE_H

#include "hip_attention.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct HipTrtDecodeConfig
{
    int32_t mask_k;              /* decode_mask_k: tokens of the blocks that are chosen; K is mask_k / block */
    int32_t search_k;            /* decode_search_k: tokens whose codes are read; F is search_k / block, at least K */
    int32_t block;               /* decode_block_k: 16, 32 or 64 */
    int32_t page_size;           /* a multiple of block */
    int32_t sink_tokens;
    int32_t window_tokens;
    int32_t mask_per_query_head; /* 0: one mask per key/value head; 1: one per query head */
    int32_t dense;               /* 1: attend to everything; bounds and codes are neither read nor written */
    float value_threshold;       /* only 0 is supported so far */
    float scale;                 /* factor on q.k */
} HipTrtDecodeConfig;

/* One call. All pointers are device pointers, 16-byte aligned, contiguous. A present tensor may be its past tensor: then
 * nothing but what is new is written. */
typedef struct HipTrtDecodeParams
{
    HipTrtDecodeConfig config;
    HipTrtShape shape;             /* new_tokens: S, 1 to 8 */
    const void* query;             /* [B, Hq, S, D] */
    const void* key;               /* [B, Hkv, S, D] */
    const void* value;             /* [B, Hkv, S, D] */
    const void* past_key;          /* [P, Hkv, page_size, D] */
    const void* past_value;        /* [P, Hkv, page_size, D] */
    const void* past_bounds;       /* [P, Hkv, page_size / block, 2, D] */
    const int32_t* past_codes;     /* [P, Hkv, page_size, D / 16] */
    const int32_t* page_table;     /* [B, M] */
    const int32_t* past_lengths;   /* [B] */
    const int32_t* query_lengths;  /* [B]; 0: idle */
    const int32_t* past_blocks;    /* [B, Hm, K] */
    const int32_t* refresh_mask;   /* [B] */
    void* output;                  /* [B, Hq, S, D]; rows of padding become 0 */
    void* present_key;
    void* present_value;
    void* present_bounds;
    int32_t* present_codes;
    int32_t* present_blocks;       /* [B, Hm, K] */
    void* workspace;
    size_t workspace_size;         /* bytes */
} HipTrtDecodeParams;

/* Whether kernels exist for a configuration and head geometry; see hipTrtValidate. */
HIP_TRT_API HipTrtStatus hipTrtDecodeValidate(
    const HipTrtDecodeConfig* config, const HipTrtShape* shape, char* message, size_t message_size);

/* Bytes of workspace, 256-byte aligned, that a call of this shape, or of any smaller batch, new_tokens, num_pages or
 * pages_per_sequence, needs. Touches no GPU. */
HIP_TRT_API HipTrtStatus hipTrtDecodeWorkspace(
    const HipTrtDecodeConfig* config, const HipTrtShape* shape, size_t* bytes);

/* Launch a decode call on a stream. */
HIP_TRT_API HipTrtStatus hipTrtDecode(const HipTrtDecodeParams* params, cudaStream_t stream);

/* Launch only the append: new rows to the pools, and bounds and codes of the blocks that they fill. Any number of rows. What
 * it does not need (query, past_blocks, refresh_mask, output, present_blocks, workspace) may be NULL. */
HIP_TRT_API HipTrtStatus hipTrtDecodeAppend(const HipTrtDecodeParams* params, cudaStream_t stream);

/* Name of the CUDA error behind the calling thread's last HIP_TRT_CUDA_ERROR of these functions; never NULL. */
HIP_TRT_API const char* hipTrtDecodeLastCudaError(void);

#ifdef __cplusplus
}
#endif

#endif /* HIP_TRT_HIP_DECODE_H */
