#include "logging.h"

#include <dlfcn.h>

#include <iostream>
#include <mutex>

namespace hip_trt
{

using nvinfer1::ILogger;

// TensorRT 11 and TensorRT-RTX 1.7 made ILogger and ILoggerFinder versioned interfaces, which moved their functions
// within the virtual table. One binary of this library serves those and TensorRT 10, so it calls the loggers through
// declarations of its own, of either kind, and not through those of the headers that it happens to be compiled with.
// They stand outside the unnamed namespace below: there the compiler would conclude that nothing implements them.

struct PlainLogger // TensorRT 10
{
    virtual void log(ILogger::Severity severity, char const* message) noexcept = 0;
};

struct VersionedLogger : nvinfer1::IVersionedInterface // TensorRT 11, TensorRT-RTX
{
    virtual void log(ILogger::Severity severity, char const* message) noexcept = 0;
};

struct PlainLoggerFinder
{
    virtual void* findLogger() = 0;
};

struct VersionedLoggerFinder : nvinfer1::IVersionedInterface
{
    virtual void* findLogger() = 0;
};

namespace
{

//! The last finder that was set, and which kind it and its loggers are of.
struct FinderInUse
{
    void* finder{nullptr};
    bool versioned{false};
};

std::mutex gFinderMutex;
FinderInUse gFinder;

//! Version of the TensorRT that implements an object, as getInferLibVersion() gives it: 101401 is TensorRT 10.14.1 and
//! 10701 is TensorRT-RTX 1.7.1. Where that function is not found, the version of the headers.
int32_t implementationVersion(void* object)
{
    // Several TensorRT libraries may be loaded; the object's virtual table lies in the one that made it.
    Dl_info info{};
    void const* const virtualTable = *static_cast<void const* const*>(object);
    void* const library = dladdr(virtualTable, &info) != 0 && info.dli_fname != nullptr
        ? dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD)
        : nullptr;
    int32_t version = NV_TENSORRT_VERSION;
    if (library != nullptr)
    {
        if (auto const getVersion = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibVersion")))
        {
            version = getVersion();
        }
        dlclose(library);
    }
    return version;
}

bool hasVersionedLoggers(int32_t version)
{
    bool const isRtx = version < NV_TENSORRT_VERSION_INT(10, 0, 0); // its versions started again at 1
    return isRtx || version >= NV_TENSORRT_VERSION_INT(11, 0, 0);
}

//! Whether a message could be handed to TensorRT's logger.
bool logToTensorRT(std::string const& text)
{
    FinderInUse inUse;
    {
        std::lock_guard<std::mutex> const lock{gFinderMutex};
        inUse = gFinder;
    }
    if (inUse.finder == nullptr)
    {
        return false;
    }
    // Asked anew for each message: the answer is the logger of the builder or runtime that the calling thread is in.
    void* const logger = inUse.versioned ? static_cast<VersionedLoggerFinder*>(inUse.finder)->findLogger()
                                         : static_cast<PlainLoggerFinder*>(inUse.finder)->findLogger();
    if (logger == nullptr)
    {
        return false;
    }
    if (inUse.versioned)
    {
        static_cast<VersionedLogger*>(logger)->log(ILogger::Severity::kERROR, text.c_str());
    }
    else
    {
        static_cast<PlainLogger*>(logger)->log(ILogger::Severity::kERROR, text.c_str());
    }
    return true;
}

} // namespace

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept
{
    FinderInUse const inUse{finder, finder != nullptr && hasVersionedLoggers(implementationVersion(finder))};
    std::lock_guard<std::mutex> const lock{gFinderMutex};
    gFinder = inUse;
}

void logError(std::string const& layer, std::string const& message) noexcept
try
{
    std::string const text =
        layer.empty() ? concat("HipAttention: ", message) : concat("HipAttention (", layer, "): ", message);
    if (!logToTensorRT(text))
    {
        std::cerr << text << std::endl;
    }
}
catch (...)
{
    // A message that cannot be made must not end the process: every caller returns an error status too.
}

} // namespace hip_trt
