#include "logging.h"

#include <atomic>
#include <iostream>

namespace hip_trt
{
namespace
{

std::atomic<nvinfer1::ILoggerFinder*> gLoggerFinder{nullptr};

} // namespace

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept
{
    gLoggerFinder = finder;
}

void logError(std::string const& layer, std::string const& message) noexcept
try
{
    std::string const text =
        layer.empty() ? concat("HipAttention: ", message) : concat("HipAttention (", layer, "): ", message);
    nvinfer1::ILoggerFinder* const finder = gLoggerFinder;
    // The finder must be asked each time: it answers for the builder or runtime of the calling thread.
    if (nvinfer1::ILogger* const logger = finder == nullptr ? nullptr : finder->findLogger())
    {
        logger->log(nvinfer1::ILogger::Severity::kERROR, text.c_str());
    }
    else
    {
        std::cerr << text << std::endl;
    }
}
catch (...)
{
    // A message that cannot be made must not end the process: every caller returns an error status too.
}

} // namespace hip_trt
