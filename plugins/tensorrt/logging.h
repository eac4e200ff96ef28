// Messages of the plugin, sent to the logger that TensorRT hands to plugin libraries.
#pragma once

#include <NvInferRuntime.h>

#include <sstream>
#include <string>

namespace hip_trt
{

//! Join values into one message.
template <typename... Values>
std::string concat(Values const&... values)
{
    std::ostringstream text;
    (text << ... << values);
    return text.str();
}

//! Where messages go from now on; TensorRT calls this, through setLoggerFinder, when it loads the library.
void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

//! Report an error about one layer ("" when it has no name). Without a logger it goes to standard error.
void logError(std::string const& layer, std::string const& message) noexcept;

} // namespace hip_trt
