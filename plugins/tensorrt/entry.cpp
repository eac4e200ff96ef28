// What TensorRT calls when it loads the library (IPluginRegistry::loadLibrary).
#include "hip_attention.h"
#include "hip_attention_creator.h"
#include "logging.h"
#include "operator_versions.h"

extern "C" HIP_TRT_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    hip_trt::setLoggerFinder(finder);
}

extern "C" HIP_TRT_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
{
    static hip_trt::HipAttentionCreator<hip_trt::Version1> first;
    static hip_trt::HipAttentionCreator<hip_trt::Version2> second;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&first, &second};
    nbCreators = 2;
    return creators;
}
