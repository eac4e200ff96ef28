// The plugin within a process that has tensors of its own, such as PyTorch's: TensorRT's side of a layer's life, one
// step at a time, as a C interface (tests/graph_host/plugin.py mirrors it). The caller is the engine: it decides on
// shapes, owns all memory, and orders calls on a stream. Nothing here touches a GPU.
//
// A function that fails returns null or a number other than 0; pluginSessionErrors() then says why.
#include "plugin_host.h"
#include "plugin_host_check.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

using nvinfer1::Dims;
using nvinfer1::PluginTensorDesc;

extern "C"
{

//! Type and shape of a tensor; a size of -1 is dynamic.
struct SessionTensor
{
    int32_t type; // nvinfer1::DataType
    int32_t rank;
    int64_t sizes[Dims::MAX_DIMS];
};

//! An attribute of an ONNX node.
struct SessionAttribute
{
    char const* name;
    char const* text; // of a string; null of a number
    int32_t integer;
    float real;
    int32_t isReal;
};

struct PluginSession
{
    HostLogger logger;
    Library library;
    HostResourceContext context;
};

struct PluginLayer
{
    PluginSession& session;
    std::string name;
    Plugin plugin;
    std::vector<PluginTensorDesc> tensors; // inputs and outputs of calls from now on
};

} // extern "C"

namespace
{

PluginSession* gOpen = nullptr; // TensorRT has one logger a process, and so has the host

//! What failed and was logged since the last call.
std::string takeErrors()
{
    static char* text = nullptr;
    static size_t size = 0;
    std::string errors;
    if (gReport != stdout)
    {
        std::fclose(gReport); // which makes the text whole
        errors.assign(text, size);
        std::free(text);
    }
    gReport = open_memstream(&text, &size);
    return errors + (gOpen == nullptr ? "" : gOpen->logger.take());
}

//! Do something that checks; nothing may be thrown into the caller.
template <typename Result, typename Work>
Result guarded(Result failed, Work const& work)
{
    int const failures = gFailures;
    try
    {
        Result const result = work();
        return gFailures == failures ? result : failed;
    }
    catch (std::exception const& error)
    {
        report(false, __FILE__, __LINE__, error.what());
        return failed;
    }
}

PluginTensorDesc describe(SessionTensor const& tensor)
{
    PluginTensorDesc desc{};
    desc.dims.nbDims = tensor.rank;
    std::copy(tensor.sizes, tensor.sizes + tensor.rank, desc.dims.d);
    desc.type = static_cast<nvinfer1::DataType>(tensor.type);
    desc.format = nvinfer1::TensorFormat::kLINEAR;
    return desc;
}

//! Inputs, and the outputs that the plugin says it has for them.
std::vector<PluginTensorDesc> withOutputs(Plugin const& plugin, SessionTensor const* inputs)
{
    std::vector<PluginTensorDesc> tensors;
    std::vector<Dims> dims;
    std::vector<nvinfer1::DataType> types;
    for (int i = 0; i < gOperator.inputs; ++i)
    {
        tensors.push_back(describe(inputs[i]));
        dims.push_back(tensors.back().dims);
        types.push_back(tensors.back().type);
    }
    nvinfer1::DataType outputTypes[kMAX_OUTPUTS]{};
    CHECK_EQUAL(plugin.build->getOutputDataTypes(outputTypes, gOperator.outputs, types.data(), gOperator.inputs), 0);
    OutputShapes const shapes{plugin, dims};
    CHECK_EQUAL(shapes.status, 0);
    for (int i = 0; i < gOperator.outputs; ++i)
    {
        PluginTensorDesc desc{};
        desc.type = outputTypes[i];
        desc.format = nvinfer1::TensorFormat::kLINEAR;
        desc.dims.nbDims = std::max(shapes.outputs[i].nbDims, 0);
        for (int j = 0; j < desc.dims.nbDims; ++j)
        {
            desc.dims.d[j] = shapes.outputs[i].d[j]->getConstantValue();
        }
        tensors.push_back(desc);
    }
    return tensors;
}

//! What TensorRT's ONNX parser makes of a node's attributes: the fields that the creator names, numbers as they are, and
//! text with its terminator. Others it drops.
HostFields parse(Library const& library, SessionAttribute const* attributes, int32_t count)
{
    HostFields fields;
    nvinfer1::PluginFieldCollection const* const names = library.creator->getFieldNames();
    for (int32_t i = 0; i < names->nbFields; ++i)
    {
        auto const* const found = std::find_if(attributes, attributes + count,
            [&](SessionAttribute const& attribute) { return names->fields[i].name == std::string{attribute.name}; });
        if (found == attributes + count)
        {
            continue;
        }
        if (found->text != nullptr)
        {
            fields.set(found->name, std::string{found->text} + '\0');
        }
        else if (found->isReal != 0)
        {
            fields.set(found->name, found->real);
        }
        else
        {
            fields.set(found->name, found->integer);
        }
    }
    return fields;
}

} // namespace

extern "C"
{

//! What failed since the last call, as lines; empty if nothing did. Valid until the next call.
char const* pluginSessionErrors()
{
    static std::string errors;
    errors = takeErrors();
    return errors.c_str();
}

//! Load the plugin library, by itself or (tensorrt not null) through the plugin registry of that TensorRT.
PluginSession* pluginSessionOpen(char const* library, char const* tensorrt)
{
    takeErrors();
    if (!CHECK(gOpen == nullptr))
    {
        return nullptr;
    }
    gFailures = 0;
    gOpen = new PluginSession;
    PluginSession* const session = guarded<PluginSession*>(nullptr,
        [&]
        {
            bool const loaded = tensorrt == nullptr
                ? load(library, gOpen->logger, gOpen->library)
                : loadThrough(tensorrt, library, gOpen->logger, gOpen->library);
            return loaded ? gOpen : nullptr;
        });
    if (session == nullptr)
    {
        report(false, __FILE__, __LINE__, gOpen->logger.take());
        delete gOpen;
        gOpen = nullptr;
        return nullptr;
    }
    takeErrors(); // which TensorRT it was
    return session;
}

//! All layers must be gone.
void pluginSessionClose(PluginSession* session)
{
    session->library.unload();
    gOpen = nullptr;
    delete session;
}

//! A layer of a network, made from the attributes of its node. The network keeps a clone.
PluginLayer* pluginLayerCreate(
    PluginSession* session, char const* name, SessionAttribute const* attributes, int32_t count)
{
    return guarded<PluginLayer*>(nullptr,
        [&]
        {
            HostFields fields = parse(session->library, attributes, count);
            Plugin const parsed{session->library.creator->createPlugin(
                name, fields.collection(), nvinfer1::TensorRTPhase::kBUILD)};
            return new PluginLayer{*session, name, Plugin{parsed.plugin->clone()}, {}};
        });
}

//! Types and shapes of a layer's outputs.
int32_t pluginLayerOutputs(PluginLayer const* layer, SessionTensor const* inputs, SessionTensor* outputs)
{
    return guarded<int32_t>(-1,
        [&]
        {
            auto const tensors = withOutputs(layer->plugin, inputs);
            for (int i = 0; i < gOperator.outputs; ++i)
            {
                PluginTensorDesc const& desc = tensors[gOperator.inputs + i];
                outputs[i].type = static_cast<int32_t>(desc.type);
                outputs[i].rank = desc.dims.nbDims;
                std::copy(desc.dims.d, desc.dims.d + desc.dims.nbDims, outputs[i].sizes);
            }
            return 0;
        });
}

//! Build for calls of these sizes: gOperator.inputs tensors with -1 where sizes are dynamic, the smallest and the largest.
//! \return The workspace that the layer asks for, in bytes; 0 on failure.
size_t pluginLayerConfigure(
    PluginLayer const* layer, SessionTensor const* dynamic, SessionTensor const* smallest, SessionTensor const* largest)
{
    return guarded<size_t>(0,
        [&]
        {
            auto const descs = withOutputs(layer->plugin, dynamic);
            auto const least = withOutputs(layer->plugin, smallest);
            auto const most = withOutputs(layer->plugin, largest);
            std::vector<nvinfer1::DynamicPluginTensorDesc> tensors(gOperator.inputs + gOperator.outputs);
            for (int i = 0; i < gOperator.inputs + gOperator.outputs; ++i)
            {
                tensors[i].desc = descs[i];
                tensors[i].min = least[i].dims;
                tensors[i].opt = tensors[i].max = most[i].dims;
            }
            return configure(layer->plugin, tensors);
        });
}

//! The layer of an execution context: built, saved in an engine, loaded, and attached.
PluginLayer* pluginLayerAttach(PluginLayer const* built)
{
    return guarded<PluginLayer*>(nullptr,
        [&]
        {
            PluginSession& session = built->session;
            Plugin const loaded = reload(session.library, built->plugin, built->name.c_str());
            return new PluginLayer{
                session, built->name, Plugin{loaded.runtime->attachToContext(&session.context)}, {}};
        });
}

//! Sizes of calls from now on.
int32_t pluginLayerResize(PluginLayer* layer, SessionTensor const* inputs)
{
    return guarded<int32_t>(-1,
        [&]
        {
            layer->tensors = withOutputs(layer->plugin, inputs);
            auto const* const tensors = layer->tensors.data();
            CHECK_EQUAL(layer->plugin.runtime->onShapeChange(tensors, gOperator.inputs, tensors + gOperator.inputs, gOperator.outputs), 0);
            return 0;
        });
}

//! Order the layer on a stream.
int32_t pluginLayerEnqueue(
    PluginLayer* layer, void const* const* inputs, void* const* outputs, void* workspace, void* stream)
{
    auto const* const tensors = layer->tensors.data();
    return layer->plugin.runtime->enqueue(
        tensors, tensors + gOperator.inputs, inputs, outputs, workspace, static_cast<cudaStream_t>(stream));
}

void pluginLayerDestroy(PluginLayer* layer)
{
    delete layer;
}

} // extern "C"
