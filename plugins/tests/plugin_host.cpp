// Drives libhip_trt_plugin.so through TensorRT's own plugin interfaces.
//
//   plugin_host LIBRARY interfaces     everything up to enqueue; needs no GPU
//   plugin_host LIBRARY calls          execution of the calls given on standard input (plugin_host_calls.cpp)
//
// No TensorRT is needed. With --tensorrt PATH first, the plugin is loaded by the plugin registry of that TensorRT
// library, such as libnvinfer_lean.so.11. Prints what failed, and exits with 0 only if nothing did.
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

} // namespace

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
    return {query, rows, rows, pool, pool, {batch, pageSlots}, {batch}, {batch}, kept, {1}, query, pool, pool, kept};
}

std::vector<DataType> Geometry::types() const
{
    std::vector<DataType> types(kINPUTS + kOUTPUTS, type);
    for (int position : {5, 6, 7, 8, 9, 13})
    {
        types[position] = DataType::kINT32;
    }
    return types;
}

std::vector<nvinfer1::PluginTensorDesc> Geometry::tensors() const
{
    std::vector<nvinfer1::PluginTensorDesc> tensors(kINPUTS + kOUTPUTS);
    for (int i = 0; i < kINPUTS + kOUTPUTS; ++i)
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
    std::vector<nvinfer1::DynamicPluginTensorDesc> tensors(kINPUTS + kOUTPUTS);
    for (int i = 0; i < kINPUTS + kOUTPUTS; ++i)
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
        {"block_k", 16}, {"stride_q", 4}, {"stride_k", 1}, {"branch", 4}, {"leaf_branch", 8}, {"reuse_level", 1},
        {"page_size", 16}, {"sink_tokens", 16}, {"window_tokens", 32}, {"dense", 0}};
    for (auto const& [name, value] : values)
    {
        fields.set(name, value);
    }
    fields.set("mask_heads", std::string{"kv"});
    fields.set("scale", 0.125F);
    return fields;
}

int main(int argc, char** argv)
{
    std::vector<std::string> arguments(argv + 1, argv + argc);
    std::string tensorrt;
    if (arguments.size() == 4 && arguments[0] == "--tensorrt")
    {
        tensorrt = arguments[1];
        arguments.erase(arguments.begin(), arguments.begin() + 2);
    }
    if (arguments.size() != 2 || (arguments[1] != "interfaces" && arguments[1] != "calls"))
    {
        std::fprintf(stderr, "usage: plugin_host [--tensorrt TENSORRT] LIBRARY interfaces|calls\n");
        return 2;
    }
    gReport = arguments[1] == "calls" ? stderr : stdout; // calls are answered on standard output
    char const* const path = arguments[0].c_str();
    HostLogger logger;
    Library library;
    if (tensorrt.empty() ? load(path, logger, library) : loadThrough(tensorrt.c_str(), path, logger, library))
    {
        try
        {
            (arguments[1] == "interfaces" ? checkInterfaces : runCalls)(library, logger);
        }
        catch (std::runtime_error const& error)
        {
            std::fprintf(gReport, "no plugin with %s\n", error.what());
        }
        library.unload();
    }
    std::fprintf(gReport, "%s: %d checks, %d failed\n", arguments[1].c_str(), gChecks, gFailures);
    return gFailures == 0 ? 0 : 1;
}
