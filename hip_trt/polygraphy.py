"""NVIDIA Polygraphy's command line in a process that has the plugin: ``python -m hip_trt.polygraphy run m.plan --trt``.

Polygraphy's own ``--plugins`` opens a library and no more, which registers only plugins that link TensorRT; this one is
loaded by TensorRT itself. All arguments are Polygraphy's. POLYGRAPHY_USE_TENSORRT_RTX says which TensorRT it takes;
where TensorRT-RTX alone is installed, it is set.
"""

from __future__ import annotations

import os
import sys

from hip_trt import library
from hip_trt.errors import EnvironmentProblem, HipTrtError
from hip_trt.tensorrt_flavour import find_flavour, installed

_RTX = "POLYGRAPHY_USE_TENSORRT_RTX"


def main() -> int:
    """Run Polygraphy on sys.argv; its exit status."""
    if "tensorrt" not in installed():
        os.environ.setdefault(_RTX, "1")
    try:
        rtx = os.environ.get(_RTX, "0") != "0"  # as Polygraphy reads it
        find_flavour("tensorrt-rtx" if rtx else "tensorrt").load_plugin(library.plugin_path())
        try:
            from polygraphy.tools import main as polygraphy  # after the environment is set: it reads it at import
        except ImportError as error:
            raise EnvironmentProblem(
                f"Polygraphy cannot be imported: {error}.", "Install it: pip install polygraphy"
            ) from None
    except HipTrtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return int(polygraphy() or 0)


if __name__ == "__main__":
    sys.exit(main())
