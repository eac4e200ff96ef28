// The operator's tensors as TensorRT describes them: their order, types and dimensions.
#pragma once

#include "hip_attention_v2.h"

#include <NvInferRuntime.h>

#include <cstdint>
#include <optional>
#include <string>

namespace hip_trt
{

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
    kKEPT,   // what an earlier call kept
    kBLOCKS, // of a decode call, in a page
    kWORDS,  // of a key's codes
    kCALL_KIND,
    kONE,
    kTWO,
    kAXES
};

struct TensorLayout
{
    char const* name;
    bool isFloat; // of type T, and not int32
    int32_t rank;
    Axis axes[5];
};

//! Inputs and outputs of one version of the operator, in the order of the ONNX operator.
struct Signature
{
    TensorLayout const* inputs;
    int32_t nbInputs;
    char const* const* outputNames;
    int32_t const* outputLike; // the input whose shape and type each output has
    int32_t nbOutputs;
    char const* keptName; // what the contract calls kKEPT
};

//! In every version the first input decides the type.
constexpr int32_t kQUERY = 0;

//! Sizes that the attributes decide.
struct AttributeSizes
{
    int64_t pageSize;
    int64_t kept;
    int64_t blocksPerPage;
    bool maskPerQueryHead;
};

//! One call, or the largest of several.
struct CallShape
{
    HipTrtShape shape;
    HipTrtCallKind kind; // HIP_TRT_ANY_CALL in version 1, and where it is not known
};

//! Name of a tensor; inputs are numbered from 0, and outputs follow them.
char const* tensorName(Signature const& signature, int32_t position);

//! Whether a tensor is of the floating-point type T, and not int32.
bool isFloatTensor(Signature const& signature, int32_t position);

//! The C ABI's name of a type, or nothing where the operator has no such type.
std::optional<HipTrtDataType> floatType(nvinfer1::DataType type);

//! Name of a type, for messages.
char const* typeName(nvinfer1::DataType type);

//! Read the operator's shape off the dimensions of its inputs, and check that they agree.
//!
//! A dimension of -1 is not known yet; the field is then 0, which hipTrtValidate() leaves unchecked. Head counts, head
//! size, page size and what is kept must be known.
//!
//! \param message Receives what is wrong, naming the tensor.
std::optional<CallShape> readShape(Signature const& signature, AttributeSizes const& known, nvinfer1::DataType type,
    nvinfer1::Dims const* const* dims, std::string& message);

} // namespace hip_trt
