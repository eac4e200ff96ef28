#include "hip_attention_creator.h"

#include "hip_attention_plugin.h"
#include "logging.h"
#include "plugin_fields.h"

#include <exception>

namespace hip_trt
{

HipAttentionCreator::HipAttentionCreator()
    : mFields{attributeFields()}
    , mCollection{static_cast<int32_t>(mFields.size()), mFields.data()}
{
}

nvinfer1::IPluginV3* HipAttentionCreator::createPlugin(
    nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fc, nvinfer1::TensorRTPhase phase) noexcept
try
{
    std::string const layer = name == nullptr ? "" : name;
    std::optional<HipTrtConfig> const config = parseFields(layer, fc, phase);
    return config ? new HipAttentionPlugin{layer, *config} : nullptr;
}
catch (std::exception const& error)
{
    logError("", error.what());
    return nullptr;
}

nvinfer1::PluginFieldCollection const* HipAttentionCreator::getFieldNames() noexcept
{
    return &mCollection;
}

nvinfer1::AsciiChar const* HipAttentionCreator::getPluginName() const noexcept
{
    return kPLUGIN_NAME;
}

nvinfer1::AsciiChar const* HipAttentionCreator::getPluginVersion() const noexcept
{
    return kPLUGIN_VERSION;
}

nvinfer1::AsciiChar const* HipAttentionCreator::getPluginNamespace() const noexcept
{
    return kPLUGIN_NAMESPACE;
}

} // namespace hip_trt
