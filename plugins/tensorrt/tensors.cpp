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

//! A size that tensors share, called as in the operator's contract.
enum Axis : int32_t
{
    kB,
    kHQ,
    kHKV,
    kS,
    kD,
    kP,
    kM,
    kPAGE_SIZE,
    kHM,
    kKD,
    kONE,
    kAXES
};

struct AxisRule
{
    char const* name;
    bool fixed; // must be known when the engine is built
};

constexpr AxisRule kAXIS[kAXES] = {{"B", false}, {"Hq", true}, {"Hkv", true}, {"S", false}, {"D", true}, {"P", false},
    {"M", false}, {"page_size", true}, {"Hm", true}, {"Kd", true}, {"1", true}};

struct TensorLayout
{
    char const* name;
    int32_t rank;
    Axis axes[4];
};

constexpr TensorLayout kLAYOUT[kINPUTS] = {
    {"query", 4, {kB, kHQ, kS, kD}},
    {"key", 4, {kB, kHKV, kS, kD}},
    {"value", 4, {kB, kHKV, kS, kD}},
    {"past_key", 4, {kP, kHKV, kPAGE_SIZE, kD}},
    {"past_value", 4, {kP, kHKV, kPAGE_SIZE, kD}},
    {"page_table", 2, {kB, kM}},
    {"past_lengths", 1, {kB}},
    {"query_lengths", 1, {kB}},
    {"past_nodes", 3, {kB, kHM, kKD}},
    {"refresh_mask", 1, {kONE}},
};
constexpr char const* kOUTPUT_NAMES[kOUTPUTS] = {"output", "present_key", "present_value", "present_nodes"};

std::string text(Dims const& dims)
{
    std::string line = "[";
    for (int32_t i = 0; i < std::min(dims.nbDims, Dims::MAX_DIMS); ++i)
    {
        line += concat(i == 0 ? "" : ", ", dims.d[i]);
    }
    return line + "]";
}

std::string text(TensorLayout const& layout)
{
    std::string line = "[";
    for (int32_t i = 0; i < layout.rank; ++i)
    {
        line += concat(i == 0 ? "" : ", ", kAXIS[layout.axes[i]].name);
    }
    return line + "]";
}

} // namespace

char const* tensorName(int32_t position)
{
    return position < kINPUTS ? kLAYOUT[position].name : kOUTPUT_NAMES[position - kINPUTS];
}

bool isFloatTensor(int32_t position)
{
    return (position < kINPUTS ? position : kOUTPUT_LIKE[position - kINPUTS]) <= kPAST_VALUE;
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

std::optional<HipTrtShape> readShape(
    HipTrtConfig const& config, DataType type, Dims const* const* dims, std::string& message)
{
    std::optional<HipTrtDataType> const element = floatType(type);
    if (!element)
    {
        message = concat("query: ", typeName(type), " is not allowed; it must be float16, bfloat16 or float32");
        return std::nullopt;
    }

    int64_t sizes[kAXES];
    std::fill(std::begin(sizes), std::end(sizes), -1);
    sizes[kPAGE_SIZE] = config.page_size;
    sizes[kKD] = config.decode_mask_k / config.block_k;
    sizes[kONE] = 1;
    for (int32_t i = 0; i < kINPUTS; ++i)
    {
        TensorLayout const& layout = kLAYOUT[i];
        if (dims[i]->nbDims != layout.rank)
        {
            message = concat(layout.name, ": shape ", text(*dims[i]), " is not allowed; it must be ", text(layout));
            return std::nullopt;
        }
        for (int32_t j = 0; j < layout.rank; ++j)
        {
            AxisRule const& axis = kAXIS[layout.axes[j]];
            int64_t& size = sizes[layout.axes[j]];
            int64_t const value = dims[i]->d[j];
            if (value > std::numeric_limits<int32_t>::max())
            {
                message = concat(layout.name, ": ", axis.name, " is ", value, "; it must fit in 32 bits");
                return std::nullopt;
            }
            if (value < 0 && axis.fixed)
            {
                message =
                    concat(layout.name, ": ", axis.name, " is dynamic; it must be fixed when the engine is built");
                return std::nullopt;
            }
            if (value >= 0 && size >= 0 && value != size)
            {
                message = concat(layout.name, ": shape ", text(*dims[i]), " is not allowed; it must be ", text(layout),
                    ", where ", axis.name, " is ", size, " by the attributes and the inputs before it");
                return std::nullopt;
            }
            size = value >= 0 ? value : size;
        }
        // Known once query and key were read; past_nodes comes after them.
        sizes[kHM] = config.mask_per_query_head ? sizes[kHQ] : sizes[kHKV];
    }

    auto const known = [&](Axis axis) { return static_cast<int32_t>(std::max<int64_t>(sizes[axis], 0)); };
    HipTrtShape shape{};
    shape.type = *element;
    shape.batch = known(kB);
    shape.new_tokens = known(kS);
    shape.num_query_heads = known(kHQ);
    shape.num_kv_heads = known(kHKV);
    shape.head_dim = known(kD);
    shape.num_pages = known(kP);
    shape.pages_per_sequence = known(kM);
    return shape;
}

} // namespace hip_trt
