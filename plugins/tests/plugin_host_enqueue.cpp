// enqueue on a GPU, against attention computed here in double precision. Few enough tokens that the operator attends to
// all of them, so what it must return needs no tree search; that is what the Python tests are for.
#include "plugin_host.h"
#include "plugin_host_check.h"

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdlib>
#include <random>

namespace
{

constexpr int64_t kPAST[] = {20, 3}; // committed tokens of each sequence
constexpr int32_t kTABLE[] = {4, 1, 6, 2, 0, -1};
constexpr float kUNDEFINED = 1e30F; // in rows that no sequence has committed: reading one shows

#define CHECK_CUDA(call) CHECK_EQUAL(std::string{cudaGetErrorString(call)}, "no error")

size_t elements(std::vector<int64_t> const& shape)
{
    size_t count = 1;
    for (int64_t const size : shape)
    {
        count *= static_cast<size_t>(size);
    }
    return count;
}

//! Device memory, filled from and read back to the host.
class Buffer
{
public:
    explicit Buffer(size_t bytes)
    {
        CHECK_CUDA(cudaMalloc(&mData, bytes));
    }

    template <typename T>
    explicit Buffer(std::vector<T> const& values)
        : Buffer{values.size() * sizeof(T)}
    {
        CHECK_CUDA(cudaMemcpy(mData, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    }

    Buffer(Buffer const&) = delete;
    Buffer& operator=(Buffer const&) = delete;

    ~Buffer()
    {
        cudaFree(mData);
    }

    template <typename T>
    std::vector<T> read(size_t count) const
    {
        std::vector<T> values(count);
        CHECK_CUDA(cudaMemcpy(values.data(), mData, count * sizeof(T), cudaMemcpyDeviceToHost));
        return values;
    }

    void* data() const
    {
        return mData;
    }

private:
    void* mData{nullptr};
};

//! One layer's inputs on the host.
struct Call
{
    Geometry geometry;
    std::vector<int32_t> queryLengths;
    std::vector<float> query, key, value, pastKey, pastValue;

    Call(int64_t newTokens, std::vector<int32_t> lengths, uint32_t seed)
        : queryLengths{std::move(lengths)}
    {
        geometry.newTokens = newTokens;
        std::mt19937 random{seed};
        std::normal_distribution<float> normal;
        auto const shapes = geometry.shapes();
        for (auto [values, input] : {std::pair{&query, 0}, {&key, 1}, {&value, 2}})
        {
            values->resize(elements(shapes[input]));
            for (float& x : *values)
            {
                x = normal(random);
            }
        }
        pastKey.assign(elements(shapes[3]), kUNDEFINED);
        pastValue.assign(elements(shapes[4]), kUNDEFINED);
        for (int64_t b = 0; b < geometry.batch; ++b)
        {
            for (int64_t t = 0; t < kPAST[b]; ++t)
            {
                for (int64_t h = 0; h < geometry.kvHeads; ++h)
                {
                    for (int64_t d = 0; d < geometry.headDim; ++d)
                    {
                        pastKey[poolIndex(b, h, t) + d] = normal(random);
                        pastValue[poolIndex(b, h, t) + d] = normal(random);
                    }
                }
            }
        }
    }

    //! Where token t of a sequence lies in a pool.
    size_t poolIndex(int64_t b, int64_t h, int64_t t) const
    {
        int64_t const page = kTABLE[b * geometry.pageSlots + t / geometry.pageSize];
        return ((page * geometry.kvHeads + h) * geometry.pageSize + t % geometry.pageSize) * geometry.headDim;
    }

    //! Where new token s of a sequence lies in key and value (or, with query heads, in query and output).
    size_t rowIndex(int64_t heads, int64_t b, int64_t h, int64_t s) const
    {
        return ((b * heads + h) * geometry.newTokens + s) * geometry.headDim;
    }

    //! The pool after the call, in the rows of sequences.
    std::vector<float> present(std::vector<float> const& past, std::vector<float> const& rows) const
    {
        std::vector<float> pool = past;
        for (int64_t b = 0; b < geometry.batch; ++b)
        {
            for (int64_t s = 0; s < queryLengths[b]; ++s)
            {
                for (int64_t h = 0; h < geometry.kvHeads; ++h)
                {
                    auto const from = rows.begin() + static_cast<int64_t>(rowIndex(geometry.kvHeads, b, h, s));
                    std::copy(from, from + geometry.headDim,
                        pool.begin() + static_cast<int64_t>(poolIndex(b, h, kPAST[b] + s)));
                }
            }
        }
        return pool;
    }

    //! Causal attention over every committed and new token; 0 in padding.
    std::vector<float> output() const
    {
        std::vector<float> const keys = present(pastKey, key);
        std::vector<float> const values = present(pastValue, value);
        std::vector<float> result(query.size(), 0.0F);
        for (int64_t b = 0; b < geometry.batch; ++b)
        {
            for (int64_t h = 0; h < geometry.queryHeads; ++h)
            {
                for (int64_t s = 0; s < queryLengths[b]; ++s)
                {
                    attend(b, h, s, keys, values, result);
                }
            }
        }
        return result;
    }

private:
    void attend(int64_t b, int64_t h, int64_t s, std::vector<float> const& keys, std::vector<float> const& values,
        std::vector<float>& result) const
    {
        int64_t const kvHead = h * geometry.kvHeads / geometry.queryHeads;
        size_t const row = rowIndex(geometry.queryHeads, b, h, s);
        std::vector<double> sum(geometry.headDim, 0.0);
        double total = 0.0;
        for (int64_t t = 0; t <= kPAST[b] + s; ++t)
        {
            size_t const token = poolIndex(b, kvHead, t);
            double score = 0.0;
            for (int64_t d = 0; d < geometry.headDim; ++d)
            {
                score += static_cast<double>(query[row + d]) * keys[token + d];
            }
            double const weight = std::exp(score * 0.125);
            total += weight;
            for (int64_t d = 0; d < geometry.headDim; ++d)
            {
                sum[d] += weight * values[token + d];
            }
        }
        for (int64_t d = 0; d < geometry.headDim; ++d)
        {
            result[row + d] = static_cast<float>(sum[d] / total);
        }
    }
};

//! Largest difference where something is expected; committed rows only, if expected holds kUNDEFINED.
float difference(std::vector<float> const& found, std::vector<float> const& expected)
{
    float largest = 0.0F;
    for (size_t i = 0; i < found.size(); ++i)
    {
        if (expected[i] != kUNDEFINED)
        {
            float const apart = std::fabs(found[i] - expected[i]);
            largest = apart <= largest ? largest : apart; // keeps a NaN
        }
    }
    return largest;
}

void checkCall(Library const& library, Call const& call, bool shared)
{
    Plugin plugin{library.creator->createPlugin("layer", goodFields().collection(), nvinfer1::TensorRTPhase::kBUILD)};
    auto const dynamic = call.geometry.dynamicTensors();
    CHECK_EQUAL(plugin.build->configurePlugin(dynamic.data(), kINPUTS, dynamic.data() + kINPUTS, kOUTPUTS), 0);
    size_t const workspaceSize =
        plugin.build->getWorkspaceSize(dynamic.data(), kINPUTS, dynamic.data() + kINPUTS, kOUTPUTS);
    HostResourceContext context;
    Plugin attached{plugin.runtime->attachToContext(&context)};
    auto const tensors = call.geometry.tensors();
    CHECK_EQUAL(attached.runtime->onShapeChange(tensors.data(), kINPUTS, tensors.data() + kINPUTS, kOUTPUTS), 0);

    auto const shapes = call.geometry.shapes();
    size_t const nodes = elements(shapes[8]);
    Buffer query{call.query}, key{call.key}, value{call.value}, pastKey{call.pastKey}, pastValue{call.pastValue};
    Buffer table{std::vector<int32_t>(std::begin(kTABLE), std::end(kTABLE))};
    Buffer pastLengths{std::vector<int32_t>(std::begin(kPAST), std::end(kPAST))};
    Buffer queryLengths{call.queryLengths};
    Buffer pastNodes{std::vector<int32_t>(nodes, -1)};
    Buffer refresh{std::vector<int32_t>{1}};
    Buffer output{std::vector<float>(call.query.size(), kUNDEFINED)};
    Buffer otherKey{std::vector<float>(call.pastKey.size(), 0.0F)};
    Buffer otherValue{std::vector<float>(call.pastValue.size(), 0.0F)};
    Buffer presentNodes{std::vector<int32_t>(nodes, 7)};
    Buffer workspace{workspaceSize};
    Buffer const& presentKey = shared ? pastKey : otherKey;
    Buffer const& presentValue = shared ? pastValue : otherValue;

    void const* const inputs[] = {query.data(), key.data(), value.data(), pastKey.data(), pastValue.data(),
        table.data(), pastLengths.data(), queryLengths.data(), pastNodes.data(), refresh.data()};
    void* const outputs[] = {output.data(), presentKey.data(), presentValue.data(), presentNodes.data()};
    cudaStream_t stream{};
    CHECK_CUDA(cudaStreamCreate(&stream));
    CHECK_EQUAL(
        attached.runtime->enqueue(tensors.data(), tensors.data() + kINPUTS, inputs, outputs, workspace.data(), stream),
        0);
    CHECK_CUDA(cudaStreamSynchronize(stream));
    CHECK_CUDA(cudaStreamDestroy(stream));

    CHECK(difference(output.read<float>(call.query.size()), call.output()) < 1e-4F);
    CHECK_EQUAL(difference(presentKey.read<float>(call.pastKey.size()), call.present(call.pastKey, call.key)), 0.0F);
    CHECK_EQUAL(
        difference(presentValue.read<float>(call.pastValue.size()), call.present(call.pastValue, call.value)), 0.0F);
    // Nothing was searched: all tokens fit.
    CHECK(presentNodes.read<int32_t>(nodes) == std::vector<int32_t>(nodes, -1));
}

} // namespace

void checkEnqueue(Library const& library, HostLogger& logger)
{
    int devices = 0;
    CHECK_CUDA(cudaGetDeviceCount(&devices));
    if (!CHECK(devices > 0))
    {
        return;
    }
    for (bool const shared : {false, true})
    {
        checkCall(library, Call{5, {5, 3}, 1}, shared); // ragged prefill on top of what is committed
        checkCall(library, Call{1, {1, 1}, 2}, shared); // decode
        checkCall(library, Call{1, {1, 0}, 3}, shared); // decode beside an idle row
    }
    CHECK_EQUAL(logger.take(), "");
}
