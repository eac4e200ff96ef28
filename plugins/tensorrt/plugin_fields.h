// Plugin fields: the operator's attributes as TensorRT hands them over, and as an engine stores them.
#pragma once

#include "operator_versions.h"

#include <NvInferRuntime.h>

#include <optional>
#include <string>
#include <vector>

namespace hip_trt
{

//! Fields that an engine stores beside the attributes: the version of the operator that it computes, which this library's
//! must equal, and the version of hip-trt that built it, for the message where it does not.
constexpr char const* kOPERATOR_VERSION_FIELD = "operator_version";
constexpr char const* kHIP_TRT_VERSION_FIELD = "hip_trt_version";

//! The attributes of the operator, without values: what the ONNX parser reads from a node.
template <typename Version>
std::vector<nvinfer1::PluginField> attributeFields();

//! Read and check every field.
//!
//! When an engine is built, fields are exactly those of attributeFields(); when one is loaded, also the two above.
//!
//! \return The configuration, or nothing after each fault was reported by the name of its field, its value and what is
//!         allowed.
template <typename Version>
std::optional<typename Version::Config> parseFields(
    std::string const& layer, nvinfer1::PluginFieldCollection const* fields, nvinfer1::TensorRTPhase phase);

//! The fields that parseFields() reads back when an engine is loaded. They point into config, which must outlive them.
template <typename Version>
std::vector<nvinfer1::PluginField> serializeFields(typename Version::Config const& config);

//! The configuration in one line, for TensorRT's engine inspector.
template <typename Version>
std::string describe(typename Version::Config const& config);

} // namespace hip_trt
