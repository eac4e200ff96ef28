// All of the plugin's interfaces up to enqueue, every return code checked.
#include "plugin_host.h"
#include "plugin_host_check.h"

#include <functional>
#include <tuple>

using nvinfer1::DataType;
using nvinfer1::TensorRTPhase;

namespace
{

constexpr DataType kFLOAT_TYPES[] = {DataType::kHALF, DataType::kBF16, DataType::kFLOAT};
constexpr DataType kOTHER_TYPES[] = {DataType::kINT8, DataType::kINT64, DataType::kBOOL, DataType::kFP8};

//! Whether what was logged contains a text; prints it if not.
bool logged(HostLogger& logger, std::string const& text, int line)
{
    std::string const found = logger.take();
    return report(found.find(text) != std::string::npos, __FILE__, line, "logged '" + found + "', not '" + text + "'");
}

#define CHECK_LOGGED(text) logged(logger, text, __LINE__)

Plugin create(Library const& library, HostFields fields, TensorRTPhase phase = TensorRTPhase::kBUILD)
{
    return Plugin{library.creator->createPlugin("layer", fields.collection(), phase)};
}

void checkCreator(Library const& library)
{
    CHECK_EQUAL(std::string{library.creator->getPluginName()}, "HipAttention");
    CHECK_EQUAL(std::string{library.creator->getPluginVersion()}, std::string{gOperator.pluginVersion});
    CHECK_EQUAL(std::string{library.creator->getPluginNamespace()}, "");
    nvinfer1::PluginFieldCollection const* const advertised = library.creator->getFieldNames();
    HostFields good = goodFields();
    CHECK_EQUAL(advertised->nbFields, good.collection()->nbFields);
    for (int32_t i = 0; i < advertised->nbFields; ++i)
    {
        bool found = false;
        for (int32_t j = 0; j < good.collection()->nbFields; ++j)
        {
            nvinfer1::PluginField const& field = good.collection()->fields[j];
            found |=
                std::strcmp(field.name, advertised->fields[i].name) == 0 && field.type == advertised->fields[i].type;
        }
        report(found, __FILE__, __LINE__, std::string{"unexpected field: "} + advertised->fields[i].name);
    }
}

void checkFields(Library const& library, HostLogger& logger)
{
    using Change = std::function<void(HostFields&)>;
    auto const integer = [](char const* name, int32_t value)
    { return Change{[=](HostFields& fields) { fields.set(name, value); }}; };
    bool const first = gOperator.format == HIP_TRT_OPERATOR_VERSION;
    std::vector<std::pair<Change, std::string>> bad{
        {integer("mask_k", 0), "mask_k: 0 is not allowed"},
        {integer("mask_k", 100), "mask_k: 100 is not allowed; it must be a multiple of block_k (16)"},
        {integer("block_q", 3), "block_q: 3 is not allowed; it must be a power of two"},
        {integer("block_k", 12), "block_k: 12 is not allowed; it must be a power of two"},
        {integer("stride_q", 3), "stride_q: 3 is not allowed; it must be a divisor of block_q (16)"},
        {integer("stride_k", 5), "stride_k: 5 is not allowed; it must be a divisor of block_k (16)"},
        {integer("branch", 1), "branch: 1 is not allowed"},
        {integer("leaf_branch", 17), "leaf_branch: 17 is not allowed"},
        {integer("sink_tokens", -1), "sink_tokens: -1 is not allowed"},
        {integer("window_tokens", 0), "window_tokens: 0 is not allowed"},
        {integer("dense", 2), "dense: 2 is not allowed"},
        {[](HostFields& fields) { fields.set("mask_heads", std::string{"both"}); },
            "mask_heads: 'both' is not allowed; it must be 'kv' or 'query'"},
        {[](HostFields& fields) { fields.set("scale", 1.0F / 0.0F); }, "scale: inf is not allowed"},
        {[](HostFields& fields) { fields.set("mask_k", 128.0F); }, "mask_k: 1 value(s) float32 are not allowed"},
        {[](HostFields& fields) { fields.set("scale", 1); }, "scale: 1 value(s) int32 are not allowed"},
        {[](HostFields& fields) { fields.set("mask_heads", 1); }, "mask_heads: 1 value(s) int32 are not allowed"},
        {[](HostFields& fields) { fields.remove("branch"); }, "branch: is missing"},
        {[](HostFields& fields) { fields.remove("scale"); }, "scale: is missing"},
        {[](HostFields& fields) { fields.remove("mask_heads"); }, "mask_heads: is missing"},
        {[](HostFields& fields) { fields.repeat("branch"); }, "branch: is given more than once"},
        {integer("tile", 4), "tile: no such field"},
        // Another version of the operator: not a field of an ONNX node.
        {[](HostFields& fields) { fields.set("hip_trt_version", std::string{"0"}); }, "hip_trt_version: no such field"},
    };
    if (first)
    {
        bad.insert(bad.end(),
            {{integer("decode_mask_k", 24), "decode_mask_k: 24 is not allowed; it must be a multiple of block_k (16)"},
                {integer("reuse_level", 2), "reuse_level: 2 is not allowed"},
                {integer("page_size", 24), "page_size: 24 is not allowed; it must be a multiple of block_k (16)"},
                {integer("decode_block_k", 16), "decode_block_k: no such field"}});
    }
    else
    {
        bad.insert(bad.end(),
            {{integer("decode_mask_k", 24),
                 "decode_mask_k: 24 is not allowed; it must be a multiple of decode_block_k (16)"},
                {integer("decode_search_k", 32), "decode_search_k: 32 is not allowed; it must be 64 to"},
                {integer("decode_block_k", 24), "decode_block_k: 24 is not allowed; it must be a power of two"},
                {integer("page_size", 24),
                    "page_size: 24 is not allowed; it must be a multiple of decode_block_k (16)"},
                {integer("value_threshold", 0), "value_threshold: 1 value(s) int32 are not allowed"},
                {[](HostFields& fields) { fields.remove("decode_search_k"); }, "decode_search_k: is missing"},
                {integer("reuse_level", 1), "reuse_level: no such field"}});
    }
    for (auto const& [change, message] : bad)
    {
        HostFields fields = goodFields();
        change(fields);
        std::unique_ptr<nvinfer1::IPluginV3> const plugin{
            library.creator->createPlugin("layer", fields.collection(), TensorRTPhase::kBUILD)};
        report(plugin == nullptr, __FILE__, __LINE__, "accepted: " + message);
        CHECK_LOGGED("HipAttention (layer): " + message);
    }
    CHECK(library.creator->createPlugin("layer", nullptr, TensorRTPhase::kBUILD) == nullptr);
    CHECK_LOGGED("no fields were given");

    HostFields fields = goodFields();
    fields.reverse();
    create(library, fields);
    fields.set("mask_heads", std::string{"query\0", 6}); // some callers count the terminator
    create(library, fields);
    CHECK_EQUAL(logger.take(), "");
}

void checkCopies(Library const& library, HostLogger& logger)
{
    HostFields const fields = goodFields();
    Plugin original = create(library, fields);
    CHECK_EQUAL(std::string{original.core->getPluginName()}, library.creator->getPluginName());
    CHECK_EQUAL(std::string{original.core->getPluginVersion()}, library.creator->getPluginVersion());
    CHECK_EQUAL(std::string{original.core->getPluginNamespace()}, library.creator->getPluginNamespace());
    CHECK_EQUAL(original.build->getNbOutputs(), gOperator.outputs);
    std::string const description = original.build->getMetadataString();
    CHECK(
        description.find("mask_k=128 ") != std::string::npos && description.find("mask_heads=kv") != std::string::npos);

    for (int32_t output = 0; output < gOperator.outputs; ++output)
    {
        CHECK_EQUAL(original.build->getAliasedInput(output), -1);
    }

    // A context's plugin must work when those that it came from are gone.
    HostResourceContext context;
    Plugin clone{original.plugin->clone()};
    original.plugin.reset();
    Plugin attached{clone.runtime->attachToContext(&context)};
    clone.plugin.reset();
    CHECK_EQUAL(std::string{attached.build->getMetadataString()}, description);

    // What an engine keeps makes the same plugin again.
    HostFields serialized{*attached.runtime->getFieldsToSerialize()};
    attached.plugin.reset();
    Plugin loaded = create(library, serialized, TensorRTPhase::kRUNTIME);
    CHECK_EQUAL(std::string{loaded.build->getMetadataString()}, description);
    CHECK_EQUAL(logger.take(), "");

    // Another hip-trt's engine runs; one that computes another operator does not.
    serialized.set("hip_trt_version", std::string{"0.0.7"});
    CHECK_EQUAL(
        std::string{create(library, serialized, TensorRTPhase::kRUNTIME).build->getMetadataString()}, description);
    CHECK_EQUAL(logger.take(), "");
    serialized.set("operator_version", int32_t{gOperator.format + 1});
    CHECK(library.creator->createPlugin("layer", serialized.collection(), TensorRTPhase::kRUNTIME) == nullptr);
    std::string const thisOne = "; this is hip-trt " + std::string{library.version()} + ", which reads format "
        + std::to_string(gOperator.format) + ". Export it again with `hip-trt export`.";
    CHECK_LOGGED("made by hip-trt 0.0.7 in format " + std::to_string(gOperator.format + 1) + thisOne);
    serialized.remove("operator_version");
    CHECK(library.creator->createPlugin("layer", serialized.collection(), TensorRTPhase::kRUNTIME) == nullptr);
    CHECK_LOGGED("made by hip-trt 0.0.7 in format none" + thisOne);
}

void checkTypes(Library const& library, HostLogger& logger)
{
    Plugin plugin = create(library, goodFields());
    DataType outputs[kMAX_OUTPUTS];
    Geometry geometry;
    for (DataType const type : kFLOAT_TYPES)
    {
        geometry.type = type;
        std::vector<DataType> const types = geometry.types();
        CHECK_EQUAL(plugin.build->getOutputDataTypes(outputs, gOperator.outputs, types.data(), gOperator.inputs), 0);
        CHECK(std::equal(outputs, outputs + gOperator.outputs, types.begin() + gOperator.inputs));
    }
    CHECK_EQUAL(logger.take(), "");
    for (auto const& [position, type, message] : {
             std::tuple{0, DataType::kINT32, "query: int32 is not allowed; it must be float16, bfloat16 or float32"},
             std::tuple{3, DataType::kHALF, "past_key: float16 is not allowed; it must be float32"},
             std::tuple{5, DataType::kINT64, "page_table: int64 is not allowed; it must be int32"},
         })
    {
        std::vector<DataType> types = Geometry{}.types();
        types[position] = type;
        CHECK(plugin.build->getOutputDataTypes(outputs, gOperator.outputs, types.data(), gOperator.inputs) != 0);
        CHECK_LOGGED(message);
    }
    CHECK(plugin.build->getOutputDataTypes(
              outputs, gOperator.outputs, geometry.types().data(), gOperator.inputs - 1)
        != 0);
    std::string const outputCount = std::to_string(gOperator.outputs);
    CHECK_LOGGED("has " + std::to_string(gOperator.inputs - 1) + " inputs and " + outputCount
        + " outputs; it must have " + std::to_string(gOperator.inputs) + " and " + outputCount);
}

void checkFormats(Library const& library)
{
    Plugin plugin = create(library, goodFields());
    auto const supported = [&](int position, std::vector<nvinfer1::DynamicPluginTensorDesc> const& tensors)
    { return plugin.build->supportsFormatCombination(position, tensors.data(), gOperator.inputs, gOperator.outputs); };
    for (DataType const type : kFLOAT_TYPES)
    {
        Geometry geometry;
        geometry.type = type;
        for (int position = 0; position < gOperator.inputs + gOperator.outputs; ++position)
        {
            auto tensors = geometry.dynamicTensors();
            CHECK(supported(position, tensors));
            for (DataType const other : kFLOAT_TYPES)
            {
                tensors[position].desc.type = other;
                // query decides; the others follow it.
                CHECK_EQUAL(supported(position, tensors), position == 0 || other == geometry.types()[position]);
            }
            for (DataType const other : kOTHER_TYPES)
            {
                tensors[position].desc.type = other;
                CHECK(!supported(position, tensors));
            }
            tensors[position].desc.type = DataType::kINT32;
            CHECK_EQUAL(supported(position, tensors), geometry.types()[position] == DataType::kINT32);
            tensors[position].desc.type = geometry.types()[position];
            for (auto const format : {nvinfer1::TensorFormat::kCHW2, nvinfer1::TensorFormat::kHWC8,
                     nvinfer1::TensorFormat::kCHW32, nvinfer1::TensorFormat::kHWC})
            {
                tensors[position].desc.format = format;
                CHECK(!supported(position, tensors));
            }
        }
    }
}

void checkDynamicShapes(Library const& library)
{
    Geometry geometry;
    geometry.batch = geometry.newTokens = geometry.pages = geometry.pageSlots = geometry.kind = -1; // known at run time
    checkShapes(create(library, goodFields()), geometry);
}

void checkGeometry(Library const& library, HostLogger& logger)
{
    Plugin plugin = create(library, goodFields());
    auto const configure = [&](std::vector<nvinfer1::DynamicPluginTensorDesc> const& tensors)
    {
        return plugin.build->configurePlugin(
            tensors.data(), gOperator.inputs, tensors.data() + gOperator.inputs, gOperator.outputs);
    };
    auto const change = [&](std::vector<nvinfer1::PluginTensorDesc> const& tensors)
    {
        return plugin.runtime->onShapeChange(
            tensors.data(), gOperator.inputs, tensors.data() + gOperator.inputs, gOperator.outputs);
    };
    Geometry decode;
    decode.newTokens = 1;
    decode.kind = HIP_TRT_DECODE;
    CHECK_EQUAL(configure(Geometry{}.dynamicTensors()), 0);
    CHECK_EQUAL(change(Geometry{}.tensors()), 0);
    CHECK_EQUAL(change(decode.tensors()), 0);
    CHECK_EQUAL(logger.take(), "");

    auto const with = [](int64_t Geometry::* size, int64_t value)
    {
        Geometry geometry;
        geometry.*size = value;
        return geometry;
    };
    bool const first = gOperator.format == HIP_TRT_OPERATOR_VERSION;
    std::string const kept = first ? "past_nodes" : "past_blocks", keptSize = first ? "Kd" : "K";
    std::vector<std::pair<Geometry, std::string>> bad{
        {with(&Geometry::headDim, 60), "head_dim: 60 is not supported"},
        {with(&Geometry::headDim, 1024), "head_dim: 1024 is not supported"},
        {with(&Geometry::queryHeads, 5),
            "num_query_heads: 5 is not allowed; it must be a multiple of num_kv_heads (2)"},
        {with(&Geometry::pageSize, 32),
            "past_key: shape [7, 2, 32, 64] is not allowed; it must be [P, Hkv, page_size, D], where page_size is 16"},
        {with(&Geometry::nodes, 5),
            kept + ": shape [2, 2, 5] is not allowed; it must be [B, Hm, " + keptSize + "], where " + keptSize
                + " is 4"},
        {with(&Geometry::masks, 4),
            kept + ": shape [2, 4, 4] is not allowed; it must be [B, Hm, " + keptSize + "], where Hm is 2"},
        {with(&Geometry::pages, int64_t{1} << 31), "past_key: P is 2147483648; it must fit in 32 bits"},
    };
    if (!first)
    {
        Geometry rows = decode;
        rows.newTokens = 9;
        bad.insert(bad.end(),
            {{with(&Geometry::pageBlocks, 2),
                 "past_bounds: shape [7, 2, 2, 2, 64] is not allowed; it must be [P, Hkv, page_size / decode_block_k, "
                 "2, D], where page_size / decode_block_k is 1"},
                {with(&Geometry::kind, 3), "call_kind: shape [3] is not allowed; it must be [1] or [2]"},
                {rows, "new_tokens: 9 is not allowed; it must be 0 to 8"}});
    }
    for (auto const& [geometry, message] : bad)
    {
        CHECK(configure(geometry.dynamicTensors()) != 0);
        CHECK_LOGGED(message);
        CHECK(change(geometry.tensors()) != 0);
        CHECK_LOGGED(message);
    }

    auto tensors = Geometry{}.dynamicTensors();
    tensors[1].desc.dims.d[1] = tensors[1].max.d[1] = -1;
    CHECK(configure(tensors) != 0);
    CHECK_LOGGED("key: Hkv is dynamic; it must be fixed when the engine is built");
    if (!first)
    {
        // One profile of both kinds: the rows are a prefill's, and each call is held to its own kind.
        tensors = with(&Geometry::newTokens, 9).dynamicTensors();
        tensors[12].max.d[0] = HIP_TRT_DECODE;
        CHECK_EQUAL(configure(tensors), 0);
        CHECK_EQUAL(logger.take(), "");
    }
    tensors = Geometry{}.dynamicTensors();
    tensors[6].max.nbDims = 2;
    CHECK(configure(tensors) != 0);
    CHECK_LOGGED("past_lengths: shape [2, 0] is not allowed; it must be [B]");
    CHECK(plugin.build->configurePlugin(tensors.data(), gOperator.inputs, tensors.data() + gOperator.inputs, 3) != 0);
    CHECK_LOGGED("has " + std::to_string(gOperator.inputs) + " inputs and 3 outputs");

    // Allowed as values, but more than the kernels hold: refused as soon as it is known, when the engine is built.
    HostFields fields = goodFields();
    fields.set("mask_k", 1 << 22);
    Plugin large = create(library, fields);
    tensors = Geometry{}.dynamicTensors();
    CHECK(large.build->configurePlugin(
              tensors.data(), gOperator.inputs, tensors.data() + gOperator.inputs, gOperator.outputs)
        != 0);
    CHECK_LOGGED("mask_k: 4194304 is not supported");
}

void checkWorkspace(Library const& library)
{
    Plugin plugin = create(library, goodFields());
    auto const workspace = [&](Geometry const& geometry)
    {
        auto const tensors = geometry.dynamicTensors();
        return plugin.build->getWorkspaceSize(
            tensors.data(), gOperator.inputs, tensors.data() + gOperator.inputs, gOperator.outputs);
    };
    Geometry large;
    large.batch = 8;
    large.newTokens = 4096;
    large.pageSlots = 1024;
    large.pages = 8192;
    HipTrtShape const shape{HIP_TRT_FLOAT32, 8, 4096, 4, 2, 64, 8192, 1024};
    size_t expected = 0;
    if (gOperator.format == HIP_TRT_OPERATOR_VERSION)
    {
        HipTrtConfig const config{128, 64, 16, 16, 4, 1, 4, 8, 1, 16, 16, 32, 0, 0, 0.125F};
        CHECK_EQUAL(library.workspaceSize(&config, &shape, &expected), HIP_TRT_SUCCESS);
    }
    else
    {
        HipTrtV2Config const config{128, 16, 16, 4, 1, 4, 8, 64, 256, 16, 16, 16, 32, 0, 0, 0.0F, 0.125F};
        CHECK_EQUAL(library.workspaceSizeV2(&config, &shape, HIP_TRT_PREFILL, &expected), HIP_TRT_SUCCESS);
        Geometry decode = large;
        decode.newTokens = 8;
        decode.kind = HIP_TRT_DECODE;
        HipTrtShape rows = shape;
        rows.new_tokens = 8;
        size_t ofDecode = 0;
        CHECK_EQUAL(library.workspaceSizeV2(&config, &rows, HIP_TRT_DECODE, &ofDecode), HIP_TRT_SUCCESS);
        CHECK_EQUAL(workspace(decode), ofDecode);
        auto both = large.dynamicTensors();
        both[12].max.d[0] = HIP_TRT_DECODE;
        CHECK_EQUAL(plugin.build->getWorkspaceSize(
                        both.data(), gOperator.inputs, both.data() + gOperator.inputs, gOperator.outputs),
            std::max(expected, ofDecode));
    }
    CHECK_EQUAL(workspace(large), expected);
    CHECK(expected > 0);
    CHECK(workspace(Geometry{}) < expected);
}

//! A call that cannot be made is refused before the GPU is touched, and not only by a return code.
void checkRefusedCall(Library const& library, HostLogger& logger)
{
    Plugin plugin = create(library, goodFields());
    auto const tensors = Geometry{}.tensors();
    std::vector<void const*> const inputs(gOperator.inputs);
    std::vector<void*> const outputs(gOperator.outputs);
    CHECK(plugin.runtime->enqueue(tensors.data(), tensors.data() + gOperator.inputs, inputs.data(), outputs.data(),
              nullptr, nullptr)
        != 0);
    CHECK_LOGGED("HipAttention (layer): ");
    Geometry wrong;
    wrong.pageSize = 32;
    CHECK(plugin.runtime->enqueue(
              wrong.tensors().data(), nullptr, inputs.data(), outputs.data(), nullptr, nullptr)
        != 0);
    CHECK_LOGGED("past_key: shape [7, 2, 32, 64] is not allowed");
}

} // namespace

void checkInterfaces(Library const& library, HostLogger& logger)
{
    checkCreator(library);
    checkFields(library, logger);
    checkCopies(library, logger);
    checkTypes(library, logger);
    checkFormats(library);
    checkDynamicShapes(library);
    checkGeometry(library, logger);
    checkWorkspace(library);
    checkRefusedCall(library, logger);
    CHECK_EQUAL(logger.take(), "");
}
