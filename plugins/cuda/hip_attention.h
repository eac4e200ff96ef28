/* HipAttention on CUDA: the one entry to the kernels, for the TensorRT plugin, PyTorch and tests alike.
 *
 * The function computed is the one of hip_trt/reference/operator.py; names and shapes follow it. Nothing here allocates,
 * synchronizes with the host or keeps state, so calls can be captured in a CUDA graph and run on any stream.
 */
#ifndef HIP_TRT_HIP_ATTENTION_H
#define HIP_TRT_HIP_ATTENTION_H

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define HIP_TRT_API __attribute__((visibility("default")))
#else
#define HIP_TRT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a struct below changes; hipTrtAbiVersion() returns the value that the library was built with. */
#define HIP_TRT_ABI_VERSION 1

/* Version of the operator's contract (docs/operator.md), OP_VERSION in hip_trt/operator.py. Raised whenever the operator's
 * inputs, outputs, attributes or results change; an engine of another version is refused. */
#define HIP_TRT_OPERATOR_VERSION 1

/* Of every function. A null pointer where none is allowed is an invalid argument. */
typedef enum HipTrtStatus
{
    HIP_TRT_SUCCESS = 0,
    HIP_TRT_INVALID_ARGUMENT = 1,    /* a field is out of range, or a pointer is missing */
    HIP_TRT_UNSUPPORTED = 2,         /* valid, but no kernel computes it */
    HIP_TRT_WORKSPACE_TOO_SMALL = 3, /* less than hipTrtWorkspaceSize() says */
    HIP_TRT_CUDA_ERROR = 4           /* a launch failed; hipTrtLastCudaError() names the error */
} HipTrtStatus;

typedef enum HipTrtDataType
{
    HIP_TRT_FLOAT16 = 0,
    HIP_TRT_BFLOAT16 = 1,
    HIP_TRT_FLOAT32 = 2
} HipTrtDataType;

/* Attributes of the operator; the meaning of each is in hip_trt/config.py. */
typedef struct HipTrtConfig
{
    int32_t mask_k;
    int32_t decode_mask_k;
    int32_t block_q;
    int32_t block_k;
    int32_t stride_q;
    int32_t stride_k;
    int32_t branch;
    int32_t leaf_branch;
    int32_t reuse_level;
    int32_t page_size;
    int32_t sink_tokens;
    int32_t window_tokens;
    int32_t mask_per_query_head; /* 0: one mask per key/value head; 1: one per query head */
    int32_t dense;               /* 1: attend to everything */
    float scale;                 /* factor on q.k */
} HipTrtConfig;

typedef struct HipTrtShape
{
    HipTrtDataType type;
    int32_t batch;              /* B */
    int32_t new_tokens;         /* S, padded; 1 is a decode step */
    int32_t num_query_heads;    /* Hq */
    int32_t num_kv_heads;       /* Hkv */
    int32_t head_dim;           /* D */
    int32_t num_pages;          /* P, pages in the pool */
    int32_t pages_per_sequence; /* M, slots in a row of the page table */
} HipTrtShape;

/* One call. All pointers are device pointers (or host memory mapped to the device), 16-byte aligned, contiguous. */
typedef struct HipTrtParams
{
    HipTrtConfig config;
    HipTrtShape shape;
    const void* query;             /* [B, Hq, S, D] */
    const void* key;               /* [B, Hkv, S, D] */
    const void* value;             /* [B, Hkv, S, D] */
    const void* past_key;          /* [P, Hkv, page_size, D] */
    const void* past_value;        /* [P, Hkv, page_size, D] */
    const int32_t* page_table;     /* [B, M] */
    const int32_t* past_lengths;   /* [B] */
    const int32_t* query_lengths;  /* [B] */
    const int32_t* past_nodes;     /* [B, Hm, Kd]; not used where the first is negative */
    const int32_t* refresh_mask;   /* [1] */
    void* output;                  /* [B, Hq, S, D] */
    void* present_key;             /* [P, Hkv, page_size, D]; may be past_key, then only new rows are written */
    void* present_value;           /* likewise */
    int32_t* present_nodes;        /* [B, Hm, Kd]; may be past_nodes */
    int32_t* chosen_blocks;        /* [B, Hm, ceil(S / block_q), K] ascending, -1 after the last, all -1 where the query
                                      block holds no valid row or the layer is dense: for verification; NULL when not
                                      wanted. All candidates where they fit in K without a search.
                                      K = (S == 1 ? decode_mask_k : mask_k) / block_k */
    void* workspace;
    size_t workspace_size;         /* bytes */
} HipTrtParams;

/* The HIP_TRT_ABI_VERSION of the library. */
HIP_TRT_API int32_t hipTrtAbiVersion(void);

/* The HIP_TRT_OPERATOR_VERSION of the library. */
HIP_TRT_API int32_t hipTrtOperatorVersion(void);

/* The package version that the library was built from, such as "0.1.0". */
HIP_TRT_API const char* hipTrtVersion(void);

/* What a status means, in English; never NULL. */
HIP_TRT_API const char* hipTrtStatusText(HipTrtStatus status);

/* Name of the CUDA error behind the calling thread's last HIP_TRT_CUDA_ERROR, such as "cudaErrorInvalidValue"; never
 * NULL. The library has its own copy of the CUDA runtime, so the caller's cudaGetLastError() cannot tell. */
HIP_TRT_API const char* hipTrtLastCudaError(void);

/* Whether kernels exist for a configuration and head geometry. Shape fields that are 0 (batch, new_tokens, num_pages,
 * pages_per_sequence) are not checked, so that an engine builder can ask before shapes are known.
 * On failure the reason, naming the field, its value and what is allowed, is written to message (always terminated,
 * truncated to message_size bytes; message may be NULL). Touches no GPU. */
HIP_TRT_API HipTrtStatus hipTrtValidate(
    const HipTrtConfig* config, const HipTrtShape* shape, char* message, size_t message_size);

/* Bytes of workspace, 256-byte aligned, that a call of this shape, or of any smaller batch, new_tokens, num_pages or
 * pages_per_sequence, needs. Touches no GPU. */
HIP_TRT_API HipTrtStatus hipTrtWorkspaceSize(const HipTrtConfig* config, const HipTrtShape* shape, size_t* bytes);

/* Launch the operator on a stream. Lengths, the page table, past_nodes and refresh_mask are read on the device only, and no
 * status can tell of them; the caller has checked them (hip_trt/runtime does). A page number outside the pool harms no memory:
 * the rows of such a page read as some other page's, and new rows of it are not written. Lengths and nodes are taken as they
 * are. */
HIP_TRT_API HipTrtStatus hipTrtAttention(const HipTrtParams* params, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif /* HIP_TRT_HIP_ATTENTION_H */
