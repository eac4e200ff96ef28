// Drives libhip_trt_plugin.so through TensorRT's own plugin interfaces.
//
//   plugin_host LIBRARY interfaces     everything up to enqueue; needs no GPU
//   plugin_host LIBRARY calls          execution of the calls given on standard input (plugin_host_calls.cpp)
//
// No TensorRT is needed. With --tensorrt PATH first, the plugin is loaded by the plugin registry of that TensorRT
// library, such as libnvinfer_lean.so.11. With --operator 2 first, version 2 of the operator is driven, and not
// version 1. Prints what failed, and exits with 0 only if nothing did.
#include "plugin_host.h"

#include "plugin_host_check.h"

#include <stdexcept>

int main(int argc, char** argv)
{
    std::vector<std::string> arguments(argv + 1, argv + argc);
    std::string tensorrt, version = gOperator.pluginVersion;
    while (arguments.size() >= 4 && (arguments[0] == "--tensorrt" || arguments[0] == "--operator"))
    {
        (arguments[0] == "--tensorrt" ? tensorrt : version) = arguments[1];
        arguments.erase(arguments.begin(), arguments.begin() + 2);
    }
    if (!chooseOperator(version) || arguments.size() != 2 || (arguments[1] != "interfaces" && arguments[1] != "calls"))
    {
        std::fprintf(stderr, "usage: plugin_host [--tensorrt TENSORRT] [--operator 1|2] LIBRARY interfaces|calls\n");
        return 2;
    }
    gReport = arguments[1] == "calls" ? stderr : stdout; // calls are answered on standard output
    char const* const path = arguments[0].c_str();
    HostLogger logger;
    Library library;
    if (tensorrt.empty() ? load(path, logger, library) : loadThrough(tensorrt.c_str(), path, logger, library))
    {
        try
        {
            (arguments[1] == "interfaces" ? checkInterfaces : runCalls)(library, logger);
        }
        catch (std::runtime_error const& error)
        {
            std::fprintf(gReport, "no plugin with %s\n", error.what());
        }
        library.unload();
    }
    std::fprintf(gReport, "%s: %d checks, %d failed\n", arguments[1].c_str(), gChecks, gFailures);
    return gFailures == 0 ? 0 : 1;
}
