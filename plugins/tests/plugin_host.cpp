// Drives libhip_trt_plugin.so through TensorRT's own plugin interfaces, without TensorRT.
//
//   plugin_host LIBRARY interfaces     everything up to enqueue; needs no GPU
//   plugin_host LIBRARY enqueue        execution; needs a GPU
//
// Prints what failed, and exits with 0 only if nothing did.
#include "plugin_host.h"

#include "plugin_host_check.h"

#include <dlfcn.h>

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

template <typename Function>
Function symbol(void* library, char const* name)
{
    auto const function = reinterpret_cast<Function>(dlsym(library, name));
    report(function != nullptr, __FILE__, __LINE__, std::string{"not exported: "} + name);
    return function;
}

//! Loads the library as IPluginRegistry::loadLibrary does.
bool load(char const* path, HostLoggerFinder& finder, Library& library)
{
    void* const handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr)
    {
        std::printf("%s\n", dlerror());
        return false;
    }
    auto const setLoggerFinder = symbol<void (*)(nvinfer1::ILoggerFinder*)>(handle, "setLoggerFinder");
    auto const getCreators = symbol<nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&)>(handle, "getCreators");
    library.version = symbol<decltype(&hipTrtVersion)>(handle, "hipTrtVersion");
    library.workspaceSize = symbol<decltype(&hipTrtWorkspaceSize)>(handle, "hipTrtWorkspaceSize");
    if (gFailures != 0)
    {
        return false;
    }
    setLoggerFinder(&finder);
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* const creators = getCreators(count);
    if (!CHECK_EQUAL(count, 1) || !CHECK(creators != nullptr && creators[0] != nullptr)
        || !CHECK_EQUAL(std::string{creators[0]->getInterfaceInfo().kind}, "PLUGIN CREATOR_V3ONE"))
    {
        return false;
    }
    library.creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[0]);
    return true;
}

} // namespace

Plugin::Plugin(nvinfer1::IPluginV3* owned)
    : plugin{owned}
{
    using Type = nvinfer1::PluginCapabilityType;
    if (!CHECK(plugin != nullptr))
    {
        return;
    }
    core = static_cast<nvinfer1::IPluginV3OneCore*>(plugin->getCapabilityInterface(Type::kCORE));
    build = static_cast<nvinfer1::IPluginV3OneBuildV2*>(plugin->getCapabilityInterface(Type::kBUILD));
    runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(plugin->getCapabilityInterface(Type::kRUNTIME));
    if (CHECK(core != nullptr && build != nullptr && runtime != nullptr))
    {
        CHECK_EQUAL(std::string{core->getInterfaceInfo().kind}, "PLUGIN_V3ONE_CORE");
        CHECK_EQUAL(std::string{build->getInterfaceInfo().kind}, "PLUGIN_V3ONE_BUILD");
        CHECK_EQUAL(build->getInterfaceInfo().major, 2);
        CHECK_EQUAL(std::string{runtime->getInterfaceInfo().kind}, "PLUGIN_V3ONE_RUNTIME");
    }
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
    std::string const mode = argc == 3 ? argv[2] : "";
    if (mode != "interfaces" && mode != "enqueue")
    {
        std::printf("usage: plugin_host LIBRARY interfaces|enqueue\n");
        return 2;
    }
    HostLogger logger;
    HostLoggerFinder finder{logger};
    Library library{};
    if (!load(argv[1], finder, library))
    {
        return 1;
    }
    (mode == "interfaces" ? checkInterfaces : checkEnqueue)(library, logger);
    std::printf("%s: %d checks, %d failed\n", mode.c_str(), gChecks, gFailures);
    return gFailures == 0 ? 0 : 1;
}
