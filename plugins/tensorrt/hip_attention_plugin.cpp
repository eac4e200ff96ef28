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
bool hasTensors(Signature const& signature, std::string const& layer, int32_t nbInputs, int32_t nbOutputs)
{
    if (nbInputs == signature.nbInputs && nbOutputs == signature.nbOutputs)
    {
        return true;
    }
    logError(layer,
        concat("has ", nbInputs, " inputs and ", nbOutputs, " outputs; it must have ", signature.nbInputs, " and ",
            signature.nbOutputs));
    return false;
}

template <typename Version>
std::optional<CallShape> readDims(typename Version::Config const& config, DataType type,
    std::vector<Dims const*> const& dims, std::string& message)
{
    return readShape(Version::signature(), Version::sizes(config), type, dims.data(), message);
}

//! Shape of a call with concrete dimensions.
template <typename Version>
std::optional<CallShape> shapeOf(
    typename Version::Config const& config, PluginTensorDesc const* in, std::string& message)
{
    std::vector<Dims const*> dims;
    for (int32_t i = 0; i < Version::signature().nbInputs; ++i)
    {
        dims.push_back(&in[i].dims);
    }
    return readDims<Version>(config, in[kQUERY].type, dims, message);
}

//! Largest shape of an optimization profile, of either kind where the profile has both.
template <typename Version>
std::optional<CallShape> largestShapeOf(
    typename Version::Config const& config, DynamicPluginTensorDesc const* in, std::string& message)
{
    std::vector<Dims const*> smallest, largest;
    for (int32_t i = 0; i < Version::signature().nbInputs; ++i)
    {
        smallest.push_back(&in[i].min);
        largest.push_back(&in[i].max);
    }
    auto most = readDims<Version>(config, in[kQUERY].desc.type, largest, message);
    std::string ignored;
    auto const least = readDims<Version>(config, in[kQUERY].desc.type, smallest, ignored);
    if (most && (!least || least->kind != most->kind))
    {
        most->kind = HIP_TRT_ANY_CALL;
    }
    return most;
}

//! Whether the kernels take this shape; message receives the reason if not.
template <typename Version>
bool supported(typename Version::Config const& config, CallShape const& call, std::string& message)
{
    char reason[512];
    if (Version::validate(config, call, reason, sizeof(reason)) == HIP_TRT_SUCCESS)
    {
        return true;
    }
    message = reason;
    return false;
}

} // namespace

template <typename Version>
HipAttentionPlugin<Version>::HipAttentionPlugin(std::string layer, Config const& config)
    : mLayer{std::move(layer)}
    , mConfig{config}
    , mDescription{describe<Version>(config)}
{
}

template <typename Version>
nvinfer1::IPluginCapability* HipAttentionPlugin<Version>::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept
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

template <typename Version>
nvinfer1::IPluginV3* HipAttentionPlugin<Version>::clone() noexcept
try
{
    return new HipAttentionPlugin<Version>{mLayer, mConfig};
}
catch (std::bad_alloc const&)
{
    return nullptr;
}

template <typename Version>
nvinfer1::AsciiChar const* HipAttentionPlugin<Version>::getPluginName() const noexcept
{
    return kPLUGIN_NAME;
}

template <typename Version>
nvinfer1::AsciiChar const* HipAttentionPlugin<Version>::getPluginVersion() const noexcept
{
    return Version::kPLUGIN_VERSION;
}

template <typename Version>
nvinfer1::AsciiChar const* HipAttentionPlugin<Version>::getPluginNamespace() const noexcept
{
    return kPLUGIN_NAMESPACE;
}

template <typename Version>
int32_t HipAttentionPlugin<Version>::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs,
    DynamicPluginTensorDesc const* /*out*/, int32_t nbOutputs) noexcept
{
    if (!hasTensors(Version::signature(), mLayer, nbInputs, nbOutputs))
    {
        return kFAILURE;
    }
    // Whatever no kernel computes is refused here, while the engine is built, so that nothing is left to fail in a run.
    std::string message;
    std::optional<CallShape> const shape = largestShapeOf<Version>(mConfig, in, message);
    if (!shape || !supported<Version>(mConfig, *shape, message))
    {
        logError(mLayer, message);
        return kFAILURE;
    }
    return kSUCCESS;
}

template <typename Version>
int32_t HipAttentionPlugin<Version>::getOutputDataTypes(
    DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    if (!hasTensors(Version::signature(), mLayer, nbInputs, nbOutputs))
    {
        return kFAILURE;
    }
    for (int32_t i = 0; i < nbInputs; ++i)
    {
        DataType const expected = isFloatTensor(Version::signature(), i) ? inputTypes[kQUERY] : DataType::kINT32;
        if (inputTypes[i] != expected || (i == kQUERY && !floatType(expected)))
        {
            logError(mLayer,
                concat(tensorName(Version::signature(), i), ": ", typeName(inputTypes[i]),
                    " is not allowed; it must be ",
                    i == kQUERY ? "float16, bfloat16 or float32" : typeName(expected)));
            return kFAILURE;
        }
    }
    for (int32_t i = 0; i < nbOutputs; ++i)
    {
        outputTypes[i] = inputTypes[Version::signature().outputLike[i]];
    }
    return kSUCCESS;
}

template <typename Version>
int32_t HipAttentionPlugin<Version>::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
    nvinfer1::DimsExprs const* /*shapeInputs*/, int32_t /*nbShapeInputs*/, nvinfer1::DimsExprs* outputs,
    int32_t nbOutputs, nvinfer1::IExprBuilder& /*exprBuilder*/) noexcept
{
    if (!hasTensors(Version::signature(), mLayer, nbInputs, nbOutputs))
    {
        return kFAILURE;
    }
    for (int32_t i = 0; i < nbOutputs; ++i)
    {
        outputs[i] = inputs[Version::signature().outputLike[i]];
    }
    return kSUCCESS;
}

template <typename Version>
bool HipAttentionPlugin<Version>::supportsFormatCombination(
    int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept
{
    Signature const& signature = Version::signature();
    if (nbInputs != signature.nbInputs || nbOutputs != signature.nbOutputs || pos < 0 || pos >= nbInputs + nbOutputs
        || inOut[pos].desc.format != nvinfer1::TensorFormat::kLINEAR)
    {
        return false;
    }
    DataType const type = inOut[pos].desc.type;
    if (pos == kQUERY)
    {
        return floatType(type).has_value();
    }
    return type == (isFloatTensor(signature, pos) ? inOut[kQUERY].desc.type : DataType::kINT32);
}

template <typename Version>
int32_t HipAttentionPlugin<Version>::getNbOutputs() const noexcept
{
    return Version::signature().nbOutputs;
}

template <typename Version>
size_t HipAttentionPlugin<Version>::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t /*nbInputs*/,
    DynamicPluginTensorDesc const* /*outputs*/, int32_t /*nbOutputs*/) const noexcept
{
    // There is no way to report a failure from here. What fails here fails in configurePlugin() as well.
    std::string message;
    size_t bytes = 0;
    std::optional<CallShape> const shape = largestShapeOf<Version>(mConfig, inputs, message);
    if (!shape || Version::workspaceSize(mConfig, *shape, &bytes) != HIP_TRT_SUCCESS)
    {
        return 0;
    }
    return bytes;
}

template <typename Version>
char const* HipAttentionPlugin<Version>::getMetadataString() noexcept
{
    return mDescription.c_str();
}

template <typename Version>
int32_t HipAttentionPlugin<Version>::getAliasedInput(int32_t /*outputIndex*/) noexcept
{
    return -1;
}

template <typename Version>
int32_t HipAttentionPlugin<Version>::onShapeChange(
    PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const* /*out*/, int32_t nbOutputs) noexcept
{
    if (!hasTensors(Version::signature(), mLayer, nbInputs, nbOutputs))
    {
        return kFAILURE;
    }
    std::string message;
    std::optional<CallShape> const shape = shapeOf<Version>(mConfig, in, message);
    if (!shape || !supported<Version>(mConfig, *shape, message))
    {
        logError(mLayer, message);
        return kFAILURE;
    }
    return kSUCCESS;
}

template <typename Version>
int32_t HipAttentionPlugin<Version>::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* /*outputDesc*/,
    void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    if (inputDesc == nullptr || inputs == nullptr || outputs == nullptr)
    {
        logError(mLayer, "enqueue: a pointer is missing");
        return kFAILURE;
    }
    std::string message;
    std::optional<CallShape> const shape = shapeOf<Version>(mConfig, inputDesc, message);
    if (!shape)
    {
        logError(mLayer, message);
        return kFAILURE;
    }

    HipTrtStatus const status = Version::enqueue(mConfig, *shape, {inputs, outputs, workspace}, stream);
    if (status != HIP_TRT_SUCCESS)
    {
        logError(mLayer, status == HIP_TRT_CUDA_ERROR ? hipTrtLastCudaError() : hipTrtStatusText(status));
        return kFAILURE;
    }
    return kSUCCESS;
}

template <typename Version>
nvinfer1::IPluginV3* HipAttentionPlugin<Version>::attachToContext(
    nvinfer1::IPluginResourceContext* /*context*/) noexcept
{
    return clone();
}

template <typename Version>
nvinfer1::PluginFieldCollection const* HipAttentionPlugin<Version>::getFieldsToSerialize() noexcept
try
{
    mSerialized = serializeFields<Version>(mConfig);
    mSerializedCollection = {static_cast<int32_t>(mSerialized.size()), mSerialized.data()};
    return &mSerializedCollection;
}
catch (std::bad_alloc const&)
{
    return nullptr;
}

template class HipAttentionPlugin<Version1>;
template class HipAttentionPlugin<Version2>;

} // namespace hip_trt
