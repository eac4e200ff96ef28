/* KV cache in host memory, with what decode steps touch often kept in GPU memory.
 *
 * A pool of pages in page-locked host memory, mapped to the device, can be passed to hipTrtAttention like any other: that is
 * correct, and as slow as the bus. Once caches are attached to it, calls on that pool use them. They are a matter of speed
 * only: results are the same bits with caches of any size, and with none, as for pools in GPU memory.
 *
 *   decode  (S = 1) Key blocks that are scored or attended, and value blocks that are attended, are looked up in the caches.
 *           A block that is missing is read over the bus by the warp that needs it, left in the landing area, and noted.
 *           What was noted is copied to the caches later: beside the next layer's step, by thread blocks of its kernel.
 *   prefill (S > 1) The call attends from the staging area, GPU memory for one layer that all layers can share: committed
 *           pages are copied there, new rows are written there, and from there to the pools.
 *
 * The way from the staging area to the pools needs nothing but the bus: given a lane, it runs beside the layers that follow.
 *
 * Calls on the same pools must be ordered, as they are in one stream: each uses and changes the caches. So must those of
 * layers that fill for one another.
 *
 * All memory belongs to the caller. Attaching is thread-safe; kernels keep what was attached when they were launched or
 * captured, so memory must stay until those have run.
 */
#ifndef HIP_TRT_HIP_OFFLOAD_H
#define HIP_TRT_HIP_OFFLOAD_H

#include "hip_attention.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Slots of a cache come in sets of so many. A block may be in any of four sets; the least recently used slot is replaced. */
#define HIP_TRT_CACHE_WAYS 32

/* Numbers before the list of missed blocks: how many there are, and one that is not used. */
#define HIP_TRT_CACHE_MISSED_HEADER 2

/* What precedes the events in a layer's counters: decode steps, and a number that kernels use among themselves. */
#define HIP_TRT_OFFLOAD_EVENTS_AT 2

/* Key blocks, or value blocks, in GPU memory. */
typedef struct HipTrtBlockCache
{
    void* rows;       /* [blocks, block_k, D] */
    uint64_t* owners; /* [blocks]: which block of the pool each is a copy of, and when it was last used. Zeros at first */
    int32_t* slots;   /* [pool_blocks]: by block of the pool, 1 + where the copy is. Zeros at first */
    int32_t* missed;  /* [HIP_TRT_CACHE_MISSED_HEADER + 2 blocks]: blocks to be placed, each with where it landed, or -1. Zeros
                         at first */
    int32_t blocks;   /* a multiple of HIP_TRT_CACHE_WAYS; 0: no cache */
    int32_t pool_blocks;
} HipTrtBlockCache;

/* What a cache counts, in blocks. */
typedef enum HipTrtCacheEvent
{
    HIP_TRT_CACHE_HIT = 0,
    HIP_TRT_CACHE_MISS = 1,     /* read over the bus by the step that needed it */
    HIP_TRT_CACHE_FILL = 2,     /* copied to the cache afterwards */
    HIP_TRT_CACHE_EVICTION = 3, /* a fill that replaced another block */
    HIP_TRT_CACHE_REREAD = 4,   /* a fill of a block that had not landed: read over the bus once more */
    HIP_TRT_CACHE_EVENTS = 5
} HipTrtCacheEvent;

/* Where decode steps leave blocks that they read over the bus, so that these need not be read again to be placed in a cache: a
 * ring in GPU memory, for layers that are called in turn. */
typedef struct HipTrtLanding
{
    void* rows;        /* [blocks, block_k, D] */
    uint32_t* tickets; /* [2]: blocks that were taken, and given back, modulo 2^32. Zeros at first */
    int32_t blocks;    /* a power of two; 0: nothing lands */
} HipTrtLanding;

/* A stream beside that of the calls, for what may wait: shared by the layers of a model, which are called in turn. */
typedef struct HipTrtOffloadLane HipTrtOffloadLane;

/* The pools of one layer in host memory, and the GPU memory that serves them. All pointers 16-byte aligned. */
typedef struct HipTrtOffload
{
    const void* key_pool;   /* [P, Hkv, page_size, D]: what calls pass as both past_key and present_key */
    const void* value_pool; /* likewise */
    HipTrtBlockCache keys;
    HipTrtBlockCache values;
    HipTrtLanding landing;
    const void* fills;      /* key_pool of the layer before, which has the same configuration and shape: its caches are filled
                               by this layer's decode steps. Of the first layer, that is the last one. NULL, or nothing attached
                               to it: none */
    int32_t filled_later;   /* 1: another layer says so of this one. 0: its own decode steps fill its caches, at their end */
    uint64_t* counters;     /* [HIP_TRT_OFFLOAD_EVENTS_AT + 2 HIP_TRT_CACHE_EVENTS]: then events of keys, and of values */
    void* staging_keys;     /* [staging_pages, Hkv, page_size, D]; NULL: prefill reads the pools over the bus, by kernels
                               that on Hopper round differently from those for GPU memory */
    void* staging_values;   /* likewise */
    int32_t* staging_table; /* [4, staging_pages]: the call's page tables and lengths, as they may wait longer than it */
    int32_t staging_pages;  /* used by calls of B pages_per_sequence slots or fewer */
    int32_t last_layer;     /* 1: the layer's calls wait for the lane and leave nothing in it */
    HipTrtOffloadLane* lane; /* NULL: everything runs in the stream of the call */
} HipTrtOffload;

/* Serve calls on these pools from now on; replaces what was attached to key_pool before. */
HIP_TRT_API HipTrtStatus hipTrtOffloadAttach(const HipTrtOffload* offload);

/* Calls launched from now on use the pool as plain memory. Nothing happens if nothing is attached. */
HIP_TRT_API HipTrtStatus hipTrtOffloadDetach(const void* key_pool);

/* A lane on the current device. Destroying it waits for what runs there; nothing may be attached to it any more. */
HIP_TRT_API HipTrtStatus hipTrtOffloadLaneCreate(HipTrtOffloadLane** lane);
HIP_TRT_API HipTrtStatus hipTrtOffloadLaneDestroy(HipTrtOffloadLane* lane);

/* Empty both caches, in stream order: for a caller that writes to the pools by other means than hipTrtAttention. */
HIP_TRT_API HipTrtStatus hipTrtOffloadForget(const void* key_pool, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif /* HIP_TRT_HIP_OFFLOAD_H */
