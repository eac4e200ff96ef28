#include "hip_attention_plugin.h"

#include "logging.h"
#include "plugin_fields.h"
#include "tensors.h"

#include <new>
#include <optional>
#include <utility>

namespace hip_trt
{
namespace
{

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

// TensorRT asks for 0 on success and anything else on failure.
constexpr int32_t kSUCCESS = 0;
constexpr int32_t kFAILURE = -1;

//! Whether a layer has the operator's tensors; logs it if not.
bool hasTensors(std::string const& layer, int32_t nbInputs, int32_t nbOutputs)
{
    if (nbInputs == kINPUTS && nbOutputs == kOUTPUTS)
    {
        return true;
    }
    logError(layer,
        concat("has ", nbInputs, " inputs and ", nbOutputs, " outputs; it must have ", +kINPUTS, " and ", +kOUTPUTS));
    return false;
}

//! Shape of a call with concrete dimensions.
std::optional<HipTrtShape> shapeOf(HipTrtConfig const& config, PluginTensorDesc const* in, std::string& message)
{
    Dims const* dims[kINPUTS];
    for (int32_t i = 0; i < kINPUTS; ++i)
    {
        dims[i] = &in[i].dims;
    }
    return readShape(config, in[kQUERY].type, dims, message);
}

//! Largest shape of an optimization profile.
std::optional<HipTrtShape> largestShapeOf(
    HipTrtConfig const& config, DynamicPluginTensorDesc const* in, std::string& message)
{
    Dims const* dims[kINPUTS];
    for (int32_t i = 0; i < kINPUTS; ++i)
    {
        dims[i] = &in[i].max;
    }
    return readShape(config, in[kQUERY].desc.type, dims, message);
}

//! Whether the kernels take this shape; message receives the reason if not.
bool supported(HipTrtConfig const& config, HipTrtShape const& shape, std::string& message)
{
    char reason[512];
    if (hipTrtValidate(&config, &shape, reason, sizeof(reason)) == HIP_TRT_SUCCESS)
    {
        return true;
    }
    message = reason;
    return false;
}

} // namespace

HipAttentionPlugin::HipAttentionPlugin(std::string layer, HipTrtConfig const& config)
    : mLayer{std::move(layer)}
    , mConfig{config}
    , mDescription{describe(config)}
{
}

nvinfer1::IPluginCapability* HipAttentionPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    logError(mLayer, concat("capability ", static_cast<int32_t>(type), " is unknown to this plugin"));
    return nullptr;
}

nvinfer1::IPluginV3* HipAttentionPlugin::clone() noexcept
try
{
    return new HipAttentionPlugin{mLayer, mConfig};
}
catch (std::bad_alloc const&)
{
    return nullptr;
}

nvinfer1::AsciiChar const* HipAttentionPlugin::getPluginName() const noexcept
{
    return kPLUGIN_NAME;
}

nvinfer1::AsciiChar const* HipAttentionPlugin::getPluginVersion() const noexcept
{
    return kPLUGIN_VERSION;
}

nvinfer1::AsciiChar const* HipAttentionPlugin::getPluginNamespace() const noexcept
{
    return kPLUGIN_NAMESPACE;
}

int32_t HipAttentionPlugin::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs,
    DynamicPluginTensorDesc const* /*out*/, int32_t nbOutputs) noexcept
{
    if (!hasTensors(mLayer, nbInputs, nbOutputs))
    {
        return kFAILURE;
    }
    // Whatever no kernel computes is refused here, while the engine is built, so that nothing is left to fail in a run.
    std::string message;
    std::optional<HipTrtShape> const shape = largestShapeOf(mConfig, in, message);
    if (!shape || !supported(mConfig, *shape, message))
    {
        logError(mLayer, message);
        return kFAILURE;
    }
    return kSUCCESS;
}

int32_t HipAttentionPlugin::getOutputDataTypes(
    DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    if (!hasTensors(mLayer, nbInputs, nbOutputs))
    {
        return kFAILURE;
    }
    for (int32_t i = 0; i < kINPUTS; ++i)
    {
        DataType const expected = isFloatTensor(i) ? inputTypes[kQUERY] : DataType::kINT32;
        if (inputTypes[i] != expected || (i == kQUERY && !floatType(expected)))
        {
            logError(mLayer,
                concat(tensorName(i), ": ", typeName(inputTypes[i]), " is not allowed; it must be ",
                    i == kQUERY ? "float16, bfloat16 or float32" : typeName(expected)));
            return kFAILURE;
        }
    }
    for (int32_t i = 0; i < kOUTPUTS; ++i)
    {
        outputTypes[i] = inputTypes[kOUTPUT_LIKE[i]];
    }
    return kSUCCESS;
}

int32_t HipAttentionPlugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
    nvinfer1::DimsExprs const* /*shapeInputs*/, int32_t /*nbShapeInputs*/, nvinfer1::DimsExprs* outputs,
    int32_t nbOutputs, nvinfer1::IExprBuilder& /*exprBuilder*/) noexcept
{
    if (!hasTensors(mLayer, nbInputs, nbOutputs))
    {
        return kFAILURE;
    }
    for (int32_t i = 0; i < kOUTPUTS; ++i)
    {
        outputs[i] = inputs[kOUTPUT_LIKE[i]];
    }
    return kSUCCESS;
}

bool HipAttentionPlugin::supportsFormatCombination(
    int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept
{
    if (nbInputs != kINPUTS || nbOutputs != kOUTPUTS || pos < 0 || pos >= kINPUTS + kOUTPUTS
        || inOut[pos].desc.format != nvinfer1::TensorFormat::kLINEAR)
    {
        return false;
    }
    DataType const type = inOut[pos].desc.type;
    if (pos == kQUERY)
    {
        return floatType(type).has_value();
    }
    return type == (isFloatTensor(pos) ? inOut[kQUERY].desc.type : DataType::kINT32);
}

int32_t HipAttentionPlugin::getNbOutputs() const noexcept
{
    return kOUTPUTS;
}

size_t HipAttentionPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t /*nbInputs*/,
    DynamicPluginTensorDesc const* /*outputs*/, int32_t /*nbOutputs*/) const noexcept
{
    // There is no way to report a failure from here. What fails here fails in configurePlugin() as well.
    std::string message;
    size_t bytes = 0;
    std::optional<HipTrtShape> const shape = largestShapeOf(mConfig, inputs, message);
    if (!shape || hipTrtWorkspaceSize(&mConfig, &*shape, &bytes) != HIP_TRT_SUCCESS)
    {
        return 0;
    }
    return bytes;
}

char const* HipAttentionPlugin::getMetadataString() noexcept
{
    return mDescription.c_str();
}

int32_t HipAttentionPlugin::getAliasedInput(int32_t /*outputIndex*/) noexcept
{
    return -1;
}

int32_t HipAttentionPlugin::onShapeChange(
    PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const* /*out*/, int32_t nbOutputs) noexcept
{
    if (!hasTensors(mLayer, nbInputs, nbOutputs))
    {
        return kFAILURE;
    }
    std::string message;
    std::optional<HipTrtShape> const shape = shapeOf(mConfig, in, message);
    if (!shape || !supported(mConfig, *shape, message))
    {
        logError(mLayer, message);
        return kFAILURE;
    }
    return kSUCCESS;
}

int32_t HipAttentionPlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* /*outputDesc*/,
    void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    if (inputDesc == nullptr || inputs == nullptr || outputs == nullptr)
    {
        logError(mLayer, "enqueue: a pointer is missing");
        return kFAILURE;
    }
    std::string message;
    std::optional<HipTrtShape> const shape = shapeOf(mConfig, inputDesc, message);
    if (!shape)
    {
        logError(mLayer, message);
        return kFAILURE;
    }

    HipTrtParams params{};
    params.config = mConfig;
    params.shape = *shape;
    params.query = inputs[kQUERY];
    params.key = inputs[kKEY];
    params.value = inputs[kVALUE];
    params.past_key = inputs[kPAST_KEY];
    params.past_value = inputs[kPAST_VALUE];
    params.page_table = static_cast<int32_t const*>(inputs[kPAGE_TABLE]);
    params.past_lengths = static_cast<int32_t const*>(inputs[kPAST_LENGTHS]);
    params.query_lengths = static_cast<int32_t const*>(inputs[kQUERY_LENGTHS]);
    params.past_nodes = static_cast<int32_t const*>(inputs[kPAST_NODES]);
    params.refresh_mask = static_cast<int32_t const*>(inputs[kREFRESH_MASK]);
    params.output = outputs[kOUTPUT];
    params.present_key = outputs[kPRESENT_KEY];
    params.present_value = outputs[kPRESENT_VALUE];
    params.present_nodes = static_cast<int32_t*>(outputs[kPRESENT_NODES]);
    params.workspace = workspace;

    // TensorRT does not say how large the workspace is: it is what getWorkspaceSize() asked for the largest shape,
    // which is enough for this one.
    HipTrtStatus status = hipTrtWorkspaceSize(&mConfig, &*shape, &params.workspace_size);
    if (status == HIP_TRT_SUCCESS)
    {
        status = hipTrtAttention(&params, stream);
    }
    if (status != HIP_TRT_SUCCESS)
    {
        logError(mLayer, status == HIP_TRT_CUDA_ERROR ? hipTrtLastCudaError() : hipTrtStatusText(status));
        return kFAILURE;
    }
    return kSUCCESS;
}

nvinfer1::IPluginV3* HipAttentionPlugin::attachToContext(nvinfer1::IPluginResourceContext* /*context*/) noexcept
{
    return clone();
}

nvinfer1::PluginFieldCollection const* HipAttentionPlugin::getFieldsToSerialize() noexcept
try
{
    mSerialized = serializeFields(mConfig);
    mSerializedCollection = {static_cast<int32_t>(mSerialized.size()), mSerialized.data()};
    return &mSerializedCollection;
}
catch (std::bad_alloc const&)
{
    return nullptr;
}

} // namespace hip_trt
