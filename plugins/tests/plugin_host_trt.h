// TensorRT's side of its plugin interfaces, as far as a plugin sees it, written against the headers alone.
#pragma once

#include <NvInferRuntime.h>

#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

//! Keeps what a plugin logs.
class HostLogger final : public nvinfer1::ILogger
{
public:
    void log(Severity severity, nvinfer1::AsciiChar const* message) noexcept override
    {
        errors += severity <= Severity::kERROR ? std::string{message} + "\n" : "";
    }

    //! What was logged since the last call.
    std::string take()
    {
        return std::exchange(errors, "");
    }

private:
    std::string errors;
};

class HostLoggerFinder final : public nvinfer1::ILoggerFinder
{
public:
    explicit HostLoggerFinder(nvinfer1::ILogger& logger)
        : mLogger{logger}
    {
    }

    nvinfer1::ILogger* findLogger() override
    {
        return &mLogger;
    }

private:
    nvinfer1::ILogger& mLogger;
};

//! ILogger of TensorRT 11 and TensorRT-RTX. Not in an unnamed namespace: the compiler would take it for never called.
struct LaterLoggerInterface : nvinfer1::IVersionedInterface
{
    virtual void log(nvinfer1::ILogger::Severity severity, char const* message) noexcept = 0;
};

class HostResourceContext final : public nvinfer1::IPluginResourceContext
{
public:
    nvinfer1::IGpuAllocator* getGpuAllocator() const noexcept override
    {
        return nullptr;
    }

    nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override
    {
        return nullptr;
    }
};

//! A dimension: a known number, or -1 for one that is given at run time.
class HostDimension final : public nvinfer1::IDimensionExpr, private nvinfer1::apiv::VDimensionExpr
{
public:
    explicit HostDimension(int64_t value)
        : mValue{value}
    {
        mImpl = this;
    }

private:
    bool isConstant() const override
    {
        return mValue >= 0;
    }

    int64_t getConstantValue() const override
    {
        return mValue;
    }

    bool isSizeTensor() const override
    {
        return false;
    }

    int64_t mValue;
};

//! Evaluates expressions of known numbers at once.
class HostExprBuilder final : public nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder
{
public:
    HostExprBuilder()
    {
        mImpl = this;
    }

    //! Owned by the builder.
    nvinfer1::IDimensionExpr const* dimension(int64_t value)
    {
        return mDimensions.emplace_back(std::make_unique<HostDimension>(value)).get();
    }

    nvinfer1::DimsExprs dimensions(std::vector<int64_t> const& values)
    {
        nvinfer1::DimsExprs dims{};
        dims.nbDims = static_cast<int32_t>(values.size());
        for (size_t i = 0; i < values.size(); ++i)
        {
            dims.d[i] = dimension(values[i]);
        }
        return dims;
    }

private:
    nvinfer1::IDimensionExpr const* constant(int64_t value) override
    {
        return dimension(value);
    }

    nvinfer1::IDimensionExpr const* operation(nvinfer1::DimensionOperation operation,
        nvinfer1::IDimensionExpr const& first, nvinfer1::IDimensionExpr const& second) override
    {
        if (!first.isConstant() || !second.isConstant())
        {
            return dimension(-1);
        }
        int64_t const a = first.getConstantValue();
        int64_t const b = second.getConstantValue();
        switch (operation)
        {
        case nvinfer1::DimensionOperation::kSUM: return dimension(a + b);
        case nvinfer1::DimensionOperation::kPROD: return dimension(a * b);
        case nvinfer1::DimensionOperation::kMAX: return dimension(a > b ? a : b);
        case nvinfer1::DimensionOperation::kMIN: return dimension(a < b ? a : b);
        case nvinfer1::DimensionOperation::kSUB: return dimension(a - b);
        case nvinfer1::DimensionOperation::kEQUAL: return dimension(a == b);
        case nvinfer1::DimensionOperation::kLESS: return dimension(a < b);
        case nvinfer1::DimensionOperation::kFLOOR_DIV: return dimension(a / b);
        case nvinfer1::DimensionOperation::kCEIL_DIV: return dimension((a + b - 1) / b);
        }
        return nullptr;
    }

    nvinfer1::IDimensionExpr const* declareSizeTensor(
        int32_t, nvinfer1::IDimensionExpr const&, nvinfer1::IDimensionExpr const&) override
    {
        return nullptr;
    }

    std::deque<std::unique_ptr<HostDimension>> mDimensions;
};

//! Plugin fields that own their values, as an engine keeps them.
class HostFields
{
public:
    HostFields() = default;

    explicit HostFields(nvinfer1::PluginFieldCollection const& collection)
    {
        for (int32_t i = 0; i < collection.nbFields; ++i)
        {
            nvinfer1::PluginField const& field = collection.fields[i];
            auto const* const bytes = static_cast<char const*>(field.data);
            add(field.name, field.type, field.length, {bytes, bytes + size(field.type) * field.length});
        }
    }

    void set(std::string const& name, int32_t value)
    {
        auto const* const bytes = reinterpret_cast<char const*>(&value);
        add(name, nvinfer1::PluginFieldType::kINT32, 1, {bytes, bytes + sizeof(value)});
    }

    void set(std::string const& name, float value)
    {
        auto const* const bytes = reinterpret_cast<char const*>(&value);
        add(name, nvinfer1::PluginFieldType::kFLOAT32, 1, {bytes, bytes + sizeof(value)});
    }

    void set(std::string const& name, std::string const& value)
    {
        add(name, nvinfer1::PluginFieldType::kCHAR, static_cast<int32_t>(value.size()), {value.begin(), value.end()});
    }

    void remove(std::string const& name)
    {
        for (auto entry = mEntries.begin(); entry != mEntries.end(); ++entry)
        {
            if (entry->name == name)
            {
                mEntries.erase(entry);
                return;
            }
        }
    }

    //! The same field a second time.
    void repeat(std::string const& name)
    {
        for (Entry const& entry : mEntries)
        {
            if (entry.name == name)
            {
                mEntries.push_back(Entry{entry});
                return;
            }
        }
    }

    void reverse()
    {
        mEntries = {mEntries.rbegin(), mEntries.rend()};
    }

    //! Valid until this object changes.
    nvinfer1::PluginFieldCollection const* collection()
    {
        mFields.clear();
        for (Entry const& entry : mEntries)
        {
            mFields.emplace_back(entry.name.c_str(), entry.bytes.data(), entry.type, entry.length);
        }
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
        return &mCollection;
    }

private:
    struct Entry
    {
        std::string name;
        nvinfer1::PluginFieldType type;
        int32_t length;
        std::vector<char> bytes;
    };

    static size_t size(nvinfer1::PluginFieldType type)
    {
        return type == nvinfer1::PluginFieldType::kCHAR ? 1 : 4;
    }

    void add(std::string const& name, nvinfer1::PluginFieldType type, int32_t length, std::vector<char> bytes)
    {
        Entry added{name, type, length, std::move(bytes)};
        for (Entry& entry : mEntries)
        {
            if (entry.name == name)
            {
                entry = std::move(added);
                return;
            }
        }
        mEntries.push_back(std::move(added));
    }

    std::vector<Entry> mEntries;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};
