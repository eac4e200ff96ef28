// The plugin, loaded as TensorRT loads it, and one layer's geometry.
#pragma once

#include "hip_attention.h"
#include "plugin_host_trt.h"

#include <functional>
#include <memory>
#include <string>
#include <vector>

//! The loaded library.
struct Library
{
    void* handle{nullptr};
    nvinfer1::IPluginCreatorV3One* creator{nullptr};
    decltype(&hipTrtVersion) version{nullptr};
    decltype(&hipTrtWorkspaceSize) workspaceSize{nullptr};
    std::function<void()> unload;
};

//! Load the plugin library as TensorRT would.
bool load(char const* path, HostLogger& logger, Library& library);

//! Have a TensorRT library load the plugin library, and take the creator from its plugin registry.
bool loadThrough(char const* tensorrt, char const* path, HostLogger& logger, Library& library);

//! A plugin and its three capabilities.
struct Plugin
{
    //! Throws std::runtime_error where there is no plugin, or it lacks one of them.
    explicit Plugin(nvinfer1::IPluginV3* owned);

    std::unique_ptr<nvinfer1::IPluginV3> plugin;
    nvinfer1::IPluginV3OneCore* core{nullptr};
    nvinfer1::IPluginV3OneBuildV2* build{nullptr};
    nvinfer1::IPluginV3OneRuntime* runtime{nullptr};
};

constexpr int kINPUTS = 10;
constexpr int kOUTPUTS = 4;
constexpr int kRESULT_LIKE[kOUTPUTS] = {0, 3, 4, 8}; // query, past_key, past_value, past_nodes

//! Sizes of one layer and call, and its tensors as TensorRT describes them.
struct Geometry
{
    int64_t batch{2};
    int64_t newTokens{5};
    int64_t queryHeads{4};
    int64_t kvHeads{2};
    int64_t headDim{64};
    int64_t pages{7};
    int64_t pageSlots{3};
    int64_t pageSize{16};
    int64_t masks{2};
    int64_t nodes{4};
    nvinfer1::DataType type{nvinfer1::DataType::kFLOAT};

    //! Shapes of inputs, then of outputs.
    std::vector<std::vector<int64_t>> shapes() const;
    //! Types of inputs, then of outputs.
    std::vector<nvinfer1::DataType> types() const;
    std::vector<nvinfer1::PluginTensorDesc> tensors() const;
    //! With batch, new tokens, pages and page slots dynamic, from 1 to these.
    std::vector<nvinfer1::DynamicPluginTensorDesc> dynamicTensors() const;
};

//! What a plugin says of the shapes of its results.
class OutputShapes
{
public:
    //! A dimension of -1 is one that is known at run time.
    OutputShapes(Plugin const& plugin, std::vector<nvinfer1::Dims> const& inputDims);

    int32_t status{-1};
    std::vector<nvinfer1::DimsExprs> inputs;
    nvinfer1::DimsExprs outputs[kOUTPUTS]{};

private:
    HostExprBuilder mBuilder; // owns the expressions
};

//! Check them, for sizes that may be -1.
void checkShapes(Plugin const& plugin, Geometry const& geometry);

//! Have a plugin take part in the build of an engine, for one optimization profile.
//! \return The workspace that it asks for, in bytes.
size_t configure(Plugin const& plugin, std::vector<nvinfer1::DynamicPluginTensorDesc> const& tensors);

//! The plugin of an engine that was built with this one, saved and loaded.
Plugin reload(Library const& library, Plugin const& built, char const* name);

//! The attributes of a layer for Geometry{}.
HostFields goodFields();

//! Drive everything that needs no GPU.
void checkInterfaces(Library const& library, HostLogger& logger);

//! Execute each call that is given on standard input.
void runCalls(Library const& library, HostLogger& logger);
