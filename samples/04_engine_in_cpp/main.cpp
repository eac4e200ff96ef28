// An engine in C++: loads the plugin library and a plan, prefills a prompt and decodes greedily, token ids in and out.
//
//   decode PLAN PLUGIN_LIBRARY TOKEN,TOKEN,... [NEW_TOKENS [REFRESH_INTERVAL]]
//
// All state belongs to the caller: a pool of pages for each layer's keys and values, the table of the sequence's pages,
// and the tree nodes that decode steps keep. For plans that hold their weights (built without --strip-weights).
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace
{

constexpr int32_t kPREFILL{0}, kDECODE{1}; // optimization profiles

void require(bool condition, std::string const& message)
{
    if (!condition)
    {
        throw std::runtime_error{message};
    }
}

void require(cudaError_t status, std::string const& what)
{
    require(status == cudaSuccess, what + ": " + cudaGetErrorString(status));
}

class Logger final : public nvinfer1::ILogger
{
    void log(Severity severity, char const* message) noexcept override
    {
        if (severity <= Severity::kERROR)
        {
            std::cerr << "TensorRT: " << message << '\n';
        }
    }
};

//! Memory on the GPU.
class Buffer
{
public:
    explicit Buffer(size_t size)
    {
        require(cudaMalloc(&mData, size), std::to_string(size) + " bytes of GPU memory");
    }
    Buffer(Buffer&& other) noexcept
        : mData{std::exchange(other.mData, nullptr)}
    {
    }
    ~Buffer()
    {
        cudaFree(mData);
    }
    void* data() const
    {
        return mData;
    }

private:
    void* mData{nullptr};
};

template <typename T>
void upload(Buffer const& buffer, std::vector<T> const& values, cudaStream_t stream)
{
    size_t const size = values.size() * sizeof(T);
    require(cudaMemcpyAsync(buffer.data(), values.data(), size, cudaMemcpyHostToDevice, stream), "copy to the GPU");
}

size_t elementSize(nvinfer1::DataType type)
{
    switch (type)
    {
    case nvinfer1::DataType::kINT64: return 8;
    case nvinfer1::DataType::kFLOAT:
    case nvinfer1::DataType::kINT32: return 4;
    case nvinfer1::DataType::kHALF:
    case nvinfer1::DataType::kBF16: return 2;
    default: throw std::runtime_error{"the plan has a tensor of a type that no exported model has"};
    }
}

size_t byteSize(nvinfer1::Dims const& shape, nvinfer1::DataType type)
{
    return std::accumulate(shape.d, shape.d + shape.nbDims, elementSize(type), std::multiplies<size_t>{});
}

bool startsWith(std::string const& text, std::string const& prefix)
{
    return text.compare(0, prefix.size(), prefix) == 0;
}

//! One sequence on an engine.
class Sequence
{
public:
    //! \param tokens most tokens of the sequence, prompt and generated together.
    Sequence(nvinfer1::ICudaEngine& engine, int64_t tokens, cudaStream_t stream)
        : mEngine{engine}
        , mStream{stream}
        , mMaxNew{engine.getProfileShape("input_ids", kPREFILL, nvinfer1::OptProfileSelector::kMAX).d[1]}
        , mLogitsShape{engine.getTensorShape("logits")}
    {
        require(mMaxNew > 0 && mLogitsShape.nbDims == 3, "the plan is not one of hip-trt's");
        int64_t const pageSize = engine.getTensorShape("past_key_values.0.key").d[2];
        int64_t const pages = (tokens + pageSize - 1) / pageSize;
        mLogitsRows = mLogitsShape.d[1] == 1 ? 1 : mMaxNew;
        for (int32_t index = 0; index < engine.getNbIOTensors(); ++index)
        {
            std::string const name{engine.getIOTensorName(index)};
            nvinfer1::Dims shape = engine.getTensorShape(name.c_str());
            auto const type = engine.getTensorDataType(name.c_str());
            if (startsWith(name, "past_"))
            {
                shape.d[0] = startsWith(name, "past_key_values.") ? pages : 1;
            }
            else if (engine.getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kOUTPUT && name != "logits")
            {
                continue; // present state shares the buffers of past state
            }
            else
            {
                shape = name == "input_ids" ? nvinfer1::Dims{2, {1, mMaxNew}}
                    : name == "page_table"  ? nvinfer1::Dims{2, {1, pages}}
                    : name == "logits"      ? nvinfer1::Dims{3, {1, mLogitsRows, mLogitsShape.d[2]}}
                                            : nvinfer1::Dims{1, {1}};
            }
            auto const [item, added] = mBuffers.emplace(name, Buffer{byteSize(shape, type)});
            if (startsWith(name, "past_nodes."))
            {
                require(cudaMemsetAsync(item->second.data(), 0xff, byteSize(shape, type), stream), "no nodes yet: -1");
            }
            mShapes[name] = shape;
        }
        std::vector<int32_t> table(static_cast<size_t>(pages)); // in any order; here page i holds the i-th tokens
        std::iota(table.begin(), table.end(), 0);
        upload(mBuffers.at("page_table"), table, stream);
        for (int32_t const profile : {kPREFILL, kDECODE})
        {
            std::unique_ptr<nvinfer1::IExecutionContext> context{engine.createExecutionContext()};
            require(context && context->setOptimizationProfileAsync(profile, stream), "no execution context");
            mContexts.push_back(std::move(context));
        }
    }

    //! Append a prompt; the likeliest next token.
    int64_t prefill(std::vector<int64_t> const& prompt)
    {
        int64_t next{-1};
        for (size_t at = 0; at < prompt.size(); at += static_cast<size_t>(mMaxNew))
        {
            size_t const end = std::min(prompt.size(), at + static_cast<size_t>(mMaxNew));
            next = run(kPREFILL, {prompt.begin() + at, prompt.begin() + end}, true);
        }
        return next;
    }

    //! Append one token; the likeliest next one. \param refresh search the masks from the top, not from kept nodes.
    int64_t step(int64_t token, bool refresh)
    {
        return run(kDECODE, {token}, refresh);
    }

private:
    int64_t run(int32_t profile, std::vector<int64_t> tokens, bool refresh)
    {
        auto const count = static_cast<int32_t>(tokens.size());
        if (profile == kPREFILL && count == 1 && mMaxNew > 1)
        {
            tokens.push_back(0); // a call of one column would be a decode step; query_lengths leaves padding out
        }
        mShapes["input_ids"].d[1] = static_cast<int64_t>(tokens.size());
        upload(mBuffers.at("input_ids"), tokens, mStream);
        upload(mBuffers.at("past_lengths"), std::vector<int32_t>{mLength}, mStream);
        upload(mBuffers.at("query_lengths"), std::vector<int32_t>{count}, mStream);
        upload(mBuffers.at("refresh_mask"), std::vector<int32_t>{refresh}, mStream);
        auto& context = *mContexts[static_cast<size_t>(profile)];
        for (int32_t index = 0; index < mEngine.getNbIOTensors(); ++index)
        {
            std::string const name{mEngine.getIOTensorName(index)};
            std::string past = name;
            if (startsWith(name, "present"))
            {
                past = startsWith(name, "present.") ? "past_key_values." + name.substr(8) : "past_" + name.substr(8);
            }
            else if (name != "logits")
            {
                require(context.setInputShape(name.c_str(), mShapes.at(name)), name + ": outside the plan's profiles");
            }
            require(context.setTensorAddress(name.c_str(), mBuffers.at(past).data()), name + ": no such tensor");
        }
        require(context.enqueueV3(mStream), "TensorRT failed");
        mLength += count;

        std::vector<float> logits(static_cast<size_t>(mLogitsShape.d[2]));
        auto const row = static_cast<size_t>(mLogitsRows == 1 ? 0 : count - 1);
        auto const* from = static_cast<float const*>(mBuffers.at("logits").data()) + row * logits.size();
        size_t const size = logits.size() * sizeof(float);
        require(cudaMemcpyAsync(logits.data(), from, size, cudaMemcpyDeviceToHost, mStream), "copy from the GPU");
        require(cudaStreamSynchronize(mStream), "the GPU failed");
        return std::distance(logits.begin(), std::max_element(logits.begin(), logits.end()));
    }

    nvinfer1::ICudaEngine& mEngine;
    cudaStream_t mStream;
    int64_t mMaxNew;
    nvinfer1::Dims mLogitsShape;
    int64_t mLogitsRows{1};
    int32_t mLength{0};
    std::map<std::string, Buffer> mBuffers;
    std::map<std::string, nvinfer1::Dims> mShapes;
    std::vector<std::unique_ptr<nvinfer1::IExecutionContext>> mContexts;
};

std::vector<int64_t> parseTokens(std::string const& text)
{
    std::vector<int64_t> tokens;
    std::istringstream stream{text};
    for (std::string part; std::getline(stream, part, ',');)
    {
        char* end{nullptr};
        tokens.push_back(std::strtoll(part.c_str(), &end, 10));
        require(!part.empty() && *end == '\0' && tokens.back() >= 0, "TOKENS: '" + part + "' is no token id");
    }
    require(!tokens.empty(), "TOKENS: there are none");
    return tokens;
}

void run(std::string const& planPath, char const* pluginPath, std::vector<int64_t> const& prompt, int32_t newTokens,
    int32_t refreshInterval)
{
    std::ifstream file{planPath, std::ios::binary};
    std::vector<char> const plan{std::istreambuf_iterator<char>{file}, std::istreambuf_iterator<char>{}};
    require(file && !plan.empty(), planPath + ": cannot be read");

    void* const plugin = dlopen(pluginPath, RTLD_NOW | RTLD_LOCAL); // says why it cannot be loaded; TensorRT would not
    require(plugin != nullptr, plugin == nullptr ? dlerror() : "");
    auto const version = reinterpret_cast<char const* (*) ()>(dlsym(plugin, "hipTrtVersion"));
    require(version != nullptr, std::string{pluginPath} + ": not hip-trt's plugin library");
    std::cerr << "plan of " << plan.size() << " bytes, plugin " << version() << ", TensorRT " << getInferLibVersion()
              << ", compiled for " << NV_TENSORRT_VERSION << '\n';

    int32_t gpus{0};
    auto const found = cudaGetDeviceCount(&gpus);
    require(found == cudaSuccess && gpus > 0,
        planPath + ": a plan needs a GPU from here on: " + (found == cudaSuccess ? "none" : cudaGetErrorString(found)));
    // Interfaces differ between releases. This also finds headers of TensorRT with the library of TensorRT-RTX.
    require(getInferLibVersion() / 10000 == NV_TENSORRT_VERSION / 10000,
        "TensorRT " + std::to_string(getInferLibVersion()) + " is of another release than the headers, "
            + std::to_string(NV_TENSORRT_VERSION) + ": compile against its own");

    Logger logger;
    std::unique_ptr<nvinfer1::IRuntime> const runtime{nvinfer1::createInferRuntime(logger)};
    require(runtime != nullptr, "TensorRT does not run here");
    require(runtime->getPluginRegistry().loadLibrary(pluginPath) != nullptr, "TensorRT refuses the plugin library");
    std::unique_ptr<nvinfer1::ICudaEngine> const engine{runtime->deserializeCudaEngine(plan.data(), plan.size())};
    require(engine != nullptr, planPath + ": TensorRT cannot load it on this GPU");

    cudaStream_t stream{};
    require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "no stream");
    Sequence sequence{*engine, static_cast<int64_t>(prompt.size()) + newTokens, stream};
    int64_t token = sequence.prefill(prompt);
    for (int32_t step = 0; step < newTokens; ++step)
    {
        std::cout << token << std::endl;
        if (step + 1 < newTokens)
        {
            token = sequence.step(token, step % refreshInterval == 0);
        }
    }
}

} // namespace

int main(int argc, char** argv)
{
    if (argc < 4 || argc > 6)
    {
        std::cerr << "usage: decode PLAN PLUGIN_LIBRARY TOKEN,TOKEN,... [NEW_TOKENS [REFRESH_INTERVAL]]\n";
        return 2;
    }
    try
    {
        int32_t const newTokens = argc > 4 ? std::atoi(argv[4]) : 16, interval = argc > 5 ? std::atoi(argv[5]) : 8;
        require(newTokens > 0 && interval > 0, "NEW_TOKENS and REFRESH_INTERVAL must be positive");
        run(argv[1], argv[2], parseTokens(argv[3]), newTokens, interval);
    }
    catch (std::exception const& error)
    {
        std::cerr << "error: " << error.what() << '\n';
        return 1;
    }
    return 0;
}
