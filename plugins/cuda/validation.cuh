// What the kernels accept.
#pragma once

#include "hip_attention.h"

namespace hip_trt
{

// See hipTrtValidate. With `complete`, shape fields that are 0 are refused.
HipTrtStatus validate(
    const HipTrtConfig& config, const HipTrtShape& shape, bool complete, char* message, size_t message_size);

} // namespace hip_trt
