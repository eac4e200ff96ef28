#include "plugin_fields.h"

#include "logging.h"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <utility>

namespace hip_trt
{
namespace
{

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr char const* kMASK_HEADS_FIELD = "mask_heads";
constexpr int32_t kLONGEST_TEXT = 256;
constexpr std::string_view kMASK_HEADS[] = {"kv", "query"}; // indexed by mask_per_query_head

char const* typeName(PluginFieldType type)
{
    switch (type)
    {
    case PluginFieldType::kINT32: return "int32";
    case PluginFieldType::kFLOAT32: return "float32";
    case PluginFieldType::kCHAR: return "text";
    default: return "of another type";
    }
}

//! Characters of a text field; TensorRT may count a terminator or not.
std::string_view text(PluginField const& field)
{
    std::string_view const value{static_cast<char const*>(field.data), static_cast<size_t>(field.length)};
    return value.substr(0, value.find('\0'));
}

//! Finds fields by name and reports those that are missing, repeated, unknown or malformed.
class FieldReader
{
public:
    FieldReader(std::string const& layer, nvinfer1::PluginFieldCollection const* fields)
        : mLayer{layer}
    {
        if (fields == nullptr || (fields->nbFields > 0 && fields->fields == nullptr))
        {
            fail("no fields were given");
            return;
        }
        for (int32_t i = 0; i < fields->nbFields; ++i)
        {
            if (fields->fields[i].name == nullptr)
            {
                fail(concat("field number ", i, " has no name"));
                continue;
            }
            mFields.push_back(fields->fields[i]);
        }
        mUsed.resize(mFields.size(), false);
    }

    //! The field of that name, if there is exactly one, and of that type with data; nullptr after reporting otherwise.
    //! A number is a single value; text may be of any length.
    PluginField const* find(char const* name, PluginFieldType type)
    {
        PluginField const* found = nullptr;
        for (size_t i = 0; i < mFields.size(); ++i)
        {
            if (std::strcmp(mFields[i].name, name) != 0)
            {
                continue;
            }
            mUsed[i] = true;
            if (found != nullptr)
            {
                fail(concat(name, ": is given more than once"));
                return nullptr;
            }
            found = &mFields[i];
        }
        if (found == nullptr)
        {
            fail(concat(name, ": is missing; every attribute of the operator must be given"));
            return nullptr;
        }
        bool const lengthFits
            = type == PluginFieldType::kCHAR ? found->length >= 0 && found->length <= kLONGEST_TEXT : found->length == 1;
        if (found->type != type || !lengthFits || found->data == nullptr)
        {
            fail(concat(name, ": ", found->length, " value(s) ", typeName(found->type), " are not allowed; it must be ",
                type == PluginFieldType::kCHAR ? "" : "one ", typeName(type)));
            return nullptr;
        }
        return found;
    }

    //! The same for a field that may be missing.
    PluginField const* findIfGiven(char const* name, PluginFieldType type)
    {
        bool const given = std::any_of(mFields.begin(), mFields.end(),
            [name](PluginField const& field) { return std::strcmp(field.name, name) == 0; });
        return given ? find(name, type) : nullptr;
    }

    //! Report every field that nobody asked for.
    void refuseOthers()
    {
        for (size_t i = 0; i < mFields.size(); ++i)
        {
            if (!mUsed[i])
            {
                fail(concat(mFields[i].name, ": no such field; see attributes() in hip_trt/operator.py"));
            }
        }
    }

    void fail(std::string const& message)
    {
        mOk = false;
        logError(mLayer, message);
    }

    bool ok() const
    {
        return mOk;
    }

private:
    std::string const& mLayer;
    std::vector<PluginField> mFields;
    std::vector<bool> mUsed;
    bool mOk{true};
};

//! Refuse the engine of another version: one whose operator is another's, or that does not say which it computes. The
//! words are those of require_format() in hip_trt/spec.py.
void requireFormat(FieldReader& reader, int32_t version)
{
    PluginField const* const builtBy = reader.findIfGiven(kHIP_TRT_VERSION_FIELD, PluginFieldType::kCHAR);
    PluginField const* const format = reader.findIfGiven(kOPERATOR_VERSION_FIELD, PluginFieldType::kINT32);
    if (!reader.ok() || (format != nullptr && *static_cast<int32_t const*>(format->data) == version))
    {
        return;
    }
    reader.fail(concat("made by hip-trt ", builtBy != nullptr ? text(*builtBy) : "of an unknown version", " in format ",
        format != nullptr ? std::to_string(*static_cast<int32_t const*>(format->data)) : "none", "; this is hip-trt ",
        hipTrtVersion(), ", which reads format ", version,
        ". Export it again with `hip-trt export`."));
}

//! Ranges and combinations of the attributes alone. What a value may be is decided in one place, by the C ABI,
//! which also wants head counts; those are not known yet, so it is asked about the plainest. Whether kernels exist for
//! the real ones is asked once they are known, in configurePlugin().
template <typename Version>
void checkValues(typename Version::Config const& config, FieldReader& reader)
{
    CallShape call{};
    HipTrtShape& shape = call.shape;
    shape.type = HIP_TRT_FLOAT16;
    shape.num_query_heads = 1;
    shape.num_kv_heads = 1;
    shape.head_dim = 64;
    char message[512];
    if (Version::validate(config, call, message, sizeof(message)) == HIP_TRT_INVALID_ARGUMENT)
    {
        reader.fail(message);
    }
}

} // namespace

template <typename Version>
std::vector<PluginField> attributeFields()
{
    std::vector<PluginField> fields;
    for (auto const& [name, member] : Version::kINT_FIELDS)
    {
        fields.emplace_back(name, nullptr, PluginFieldType::kINT32, 1);
    }
    fields.emplace_back(kMASK_HEADS_FIELD, nullptr, PluginFieldType::kCHAR, 0);
    for (auto const& [name, member] : Version::kFLOAT_FIELDS)
    {
        fields.emplace_back(name, nullptr, PluginFieldType::kFLOAT32, 1);
    }
    return fields;
}

template <typename Version>
std::optional<typename Version::Config> parseFields(
    std::string const& layer, nvinfer1::PluginFieldCollection const* fields, nvinfer1::TensorRTPhase phase)
{
    FieldReader reader{layer, fields};
    if (!reader.ok())
    {
        return std::nullopt;
    }
    if (phase == nvinfer1::TensorRTPhase::kRUNTIME)
    {
        // Before anything else: another version may have other fields, and its engine other tensors.
        requireFormat(reader, Version::kOPERATOR_VERSION);
        if (!reader.ok())
        {
            return std::nullopt;
        }
    }

    typename Version::Config config{};
    for (auto const& [name, member] : Version::kINT_FIELDS)
    {
        if (PluginField const* const field = reader.find(name, PluginFieldType::kINT32))
        {
            config.*member = *static_cast<int32_t const*>(field->data);
        }
    }
    for (auto const& [name, member] : Version::kFLOAT_FIELDS)
    {
        if (PluginField const* const field = reader.find(name, PluginFieldType::kFLOAT32))
        {
            config.*member = *static_cast<float const*>(field->data);
        }
    }
    if (PluginField const* const field = reader.find(kMASK_HEADS_FIELD, PluginFieldType::kCHAR))
    {
        if (text(*field) == kMASK_HEADS[0] || text(*field) == kMASK_HEADS[1])
        {
            config.mask_per_query_head = text(*field) == kMASK_HEADS[1];
        }
        else
        {
            reader.fail(concat(kMASK_HEADS_FIELD, ": '", text(*field), "' is not allowed; it must be '", kMASK_HEADS[0],
                "' or '", kMASK_HEADS[1], "'"));
        }
    }
    reader.refuseOthers();
    if (reader.ok())
    {
        checkValues<Version>(config, reader);
    }
    return reader.ok() ? std::optional{config} : std::nullopt;
}

template <typename Version>
std::vector<PluginField> serializeFields(typename Version::Config const& config)
{
    std::vector<PluginField> fields;
    for (auto const& [name, member] : Version::kINT_FIELDS)
    {
        fields.emplace_back(name, &(config.*member), PluginFieldType::kINT32, 1);
    }
    auto const maskHeads = kMASK_HEADS[config.mask_per_query_head];
    fields.emplace_back(
        kMASK_HEADS_FIELD, maskHeads.data(), PluginFieldType::kCHAR, static_cast<int32_t>(maskHeads.size()));
    for (auto const& [name, member] : Version::kFLOAT_FIELDS)
    {
        fields.emplace_back(name, &(config.*member), PluginFieldType::kFLOAT32, 1);
    }
    fields.emplace_back(kOPERATOR_VERSION_FIELD, &Version::kOPERATOR_VERSION, PluginFieldType::kINT32, 1);
    fields.emplace_back(kHIP_TRT_VERSION_FIELD, hipTrtVersion(), PluginFieldType::kCHAR,
        static_cast<int32_t>(std::strlen(hipTrtVersion())));
    return fields;
}

template <typename Version>
std::string describe(typename Version::Config const& config)
{
    std::string line;
    for (auto const& [name, member] : Version::kINT_FIELDS)
    {
        line += concat(name, '=', config.*member, ' ');
    }
    line += concat(kMASK_HEADS_FIELD, '=', kMASK_HEADS[config.mask_per_query_head]);
    for (auto const& [name, member] : Version::kFLOAT_FIELDS)
    {
        line += concat(' ', name, '=', config.*member);
    }
    return line;
}

#define INSTANTIATE(Version) \
    template std::vector<PluginField> attributeFields<Version>(); \
    template std::optional<Version::Config> parseFields<Version>( \
        std::string const&, nvinfer1::PluginFieldCollection const*, nvinfer1::TensorRTPhase); \
    template std::vector<PluginField> serializeFields<Version>(Version::Config const&); \
    template std::string describe<Version>(Version::Config const&)

INSTANTIATE(Version1);
INSTANTIATE(Version2);

} // namespace hip_trt
