// What differs between the versions of the operator: attributes, tensors, and the calls of the C ABI.
#pragma once

#include "hip_attention_v2.h"
#include "tensors.h"

#include <NvInferRuntime.h>

#include <utility>

namespace hip_trt
{

template <typename Config, typename Value>
using NumberField = std::pair<char const*, Value Config::*>;

//! Everything of a call but what its shape says.
struct CallTensors
{
    void const* const* inputs;
    void* const* outputs;
    void* workspace;
};

struct Version1
{
    using Config = HipTrtConfig;

    static constexpr char const* kPLUGIN_VERSION = "1";
    static constexpr int32_t kOPERATOR_VERSION = HIP_TRT_OPERATOR_VERSION;
    static constexpr NumberField<Config, int32_t> kINT_FIELDS[] = {{"mask_k", &Config::mask_k},
        {"decode_mask_k", &Config::decode_mask_k}, {"block_q", &Config::block_q}, {"block_k", &Config::block_k},
        {"stride_q", &Config::stride_q}, {"stride_k", &Config::stride_k}, {"branch", &Config::branch},
        {"leaf_branch", &Config::leaf_branch}, {"reuse_level", &Config::reuse_level}, {"page_size", &Config::page_size},
        {"sink_tokens", &Config::sink_tokens}, {"window_tokens", &Config::window_tokens}, {"dense", &Config::dense}};
    static constexpr NumberField<Config, float> kFLOAT_FIELDS[] = {{"scale", &Config::scale}};

    static Signature const& signature();
    static AttributeSizes sizes(Config const& config);
    static HipTrtStatus validate(Config const& config, CallShape const& call, char* message, size_t message_size);
    static HipTrtStatus workspaceSize(Config const& config, CallShape const& call, size_t* bytes);
    static HipTrtStatus enqueue(
        Config const& config, CallShape const& call, CallTensors const& tensors, cudaStream_t stream);
};

struct Version2
{
    using Config = HipTrtV2Config;

    static constexpr char const* kPLUGIN_VERSION = "2";
    static constexpr int32_t kOPERATOR_VERSION = HIP_TRT_V2_OPERATOR_VERSION;
    static constexpr NumberField<Config, int32_t> kINT_FIELDS[] = {{"mask_k", &Config::mask_k},
        {"block_q", &Config::block_q}, {"block_k", &Config::block_k}, {"stride_q", &Config::stride_q},
        {"stride_k", &Config::stride_k}, {"branch", &Config::branch}, {"leaf_branch", &Config::leaf_branch},
        {"decode_mask_k", &Config::decode_mask_k}, {"decode_search_k", &Config::decode_search_k},
        {"decode_block_k", &Config::decode_block_k}, {"page_size", &Config::page_size},
        {"sink_tokens", &Config::sink_tokens}, {"window_tokens", &Config::window_tokens}, {"dense", &Config::dense}};
    static constexpr NumberField<Config, float> kFLOAT_FIELDS[]
        = {{"value_threshold", &Config::value_threshold}, {"scale", &Config::scale}};

    static Signature const& signature();
    static AttributeSizes sizes(Config const& config);
    static HipTrtStatus validate(Config const& config, CallShape const& call, char* message, size_t message_size);
    static HipTrtStatus workspaceSize(Config const& config, CallShape const& call, size_t* bytes);
    static HipTrtStatus enqueue(
        Config const& config, CallShape const& call, CallTensors const& tensors, cudaStream_t stream);
};

} // namespace hip_trt
