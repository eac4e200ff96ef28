"""``python -m hip_trt`` is ``hip-trt``."""

from hip_trt.cli import main

main()
