"""``python -m hip_trt`` is ``hip-trt``."""

import os
import sys

from hip_trt.cli import main

if sys.path and sys.path[0] == os.getcwd():  # what -m puts there: a model folder may hold Python files
    del sys.path[0]
main()
