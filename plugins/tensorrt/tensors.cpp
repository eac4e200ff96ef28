#include "tensors.h"

#include "logging.h"

#include <algorithm>
#include <iterator>
#include <limits>

namespace hip_trt
{
namespace
{

using nvinfer1::DataType;
using nvinfer1::Dims;

struct AxisRule
{
    char const* name;
    bool fixed; // must be known when the engine is built
};

constexpr AxisRule kAXIS[kAXES] = {{"B", false}, {"Hq", true}, {"Hkv", true}, {"S", false}, {"D", true}, {"P", false},
    {"M", false}, {"page_size", true}, {"Hm", true}, {"", true}, {"page_size / decode_block_k", true}, {"D / 16", true},
    {"1 or 2", false}, {"1", true}, {"2", true}};

char const* axisName(Signature const& signature, Axis axis)
{
    return axis == kKEPT ? signature.keptName : kAXIS[axis].name;
}

std::string text(Dims const& dims)
{
    std::string line = "[";
    for (int32_t i = 0; i < std::min(dims.nbDims, Dims::MAX_DIMS); ++i)
    {
        line += concat(i == 0 ? "" : ", ", dims.d[i]);
    }
    return line + "]";
}

std::string text(Signature const& signature, TensorLayout const& layout)
{
    std::string line = "[";
    for (int32_t i = 0; i < layout.rank; ++i)
    {
        line += concat(i == 0 ? "" : ", ", axisName(signature, layout.axes[i]));
    }
    return line + "]";
}

} // namespace

char const* tensorName(Signature const& signature, int32_t position)
{
    return position < signature.nbInputs ? signature.inputs[position].name
                                         : signature.outputNames[position - signature.nbInputs];
}

bool isFloatTensor(Signature const& signature, int32_t position)
{
    int32_t const like
        = position < signature.nbInputs ? position : signature.outputLike[position - signature.nbInputs];
    return signature.inputs[like].isFloat;
}

std::optional<HipTrtDataType> floatType(DataType type)
{
    switch (type)
    {
    case DataType::kHALF: return HIP_TRT_FLOAT16;
    case DataType::kBF16: return HIP_TRT_BFLOAT16;
    case DataType::kFLOAT: return HIP_TRT_FLOAT32;
    default: return std::nullopt;
    }
}

char const* typeName(DataType type)
{
    switch (type)
    {
    case DataType::kFLOAT: return "float32";
    case DataType::kHALF: return "float16";
    case DataType::kBF16: return "bfloat16";
    case DataType::kINT8: return "int8";
    case DataType::kINT32: return "int32";
    case DataType::kINT64: return "int64";
    case DataType::kBOOL: return "bool";
    default: return "another type";
    }
}

std::optional<CallShape> readShape(Signature const& signature, AttributeSizes const& known, DataType type,
    Dims const* const* dims, std::string& message)
{
    std::optional<HipTrtDataType> const element = floatType(type);
    if (!element)
    {
        message = concat("query: ", typeName(type), " is not allowed; it must be float16, bfloat16 or float32");
        return std::nullopt;
    }

    int64_t sizes[kAXES];
    std::fill(std::begin(sizes), std::end(sizes), -1);
    sizes[kPAGE_SIZE] = known.pageSize;
    sizes[kKEPT] = known.kept;
    sizes[kBLOCKS] = known.blocksPerPage;
    sizes[kONE] = 1;
    sizes[kTWO] = 2;
    for (int32_t i = 0; i < signature.nbInputs; ++i)
    {
        TensorLayout const& layout = signature.inputs[i];
        if (dims[i]->nbDims != layout.rank)
        {
            message = concat(
                layout.name, ": shape ", text(*dims[i]), " is not allowed; it must be ", text(signature, layout));
            return std::nullopt;
        }
        for (int32_t j = 0; j < layout.rank; ++j)
        {
            AxisRule const& axis = kAXIS[layout.axes[j]];
            char const* const name = axisName(signature, layout.axes[j]);
            int64_t& size = sizes[layout.axes[j]];
            int64_t const value = dims[i]->d[j];
            if (value > std::numeric_limits<int32_t>::max())
            {
                message = concat(layout.name, ": ", name, " is ", value, "; it must fit in 32 bits");
                return std::nullopt;
            }
            if (value < 0 && axis.fixed)
            {
                message =
                    concat(layout.name, ": ", name, " is dynamic; it must be fixed when the engine is built");
                return std::nullopt;
            }
            if (value >= 0 && size >= 0 && value != size)
            {
                message = concat(layout.name, ": shape ", text(*dims[i]), " is not allowed; it must be ",
                    text(signature, layout),
                    ", where ", name, " is ", size, " by the attributes and the inputs before it");
                return std::nullopt;
            }
            size = value >= 0 ? value : size;
        }
        // Known once query and key were read; they come before all that depends on them.
        sizes[kHM] = known.maskPerQueryHead ? sizes[kHQ] : sizes[kHKV];
        sizes[kWORDS] = sizes[kD] / 16;
    }
    if (sizes[kCALL_KIND] >= 0 && sizes[kCALL_KIND] != HIP_TRT_PREFILL && sizes[kCALL_KIND] != HIP_TRT_DECODE)
    {
        message = concat("call_kind: shape [", sizes[kCALL_KIND], "] is not allowed; it must be [1] or [2]");
        return std::nullopt;
    }

    auto const sizeOf = [&](Axis axis) { return static_cast<int32_t>(std::max<int64_t>(sizes[axis], 0)); };
    HipTrtShape shape{};
    shape.type = *element;
    shape.batch = sizeOf(kB);
    shape.new_tokens = sizeOf(kS);
    shape.num_query_heads = sizeOf(kHQ);
    shape.num_kv_heads = sizeOf(kHKV);
    shape.head_dim = sizeOf(kD);
    shape.num_pages = sizeOf(kP);
    shape.pages_per_sequence = sizeOf(kM);
    return CallShape{shape, static_cast<HipTrtCallKind>(sizeOf(kCALL_KIND))};
}

} // namespace hip_trt
