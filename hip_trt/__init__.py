"""hip-trt."""
