// Two ways to the plugin: as TensorRT would load it, and through the plugin registry of a TensorRT that is there.
#include "plugin_host.h"
#include "plugin_host_check.h"

#include <dlfcn.h>

//! The plugin registry of TensorRT 11 and TensorRT-RTX: the one of the headers less its functions for IPluginV2, in the
//! same order. Like LaterLoggerInterface, it must not stand in an unnamed namespace.
class LaterRegistry
{
protected:
    virtual ~LaterRegistry() noexcept = default;

public:
    virtual void setErrorRecorder(nvinfer1::IErrorRecorder*) noexcept = 0;
    virtual nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept = 0;
    virtual bool isParentSearchEnabled() const = 0;
    virtual void setParentSearchEnabled(bool) = 0;
    virtual void* loadLibrary(char const* path) noexcept = 0;
    virtual void deregisterLibrary(void* handle) noexcept = 0;
    virtual bool registerCreator(nvinfer1::IPluginCreatorInterface&, char const*) noexcept = 0;
    virtual nvinfer1::IPluginCreatorInterface* const* getAllCreators(int32_t* count) const noexcept = 0;
    virtual nvinfer1::IPluginCreatorInterface* getCreator(
        char const* name, char const* version, char const* pluginNamespace) noexcept = 0;
};

namespace
{

//! The logger of TensorRT 11 and TensorRT-RTX, a versioned interface.
class LaterLogger final : public LaterLoggerInterface
{
public:
    explicit LaterLogger(nvinfer1::ILogger& logger)
        : mLogger{logger}
    {
    }

    nvinfer1::InterfaceInfo getInterfaceInfo() const noexcept override
    {
        return {"ILogger", 1, 0};
    }

    void log(nvinfer1::ILogger::Severity severity, char const* message) noexcept override
    {
        mLogger.log(severity, message);
    }

private:
    nvinfer1::ILogger& mLogger;
};

template <typename Function>
Function symbol(void* library, char const* name)
{
    auto const function = reinterpret_cast<Function>(dlsym(library, name));
    report(function != nullptr, __FILE__, __LINE__, std::string{"not exported: "} + name);
    return function;
}

void* open(char const* path, int flags)
{
    void* const handle = dlopen(path, flags);
    report(handle != nullptr, __FILE__, __LINE__, handle == nullptr ? dlerror() : "");
    return handle;
}

//! Keep a loaded library's own functions, and a creator.
bool bind(void* handle, nvinfer1::IPluginCreatorInterface* creator, Library& library)
{
    library.handle = handle;
    library.version = symbol<decltype(&hipTrtVersion)>(handle, "hipTrtVersion");
    library.workspaceSize = symbol<decltype(&hipTrtWorkspaceSize)>(handle, "hipTrtWorkspaceSize");
    library.workspaceSizeV2 = symbol<decltype(&hipTrtV2WorkspaceSize)>(handle, "hipTrtV2WorkspaceSize");
    if (!CHECK(creator != nullptr)
        || !CHECK_EQUAL(std::string{creator->getInterfaceInfo().kind}, "PLUGIN CREATOR_V3ONE"))
    {
        return false;
    }
    library.creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creator);
    return gFailures == 0;
}

//! The plugin library's entry for loggers, given the host's own.
void useHostLogger(void* handle, HostLogger& logger)
{
    static HostLoggerFinder finder{logger};
    if (auto const setLoggerFinder = symbol<void (*)(nvinfer1::ILoggerFinder*)>(handle, "setLoggerFinder"))
    {
        setLoggerFinder(&finder);
    }
}

template <typename Registry>
bool loadWith(Registry& registry, char const* path, Library& library)
{
    void* const registered = registry.loadLibrary(path);
    void* const handle = open(path, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD); // it must be loaded already
    if (!CHECK(registered != nullptr) || handle == nullptr)
    {
        return false;
    }
    library.unload = [&registry, registered, handle]
    {
        registry.deregisterLibrary(registered);
        // Of a library with several creators TensorRT-RTX 1.7 forgets the last only.
        CHECK(registry.getCreator("HipAttention", "2", "") == nullptr);
        dlclose(handle);
    };
    return bind(handle, registry.getCreator("HipAttention", gOperator.pluginVersion, ""), library);
}

} // namespace

bool load(char const* path, HostLogger& logger, Library& library)
{
    void* const handle = open(path, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr)
    {
        return false;
    }
    useHostLogger(handle, logger);
    auto const getCreators = symbol<nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&)>(handle, "getCreators");
    if (gFailures != 0)
    {
        return false;
    }
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* const creators = getCreators(count);
    library.unload = [handle] { dlclose(handle); };
    if (!CHECK_EQUAL(count, 2) || !CHECK(creators != nullptr))
    {
        return false;
    }
    for (int32_t i = 0; i < count; ++i)
    {
        auto* const creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
        if (gOperator.pluginVersion == std::string{creator->getPluginVersion()})
        {
            return bind(handle, creators[i], library);
        }
    }
    return report(false, __FILE__, __LINE__, "no creator of this version");
}

bool loadThrough(char const* tensorrt, char const* path, HostLogger& logger, Library& library)
{
    void* const handle = open(tensorrt, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr)
    {
        return false;
    }
    auto const version = symbol<int32_t (*)()>(handle, "getInferLibVersion");
    auto const registry = symbol<void* (*)()>(handle, "getPluginRegistry");
    auto const getLogger = symbol<void* (*)()>(handle, "getLogger");
    auto const createRuntime = symbol<void* (*)(void*, int32_t)>(handle, "createInferRuntime_INTERNAL");
    if (gFailures != 0)
    {
        return false;
    }
    // TensorRT-RTX began its versions again at 1.
    bool const later = version() < NV_TENSORRT_VERSION_INT(10, 0, 0) || version() >= NV_TENSORRT_VERSION_INT(11, 0, 0);
    // Plugins get the logger of TensorRT's first runtime or builder, so one is made.
    static LaterLogger laterLogger{logger};
    void* runtime =
        createRuntime(later ? static_cast<void*>(&laterLogger) : static_cast<nvinfer1::ILogger*>(&logger), version());
    std::string const refused = logger.take();
    if (!refused.empty())
    {
        // Where there is no GPU, or none that this TensorRT supports; what it returned may then not be a runtime.
        std::fprintf(stderr, "no runtime: %s", refused.c_str());
        runtime = nullptr;
    }
    bool const loaded = later ? loadWith(*static_cast<LaterRegistry*>(registry()), path, library)
                              : loadWith(*static_cast<nvinfer1::IPluginRegistry*>(registry()), path, library);
    if (!loaded)
    {
        return false;
    }
    if (getLogger() == nullptr)
    {
        useHostLogger(library.handle, logger); // TensorRT has none to give without a runtime
    }
    library.unload = [unloadPlugin = library.unload, runtime]
    {
        unloadPlugin();
        delete static_cast<nvinfer1::IRuntime*>(runtime);
    };
    std::fprintf(gReport, "loaded by TensorRT %d%s\n", version(), runtime == nullptr ? ", which made no runtime" : "");
    return true;
}
