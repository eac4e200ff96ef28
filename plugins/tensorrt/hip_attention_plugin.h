// HipAttention as a TensorRT plugin: shapes, types, workspace, and one call into the C ABI.
#pragma once

#include "operator_versions.h"

#include <NvInferRuntime.h>

#include <string>
#include <vector>

namespace hip_trt
{

constexpr char const* kPLUGIN_NAME = "HipAttention";
// The ONNX parser looks a plugin up by the node's type, with version "1" and namespace "" unless the node has
// plugin_version or plugin_namespace attributes; the node's domain (hip.trt) plays no part.
constexpr char const* kPLUGIN_NAMESPACE = "";

//! The plugin of one version of the operator (operator_versions.h), which is the plugin's version too.
//!
//! It keeps its configuration and nothing else, so clones and contexts share no state.
//!
//! The build capability is of its second version, which all supported TensorRTs know, but declares no output as aliased
//! to an input: that needs a preview feature switched on in every build, lets TensorRT copy a whole pool to keep the
//! promise, and would forbid separate buffers, which the operator allows. Instead the caller binds past and present to
//! one address, as both are tensors of the engine; the kernels see that and write only the new rows.
template <typename Version>
class HipAttentionPlugin final : public nvinfer1::IPluginV3,
                                 public nvinfer1::IPluginV3OneCore,
                                 public nvinfer1::IPluginV3OneBuildV2,
                                 public nvinfer1::IPluginV3OneRuntime
{
public:
    using Config = typename Version::Config;

    HipAttentionPlugin(std::string layer, Config const& config);

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    nvinfer1::AsciiChar const* getPluginName() const noexcept override;
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override;
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override;

    // IPluginV3OneBuildV2
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs, nvinfer1::DataType const* inputTypes,
        int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const* shapeInputs,
        int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
        nvinfer1::IExprBuilder& exprBuilder) noexcept override;
    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
        int32_t nbOutputs) noexcept override;
    int32_t getNbOutputs() const noexcept override;
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) const noexcept override;
    char const* getMetadataString() noexcept override;
    int32_t getAliasedInput(int32_t outputIndex) noexcept override;

    // IPluginV3OneRuntime
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs, nvinfer1::PluginTensorDesc const* out,
        int32_t nbOutputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

private:
    std::string mLayer;
    Config mConfig;
    std::string mDescription;

    // What getFieldsToSerialize() hands out; made anew in each call, as it points into this very object.
    std::vector<nvinfer1::PluginField> mSerialized;
    nvinfer1::PluginFieldCollection mSerializedCollection{};
};

} // namespace hip_trt
