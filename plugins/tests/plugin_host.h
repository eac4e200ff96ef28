// The plugin, loaded as TensorRT loads it, and one layer's geometry.
#pragma once

#include "hip_attention_v2.h"
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
    decltype(&hipTrtV2WorkspaceSize) workspaceSizeV2{nullptr};
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

constexpr int kMAX_OUTPUTS = 6;

//! What the host knows of a version of the operator.
struct Operator
{
    char const* pluginVersion;
    int32_t format;
    int inputs;
    int outputs;
    int resultLike[kMAX_OUTPUTS]; // the input of each result's shape and type
    std::vector<int> integers; // positions of int32 tensors, outputs after inputs
    int kept; // input that an earlier call kept
};

//! The version that is driven.
extern Operator gOperator;

//! Drive version 1 or 2; false: there is no such version.
bool chooseOperator(std::string const& version);

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
    int64_t nodes{4}; // or blocks that are kept
    int64_t pageBlocks{1}; // blocks of a decode call in a page
    int64_t kind{1}; // size of call_kind
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
    nvinfer1::DimsExprs outputs[kMAX_OUTPUTS]{};

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
