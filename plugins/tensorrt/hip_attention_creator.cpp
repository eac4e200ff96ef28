#include "hip_attention_creator.h"

#include "hip_attention_plugin.h"
#include "logging.h"
#include "plugin_fields.h"

#include <exception>

namespace hip_trt
{

template <typename Version>
HipAttentionCreator<Version>::HipAttentionCreator()
    : mFields{attributeFields<Version>()}
    , mCollection{static_cast<int32_t>(mFields.size()), mFields.data()}
{
}

template <typename Version>
nvinfer1::IPluginV3* HipAttentionCreator<Version>::createPlugin(
    nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fc, nvinfer1::TensorRTPhase phase) noexcept
try
{
    std::string const layer = name == nullptr ? "" : name;
    auto const config = parseFields<Version>(layer, fc, phase);
    return config ? new HipAttentionPlugin<Version>{layer, *config} : nullptr;
}
catch (std::exception const& error)
{
    logError("", error.what());
    return nullptr;
}

template <typename Version>
nvinfer1::PluginFieldCollection const* HipAttentionCreator<Version>::getFieldNames() noexcept
{
    return &mCollection;
}

template <typename Version>
nvinfer1::AsciiChar const* HipAttentionCreator<Version>::getPluginName() const noexcept
{
    return kPLUGIN_NAME;
}

template <typename Version>
nvinfer1::AsciiChar const* HipAttentionCreator<Version>::getPluginVersion() const noexcept
{
    return Version::kPLUGIN_VERSION;
}

template <typename Version>
nvinfer1::AsciiChar const* HipAttentionCreator<Version>::getPluginNamespace() const noexcept
{
    return kPLUGIN_NAMESPACE;
}

template class HipAttentionCreator<Version1>;
template class HipAttentionCreator<Version2>;

} // namespace hip_trt
