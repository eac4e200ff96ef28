#include "operator_versions.h"

#include <iterator>

namespace hip_trt
{
namespace
{

constexpr TensorLayout kINPUTS_1[] = {
    {"query", true, 4, {kB, kHQ, kS, kD}},
    {"key", true, 4, {kB, kHKV, kS, kD}},
    {"value", true, 4, {kB, kHKV, kS, kD}},
    {"past_key", true, 4, {kP, kHKV, kPAGE_SIZE, kD}},
    {"past_value", true, 4, {kP, kHKV, kPAGE_SIZE, kD}},
    {"page_table", false, 2, {kB, kM}},
    {"past_lengths", false, 1, {kB}},
    {"query_lengths", false, 1, {kB}},
    {"past_nodes", false, 3, {kB, kHM, kKEPT}},
    {"refresh_mask", false, 1, {kONE}},
};
constexpr char const* kOUTPUT_NAMES_1[] = {"output", "present_key", "present_value", "present_nodes"};
constexpr int32_t kOUTPUT_LIKE_1[] = {0, 3, 4, 8};

constexpr TensorLayout kINPUTS_2[] = {
    {"query", true, 4, {kB, kHQ, kS, kD}},
    {"key", true, 4, {kB, kHKV, kS, kD}},
    {"value", true, 4, {kB, kHKV, kS, kD}},
    {"past_key", true, 4, {kP, kHKV, kPAGE_SIZE, kD}},
    {"past_value", true, 4, {kP, kHKV, kPAGE_SIZE, kD}},
    {"page_table", false, 2, {kB, kM}},
    {"past_lengths", false, 1, {kB}},
    {"query_lengths", false, 1, {kB}},
    {"past_bounds", true, 5, {kP, kHKV, kBLOCKS, kTWO, kD}},
    {"past_codes", false, 4, {kP, kHKV, kPAGE_SIZE, kWORDS}},
    {"past_blocks", false, 3, {kB, kHM, kKEPT}},
    {"refresh_mask", false, 1, {kB}},
    {"call_kind", false, 1, {kCALL_KIND}},
};
constexpr char const* kOUTPUT_NAMES_2[]
    = {"output", "present_key", "present_value", "present_bounds", "present_codes", "present_blocks"};
constexpr int32_t kOUTPUT_LIKE_2[] = {0, 3, 4, 8, 9, 10};

constexpr Signature kSIGNATURE_1{
    kINPUTS_1, std::size(kINPUTS_1), kOUTPUT_NAMES_1, kOUTPUT_LIKE_1, std::size(kOUTPUT_NAMES_1), "Kd"};
constexpr Signature kSIGNATURE_2{
    kINPUTS_2, std::size(kINPUTS_2), kOUTPUT_NAMES_2, kOUTPUT_LIKE_2, std::size(kOUTPUT_NAMES_2), "K"};

int32_t const* integers(void const* tensor)
{
    return static_cast<int32_t const*>(tensor);
}

//! What both versions have. TensorRT does not say how large the workspace is: it is what getWorkspaceSize() asked for
//! the largest shape, which is enough for this one.
template <typename Version, typename Params>
Params commonParams(
    typename Version::Config const& config, CallShape const& call, CallTensors const& tensors, HipTrtStatus& status)
{
    Params params{};
    params.config = config;
    params.shape = call.shape;
    params.query = tensors.inputs[0];
    params.key = tensors.inputs[1];
    params.value = tensors.inputs[2];
    params.past_key = tensors.inputs[3];
    params.past_value = tensors.inputs[4];
    params.page_table = integers(tensors.inputs[5]);
    params.past_lengths = integers(tensors.inputs[6]);
    params.query_lengths = integers(tensors.inputs[7]);
    params.output = tensors.outputs[0];
    params.present_key = tensors.outputs[1];
    params.present_value = tensors.outputs[2];
    params.workspace = tensors.workspace;
    status = Version::workspaceSize(config, call, &params.workspace_size);
    return params;
}

} // namespace

Signature const& Version1::signature()
{
    return kSIGNATURE_1;
}

AttributeSizes Version1::sizes(Config const& config)
{
    return {config.page_size, config.decode_mask_k / config.block_k, 0, config.mask_per_query_head != 0};
}

HipTrtStatus Version1::validate(Config const& config, CallShape const& call, char* message, size_t message_size)
{
    return hipTrtValidate(&config, &call.shape, message, message_size);
}

HipTrtStatus Version1::workspaceSize(Config const& config, CallShape const& call, size_t* bytes)
{
    return hipTrtWorkspaceSize(&config, &call.shape, bytes);
}

HipTrtStatus Version1::enqueue(
    Config const& config, CallShape const& call, CallTensors const& tensors, cudaStream_t stream)
{
    HipTrtStatus status = HIP_TRT_SUCCESS;
    auto params = commonParams<Version1, HipTrtParams>(config, call, tensors, status);
    params.past_nodes = integers(tensors.inputs[8]);
    params.refresh_mask = integers(tensors.inputs[9]);
    params.present_nodes = static_cast<int32_t*>(tensors.outputs[3]);
    return status == HIP_TRT_SUCCESS ? hipTrtAttention(&params, stream) : status;
}

Signature const& Version2::signature()
{
    return kSIGNATURE_2;
}

AttributeSizes Version2::sizes(Config const& config)
{
    return {config.page_size, config.decode_mask_k / config.decode_block_k, config.page_size / config.decode_block_k,
        config.mask_per_query_head != 0};
}

HipTrtStatus Version2::validate(Config const& config, CallShape const& call, char* message, size_t message_size)
{
    return hipTrtV2Validate(&config, &call.shape, call.kind, message, message_size);
}

HipTrtStatus Version2::workspaceSize(Config const& config, CallShape const& call, size_t* bytes)
{
    return hipTrtV2WorkspaceSize(&config, &call.shape, call.kind, bytes);
}

HipTrtStatus Version2::enqueue(
    Config const& config, CallShape const& call, CallTensors const& tensors, cudaStream_t stream)
{
    HipTrtStatus status = HIP_TRT_SUCCESS;
    auto params = commonParams<Version2, HipTrtV2Params>(config, call, tensors, status);
    params.call_kind = call.kind;
    params.past_bounds = tensors.inputs[8];
    params.past_codes = integers(tensors.inputs[9]);
    params.past_blocks = integers(tensors.inputs[10]);
    params.refresh_mask = integers(tensors.inputs[11]);
    params.present_bounds = tensors.outputs[3];
    params.present_codes = static_cast<int32_t*>(tensors.outputs[4]);
    params.present_blocks = static_cast<int32_t*>(tensors.outputs[5]);
    return status == HIP_TRT_SUCCESS ? hipTrtV2Attention(&params, stream) : status;
}

} // namespace hip_trt
