// As much of TensorRT as samples/04_engine_in_cpp asks for, with one engine: a "model" whose next token depends on every
// token in the page pool, on its position, and on the nodes that decode steps keep. tests/test_samples.py has it in Python.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#define NV_TENSORRT_VERSION 101401

inline int32_t getInferLibVersion()
{
    return NV_TENSORRT_VERSION;
}

namespace nvinfer1
{

constexpr int64_t kPAGE{4}, kVOCABULARY{97}, kMOST_NEW{5}, kMOST_PAGES{16};

struct Dims
{
    int32_t nbDims{};
    int64_t d[8]{};
};
enum class DataType { kFLOAT, kHALF, kINT32, kINT64, kBF16 };
enum class TensorIOMode { kINPUT, kOUTPUT };
enum class OptProfileSelector { kMAX };

struct ILogger
{
    enum class Severity { kINTERNAL_ERROR, kERROR, kWARNING };
    virtual void log(Severity, char const*) noexcept = 0;
};

struct Tensor
{
    char const* name;
    TensorIOMode mode;
    DataType type;
    Dims shape;
};

inline std::vector<Tensor> const kTENSORS{
    {"input_ids", TensorIOMode::kINPUT, DataType::kINT64, {2, {-1, -1}}},
    {"past_lengths", TensorIOMode::kINPUT, DataType::kINT32, {1, {-1}}},
    {"query_lengths", TensorIOMode::kINPUT, DataType::kINT32, {1, {-1}}},
    {"page_table", TensorIOMode::kINPUT, DataType::kINT32, {2, {-1, -1}}},
    {"refresh_mask", TensorIOMode::kINPUT, DataType::kINT32, {1, {1}}},
    {"past_key_values.0.key", TensorIOMode::kINPUT, DataType::kFLOAT, {4, {-1, 1, kPAGE, 1}}},
    {"past_key_values.0.value", TensorIOMode::kINPUT, DataType::kFLOAT, {4, {-1, 1, kPAGE, 1}}},
    {"past_nodes.0", TensorIOMode::kINPUT, DataType::kINT32, {3, {-1, 1, 1}}},
    {"logits", TensorIOMode::kOUTPUT, DataType::kFLOAT, {3, {-1, 1, kVOCABULARY}}},
    {"present.0.key", TensorIOMode::kOUTPUT, DataType::kFLOAT, {4, {-1, 1, kPAGE, 1}}},
    {"present.0.value", TensorIOMode::kOUTPUT, DataType::kFLOAT, {4, {-1, 1, kPAGE, 1}}},
    {"present_nodes.0", TensorIOMode::kOUTPUT, DataType::kINT32, {3, {-1, 1, 1}}},
};

class IExecutionContext
{
public:
    bool setOptimizationProfileAsync(int32_t profile, void*)
    {
        mProfile = profile;
        return true;
    }
    bool setInputShape(std::string const& name, Dims const& shape)
    {
        mShapes[name] = shape;
        int64_t const width = mShapes["input_ids"].d[1];
        return (mProfile == 1 ? width == 1 : width <= kMOST_NEW) && mShapes["page_table"].d[1] <= kMOST_PAGES;
    }
    bool setTensorAddress(std::string const& name, void* address)
    {
        mAddresses[name] = address;
        return true;
    }
    bool enqueueV3(void*)
    {
        for (char const* part : {"key", "value"})
        {
            if (at<float>(std::string{"present.0."} + part) != at<float>(std::string{"past_key_values.0."} + part))
            {
                return false;
            }
        }
        int32_t const past = *at<int32_t>("past_lengths"), count = *at<int32_t>("query_lengths");
        for (int32_t index = 0; index < count; ++index)
        {
            row("key", past + index) = static_cast<float>(at<int64_t>("input_ids")[index]);
            row("value", past + index) = static_cast<float>(past + index + 1);
        }
        int32_t& nodes = *at<int32_t>("past_nodes.0");
        bool const decode = mShapes["input_ids"].d[1] == 1;
        nodes = !decode ? -1 : *at<int32_t>("refresh_mask") || nodes == -1 ? past : nodes;
        int64_t sum = nodes + 1;
        for (int32_t position = 0; position < past + count; ++position)
        {
            sum += static_cast<int64_t>(row("key", position) * row("value", position));
        }
        float* const logits = at<float>("logits");
        for (int64_t token = 0; token < kVOCABULARY; ++token)
        {
            logits[token] = token == sum % kVOCABULARY ? 1.0F : -1.0F;
        }
        return true;
    }

private:
    template <typename T>
    T* at(std::string const& name)
    {
        return static_cast<T*>(mAddresses.at(name));
    }
    float& row(std::string const& part, int32_t position)
    {
        int32_t const page = at<int32_t>("page_table")[position / kPAGE];
        return at<float>("past_key_values.0." + part)[page * kPAGE + position % kPAGE];
    }

    int32_t mProfile{-1};
    std::map<std::string, Dims> mShapes;
    std::map<std::string, void*> mAddresses;
};

class ICudaEngine
{
public:
    int32_t getNbIOTensors()
    {
        return static_cast<int32_t>(kTENSORS.size());
    }
    char const* getIOTensorName(int32_t index)
    {
        return kTENSORS[static_cast<size_t>(index)].name;
    }
    Dims getTensorShape(char const* name)
    {
        return find(name).shape;
    }
    DataType getTensorDataType(char const* name)
    {
        return find(name).type;
    }
    TensorIOMode getTensorIOMode(char const* name)
    {
        return find(name).mode;
    }
    Dims getProfileShape(char const*, int32_t, OptProfileSelector)
    {
        return {2, {1, kMOST_NEW}};
    }
    IExecutionContext* createExecutionContext()
    {
        return new IExecutionContext;
    }

private:
    Tensor const& find(std::string const& name)
    {
        for (auto const& tensor : kTENSORS)
        {
            if (tensor.name == name)
            {
                return tensor;
            }
        }
        std::abort();
    }
};

class IPluginRegistry
{
public:
    void* loadLibrary(char const*)
    {
        return this;
    }
};

class IRuntime
{
public:
    IPluginRegistry& getPluginRegistry()
    {
        return mRegistry;
    }
    ICudaEngine* deserializeCudaEngine(void const*, size_t)
    {
        return new ICudaEngine;
    }

private:
    IPluginRegistry mRegistry;
};

inline IRuntime* createInferRuntime(ILogger&)
{
    return new IRuntime;
}

} // namespace nvinfer1
