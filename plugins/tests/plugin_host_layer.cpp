// A layer's plugin, its sizes, and what TensorRT asks it about the shapes of its results.
#include "plugin_host.h"

#include "plugin_host_check.h"

#include <algorithm>
#include <stdexcept>

using nvinfer1::DataType;
using nvinfer1::Dims;

namespace
{

Dims toDims(std::vector<int64_t> const& values)
{
    Dims dims{};
    dims.nbDims = static_cast<int32_t>(values.size());
    std::copy(values.begin(), values.end(), dims.d);
    return dims;
}

Operator const kOPERATORS[] = {
    // query, past_key, past_value, past_nodes
    {"1", HIP_TRT_OPERATOR_VERSION, 10, 4, {0, 3, 4, 8}, {5, 6, 7, 8, 9, 13}, 8},
    // query, past_key, past_value, past_bounds, past_codes, past_blocks
    {"2", HIP_TRT_V2_OPERATOR_VERSION, 13, 6, {0, 3, 4, 8, 9, 10}, {5, 6, 7, 9, 10, 11, 12, 17, 18}, 10},
};

} // namespace

Operator gOperator = kOPERATORS[0];

bool chooseOperator(std::string const& version)
{
    for (Operator const& one : kOPERATORS)
    {
        if (version == one.pluginVersion)
        {
            gOperator = one;
            return true;
        }
    }
    return false;
}

Plugin::Plugin(nvinfer1::IPluginV3* owned)
    : plugin{owned}
{
    using Type = nvinfer1::PluginCapabilityType;
    // A capability is what its kind and version say; another must not be called as if it were this one.
    auto const capability = [this](Type type, char const* kind, int32_t major)
    {
        nvinfer1::IPluginCapability* const found = plugin == nullptr ? nullptr : plugin->getCapabilityInterface(type);
        if (!CHECK(found != nullptr) || !CHECK_EQUAL(std::string{found->getInterfaceInfo().kind}, kind)
            || !CHECK_EQUAL(found->getInterfaceInfo().major, major))
        {
            throw std::runtime_error{kind};
        }
        return found;
    };
    core = static_cast<nvinfer1::IPluginV3OneCore*>(capability(Type::kCORE, "PLUGIN_V3ONE_CORE", 1));
    build = static_cast<nvinfer1::IPluginV3OneBuildV2*>(capability(Type::kBUILD, "PLUGIN_V3ONE_BUILD", 2));
    runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(capability(Type::kRUNTIME, "PLUGIN_V3ONE_RUNTIME", 1));
}

std::vector<std::vector<int64_t>> Geometry::shapes() const
{
    std::vector<int64_t> const query{batch, queryHeads, newTokens, headDim};
    std::vector<int64_t> const rows{batch, kvHeads, newTokens, headDim};
    std::vector<int64_t> const pool{pages, kvHeads, pageSize, headDim};
    std::vector<int64_t> const kept{batch, masks, nodes};
    std::vector<std::vector<int64_t>> shapes{query, rows, rows, pool, pool, {batch, pageSlots}, {batch}, {batch}};
    if (gOperator.format == HIP_TRT_OPERATOR_VERSION)
    {
        shapes.insert(shapes.end(), {kept, {1}, query, pool, pool, kept});
        return shapes;
    }
    std::vector<int64_t> const bounds{pages, kvHeads, pageBlocks, 2, headDim};
    std::vector<int64_t> const codes{pages, kvHeads, pageSize, headDim / 16};
    shapes.insert(shapes.end(), {bounds, codes, kept, {batch}, {kind}, query, pool, pool, bounds, codes, kept});
    return shapes;
}

std::vector<DataType> Geometry::types() const
{
    std::vector<DataType> types(gOperator.inputs + gOperator.outputs, type);
    for (int const position : gOperator.integers)
    {
        types[position] = DataType::kINT32;
    }
    return types;
}

std::vector<nvinfer1::PluginTensorDesc> Geometry::tensors() const
{
    std::vector<nvinfer1::PluginTensorDesc> tensors(gOperator.inputs + gOperator.outputs);
    for (int i = 0; i < gOperator.inputs + gOperator.outputs; ++i)
    {
        tensors[i].dims = toDims(shapes()[i]);
        tensors[i].type = types()[i];
        tensors[i].format = nvinfer1::TensorFormat::kLINEAR;
    }
    return tensors;
}

std::vector<nvinfer1::DynamicPluginTensorDesc> Geometry::dynamicTensors() const
{
    Geometry smallest = *this;
    smallest.batch = smallest.newTokens = smallest.pages = smallest.pageSlots = 1;
    Geometry unknown = *this;
    unknown.batch = unknown.newTokens = unknown.pages = unknown.pageSlots = -1;
    std::vector<nvinfer1::DynamicPluginTensorDesc> tensors(gOperator.inputs + gOperator.outputs);
    for (int i = 0; i < gOperator.inputs + gOperator.outputs; ++i)
    {
        tensors[i].desc = unknown.tensors()[i];
        tensors[i].min = smallest.tensors()[i].dims;
        tensors[i].opt = tensors[i].max = this->tensors()[i].dims;
    }
    return tensors;
}

HostFields goodFields()
{
    HostFields fields;
    std::pair<char const*, int32_t> const values[] = {{"mask_k", 128}, {"decode_mask_k", 64}, {"block_q", 16},
        {"block_k", 16}, {"stride_q", 4}, {"stride_k", 1}, {"branch", 4}, {"leaf_branch", 8}, {"page_size", 16},
        {"sink_tokens", 16}, {"window_tokens", 32}, {"dense", 0}};
    for (auto const& [name, value] : values)
    {
        fields.set(name, value);
    }
    if (gOperator.format == HIP_TRT_OPERATOR_VERSION)
    {
        fields.set("reuse_level", 1);
    }
    else
    {
        fields.set("decode_search_k", 256);
        fields.set("decode_block_k", 16);
        fields.set("value_threshold", 0.0F);
    }
    fields.set("mask_heads", std::string{"kv"});
    fields.set("scale", 0.125F);
    return fields;
}

OutputShapes::OutputShapes(Plugin const& plugin, std::vector<Dims> const& inputDims)
{
    for (Dims const& dims : inputDims)
    {
        inputs.push_back(mBuilder.dimensions({dims.d, dims.d + dims.nbDims}));
    }
    status = plugin.build->getOutputShapes(
        inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0, outputs, gOperator.outputs, mBuilder);
}

void checkShapes(Plugin const& plugin, Geometry const& geometry)
{
    auto const shapes = geometry.shapes();
    std::vector<Dims> inputDims;
    std::transform(shapes.begin(), shapes.begin() + gOperator.inputs, std::back_inserter(inputDims), toDims);
    OutputShapes const found{plugin, inputDims};
    CHECK_EQUAL(found.status, 0);
    for (int i = 0; i < gOperator.outputs; ++i)
    {
        std::vector<int64_t> const& expected = shapes[gOperator.inputs + i];
        if (!CHECK_EQUAL(found.outputs[i].nbDims, static_cast<int32_t>(expected.size())))
        {
            continue;
        }
        for (size_t j = 0; j < expected.size(); ++j)
        {
            CHECK_EQUAL(found.outputs[i].d[j]->getConstantValue(), expected[j]);
            // It must be the very size of the input, so that TensorRT knows that they are equal where it is dynamic.
            CHECK(found.outputs[i].d[j] == found.inputs[gOperator.resultLike[i]].d[j]);
        }
    }
}

size_t configure(Plugin const& plugin, std::vector<nvinfer1::DynamicPluginTensorDesc> const& tensors)
{
    for (int position = 0; position < gOperator.inputs + gOperator.outputs; ++position)
    {
        CHECK(plugin.build->supportsFormatCombination(position, tensors.data(), gOperator.inputs, gOperator.outputs));
    }
    CHECK_EQUAL(plugin.build->configurePlugin(
                    tensors.data(), gOperator.inputs, tensors.data() + gOperator.inputs, gOperator.outputs),
        0);
    size_t const workspace =
        plugin.build->getWorkspaceSize(
            tensors.data(), gOperator.inputs, tensors.data() + gOperator.inputs, gOperator.outputs);
    CHECK(workspace > 0);
    return workspace;
}

Plugin reload(Library const& library, Plugin const& built, char const* name)
{
    HostFields saved{*built.runtime->getFieldsToSerialize()};
    return Plugin{library.creator->createPlugin(name, saved.collection(), nvinfer1::TensorRTPhase::kRUNTIME)};
}
