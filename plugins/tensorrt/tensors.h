// The operator's tensors as TensorRT describes them: their order, types and dimensions.
#pragma once

#include "hip_attention.h"

#include <NvInferRuntime.h>

#include <optional>
#include <string>

namespace hip_trt
{

//! Inputs, in the order of the ONNX operator.
enum Input : int32_t
{
    kQUERY,
    kKEY,
    kVALUE,
    kPAST_KEY,
    kPAST_VALUE,
    kPAGE_TABLE,
    kPAST_LENGTHS,
    kQUERY_LENGTHS,
    kPAST_NODES,
    kREFRESH_MASK,
    kINPUTS
};

//! Outputs, in the order of the ONNX operator.
enum Output : int32_t
{
    kOUTPUT,
    kPRESENT_KEY,
    kPRESENT_VALUE,
    kPRESENT_NODES,
    kOUTPUTS
};

//! The input whose shape and type an output has.
constexpr Input kOUTPUT_LIKE[kOUTPUTS] = {kQUERY, kPAST_KEY, kPAST_VALUE, kPAST_NODES};

//! Name of a tensor; inputs are numbered from 0, and outputs follow them.
char const* tensorName(int32_t position);

//! Whether a tensor is of the floating-point type T, and not int32.
bool isFloatTensor(int32_t position);

//! The C ABI's name of a type, or nothing where the operator has no such type.
std::optional<HipTrtDataType> floatType(nvinfer1::DataType type);

//! Name of a type, for messages.
char const* typeName(nvinfer1::DataType type);

//! Read the operator's shape off the dimensions of its kINPUTS inputs, and check that they agree.
//!
//! A dimension of -1 is not known yet; the field is then 0, which hipTrtValidate() leaves unchecked. Head counts, head
//! size, page size and nodes must be known.
//!
//! \param message Receives what is wrong, naming the tensor.
std::optional<HipTrtShape> readShape(
    HipTrtConfig const& config, nvinfer1::DataType type, nvinfer1::Dims const* const* dims, std::string& message);

} // namespace hip_trt
