// Creators of HipAttention plugins, one for each version of the operator, found by TensorRT's registry through
// getCreators().
#pragma once

#include <NvInferRuntime.h>

#include <vector>

namespace hip_trt
{

template <typename Version>
class HipAttentionCreator final : public nvinfer1::IPluginCreatorV3One
{
public:
    HipAttentionCreator();

    //! A plugin, or nullptr after each fault of the fields was logged.
    nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fc,
        nvinfer1::TensorRTPhase phase) noexcept override;

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
    nvinfer1::AsciiChar const* getPluginName() const noexcept override;
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override;
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override;

private:
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection;
};

} // namespace hip_trt
