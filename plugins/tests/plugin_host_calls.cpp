// Calls given on standard input, each taken through a layer's whole life: created, cloned, configured, serialized,
// loaded, attached to a context and executed. What a call must return, the Python tests know (tests/plugin_host.py).
//
// A call is lines of text, then the bytes of its tensors:
//
//   field int|float|text NAME VALUE        for each attribute
//   tensor float16|bfloat16|float32|int32 RANK SIZES...    for each input, in the operator's order
//   result own|past        for each result: memory of its own, or that of the input that it is like
//   call
//   <bytes of each input, then what each result with memory of its own holds before the call>
//
// The answer is the line "done", and the bytes of each result; or the line "failed", after messages on standard error.
#include "plugin_host.h"
#include "plugin_host_check.h"
#include "plugin_host_device.h"

#include <algorithm>
#include <iostream>
#include <map>
#include <optional>
#include <stdexcept>

using nvinfer1::DataType;
using nvinfer1::TensorRTPhase;

namespace
{

constexpr size_t kGUARD = 256; // bytes before and after every tensor that must not change; keeps tensors aligned
constexpr int kGUARD_BYTE = 0x99;

using Bytes = std::vector<char>;

std::map<std::string, DataType> const kTYPES{{"float16", DataType::kHALF}, {"bfloat16", DataType::kBF16},
    {"float32", DataType::kFLOAT}, {"int32", DataType::kINT32}};

struct Tensor
{
    DataType type;
    std::vector<int64_t> shape;
    Bytes bytes;

    //! In bytes.
    size_t size() const
    {
        size_t size = type == DataType::kHALF || type == DataType::kBF16 ? 2 : 4;
        for (int64_t const dim : shape)
        {
            size *= static_cast<size_t>(dim);
        }
        return size;
    }
};

struct Call
{
    HostFields fields;
    std::vector<Tensor> inputs;
    std::vector<bool> onPast; // of each result
    std::vector<Bytes> before; // of each result

    //! The layer and call that the inputs' shapes describe.
    Geometry geometry() const
    {
        Geometry g;
        auto const& query = inputs[0].shape;
        auto const& pool = inputs[3].shape;
        g.batch = query[0];
        g.queryHeads = query[1];
        g.newTokens = query[2];
        g.headDim = query[3];
        g.pages = pool[0];
        g.kvHeads = pool[1];
        g.pageSize = pool[2];
        g.pageSlots = inputs[5].shape[1];
        g.masks = inputs[gOperator.kept].shape[1];
        g.nodes = inputs[gOperator.kept].shape[2];
        if (gOperator.format != HIP_TRT_OPERATOR_VERSION)
        {
            g.pageBlocks = inputs[8].shape[2];
            g.kind = inputs[12].shape[0];
        }
        g.type = inputs[0].type;
        return g;
    }
};

Bytes readBytes(std::istream& in, size_t count)
{
    Bytes bytes(count);
    in.read(bytes.data(), static_cast<std::streamsize>(count));
    return bytes;
}

void setField(HostFields& fields, std::string const& type, std::string const& name, std::string const& value)
{
    if (type == "int")
    {
        fields.set(name, std::stoi(value));
    }
    else if (type == "float")
    {
        fields.set(name, std::stof(value));
    }
    else
    {
        fields.set(name, value);
    }
}

//! The next call, or nothing at the end.
std::optional<Call> read(std::istream& in)
{
    Call call;
    for (std::string line; std::getline(in, line);)
    {
        std::istringstream words{line};
        std::string kind, type, name;
        words >> kind >> type;
        if (kind == "field" && words >> name >> std::ws)
        {
            std::string value;
            std::getline(words, value);
            setField(call.fields, type, name, value);
        }
        else if (kind == "tensor")
        {
            Tensor tensor{kTYPES.at(type), {}, {}};
            size_t rank = 0;
            words >> rank;
            tensor.shape.resize(rank);
            for (int64_t& size : tensor.shape)
            {
                words >> size;
            }
            call.inputs.push_back(std::move(tensor));
        }
        else if (kind == "result")
        {
            call.onPast.push_back(type == "past");
        }
        else if (kind == "call" && call.inputs.size() == static_cast<size_t>(gOperator.inputs)
            && call.onPast.size() == static_cast<size_t>(gOperator.outputs))
        {
            for (Tensor& tensor : call.inputs)
            {
                tensor.bytes = readBytes(in, tensor.size());
            }
            for (int i = 0; i < gOperator.outputs; ++i)
            {
                Tensor const& like = call.inputs[gOperator.resultLike[i]];
                call.before.push_back(call.onPast[i] ? like.bytes : readBytes(in, like.size()));
            }
            return CHECK(in.good()) ? std::optional<Call>{std::move(call)} : std::nullopt;
        }
        else
        {
            CHECK_EQUAL(line, "a line of a call");
            return std::nullopt;
        }
    }
    return std::nullopt;
}

//! A tensor on the device, with bytes around it that must not change.
class Buffer
{
public:
    explicit Buffer(size_t size)
        : mSize{size}
        , mMemory{static_cast<char*>(device::allocate(size + 2 * kGUARD))}
    {
        device::fill(mMemory, kGUARD_BYTE, size + 2 * kGUARD);
    }

    Buffer(Buffer const&) = delete;
    Buffer& operator=(Buffer const&) = delete;

    ~Buffer()
    {
        device::release(mMemory);
    }

    void* data() const
    {
        return mMemory + kGUARD;
    }

    void write(Bytes const& bytes) const
    {
        device::copy(data(), bytes.data(), mSize);
    }

    void fill(int byte) const
    {
        device::fill(data(), byte, mSize);
    }

    //! What it holds; also checks its guards.
    Bytes read(std::string const& name) const
    {
        Bytes all(mSize + 2 * kGUARD);
        device::copy(all.data(), mMemory, all.size());
        Bytes const guard(kGUARD, static_cast<char>(kGUARD_BYTE));
        report(std::equal(guard.begin(), guard.end(), all.begin())
                && std::equal(guard.begin(), guard.end(), all.end() - kGUARD),
            __FILE__, __LINE__, name + " was written out of bounds");
        return {all.begin() + kGUARD, all.end() - kGUARD};
    }

private:
    size_t mSize;
    char* mMemory;
};

//! A layer as an engine's execution context has it.
struct Layer
{
    HostResourceContext context;
    std::optional<Plugin> plugin;
    size_t workspaceSize{0};
};

//! What a builder does with a layer, then a runtime. Each plugin is gone before the one made from it is used.
void bringUp(Library const& library, Call& call, Layer& layer)
{
    Geometry const geometry = call.geometry();
    std::optional<Plugin> plugin;
    plugin.emplace(library.creator->createPlugin("layer", call.fields.collection(), TensorRTPhase::kBUILD));
    plugin.emplace(plugin->plugin->clone());

    auto const types = geometry.types();
    DataType outputTypes[kMAX_OUTPUTS];
    CHECK_EQUAL(plugin->build->getOutputDataTypes(outputTypes, gOperator.outputs, types.data(), gOperator.inputs), 0);
    CHECK(std::equal(outputTypes, outputTypes + gOperator.outputs, types.begin() + gOperator.inputs));
    checkShapes(*plugin, geometry);
    // An engine is built for calls larger than this one.
    Geometry largest = geometry;
    largest.batch += 1;
    bool const single = gOperator.format == HIP_TRT_OPERATOR_VERSION && geometry.newTokens == 1;
    largest.newTokens = single ? 1 : geometry.kind == HIP_TRT_DECODE ? 8 : geometry.newTokens + 7;
    largest.pages += 3;
    largest.pageSlots += 2;
    layer.workspaceSize = configure(*plugin, largest.dynamicTensors());

    plugin.emplace(reload(library, *plugin, "layer"));
    layer.plugin.emplace(plugin->runtime->attachToContext(&layer.context));
    plugin.reset();
    auto const tensors = geometry.tensors();
    CHECK_EQUAL(layer.plugin->runtime->onShapeChange(
                    tensors.data(), gOperator.inputs, tensors.data() + gOperator.inputs, gOperator.outputs),
        0);
}

//! Execute a call once on a stream, and twice more from a CUDA graph.
//! \return The results, or nothing where a check failed.
std::vector<Bytes> execute(Layer const& layer, Call const& call)
{
    std::vector<std::unique_ptr<Buffer>> inputs, own;
    std::vector<Buffer const*> results;
    std::vector<void const*> inputAddresses;
    std::vector<void*> resultAddresses;
    for (Tensor const& tensor : call.inputs)
    {
        inputs.push_back(std::make_unique<Buffer>(tensor.size()));
        inputAddresses.push_back(inputs.back()->data());
    }
    for (int i = 0; i < gOperator.outputs; ++i)
    {
        if (!call.onPast[i])
        {
            own.push_back(std::make_unique<Buffer>(call.before[i].size()));
        }
        results.push_back(call.onPast[i] ? inputs[gOperator.resultLike[i]].get() : own.back().get());
        resultAddresses.push_back(results.back()->data());
    }
    Buffer const workspace{layer.workspaceSize};

    auto const tensors = call.geometry().tensors();
    auto const enqueue = [&](cudaStream_t stream)
    {
        CHECK_EQUAL(layer.plugin->runtime->enqueue(tensors.data(), tensors.data() + gOperator.inputs,
                        inputAddresses.data(), resultAddresses.data(), workspace.data(), stream),
            0);
    };
    auto const prepare = [&](int workspaceByte)
    {
        for (int i = 0; i < gOperator.inputs; ++i)
        {
            inputs[i]->write(call.inputs[i].bytes);
        }
        for (int i = 0; i < gOperator.outputs; ++i)
        {
            results[i]->write(call.before[i]);
        }
        workspace.fill(workspaceByte); // nothing may depend on what it holds
    };
    auto const found = [&]
    {
        std::vector<Bytes> bytes;
        for (int i = 0; i < gOperator.outputs; ++i)
        {
            bytes.push_back(results[i]->read("result " + std::to_string(i)));
        }
        for (int i = 0; i < gOperator.inputs; ++i)
        {
            bool const written = std::find(results.begin(), results.end(), inputs[i].get()) != results.end();
            Bytes const after = inputs[i]->read("input " + std::to_string(i));
            report(written || after == call.inputs[i].bytes, __FILE__, __LINE__,
                "input " + std::to_string(i) + " was changed");
        }
        workspace.read("workspace");
        return bytes;
    };

    prepare(0xFF); // NaN, or -1
    device::run(enqueue);
    std::vector<Bytes> const first = found();
    device::replay(enqueue, [&] { prepare(0x3C); }, 2); // around 1 in both types of two bytes
    CHECK(found() == first);
    return first;
}

} // namespace

void runCalls(Library const& library, HostLogger& logger)
{
    std::ios::sync_with_stdio(false);
    if (!device::available())
    {
        return;
    }
    while (std::optional<Call> call = read(std::cin))
    {
        int const failures = gFailures;
        std::vector<Bytes> results;
        Layer layer;
        try
        {
            bringUp(library, *call, layer);
            results = gFailures == failures ? execute(layer, *call) : results;
        }
        catch (std::runtime_error const&)
        {
            // A plugin was not made; that was reported.
        }
        CHECK_EQUAL(logger.take(), "");
        bool const good = gFailures == failures;
        std::cout << (good ? "done\n" : "failed\n");
        for (Bytes const& bytes : results)
        {
            if (good)
            {
                std::cout.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
            }
        }
        std::cout.flush();
        std::fflush(stderr);
    }
}
