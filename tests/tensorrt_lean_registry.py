"""What TensorRT's lean runtime says of the plugin through its Python module, as JSON; a program of test_plugin.py.

    python tensorrt_lean_registry.py LIBRARY

In a process of its own, because the module must be gone before the library is. Its capability objects have properties
only: configure_plugin, enqueue and the like are there for plugins written in Python, which TensorRT calls, and do not
reach a plugin of another language. What can be called on those, plugin_host does through the same registry.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import tensorrt_lean as trt

from hip_trt import operator as names
from hip_trt.config import HipConfig


def main(library: str) -> None:
    registry = trt.get_plugin_registry()
    handle = registry.load_library(library)
    creator = registry.get_creator(names.OP_TYPE, "1", "")
    attributes = names.attributes(HipConfig(page_size=32), scale=0.125)
    types = {str: trt.PluginFieldType.CHAR, int: trt.PluginFieldType.INT32, float: trt.PluginFieldType.FLOAT32}
    arrays = {name: _array(value) for name, value in attributes.items()}  # a PluginField only points to its array
    fields = [trt.PluginField(name, arrays[name], types[type(value)]) for name, value in attributes.items()]
    collection = trt.PluginFieldCollection(fields)
    plugin = creator.create_plugin("layer", collection, trt.TensorRTPhase.BUILD)
    core, build, runtime = (plugin.get_capability_interface(getattr(trt.PluginCapabilityType, kind))
                            for kind in ("CORE", "BUILD", "RUNTIME"))
    print(json.dumps({
        "version": trt.__version__,
        "creator": [creator.name, creator.plugin_version, creator.plugin_namespace],
        "fields": sorted(field.name for field in creator.field_names),
        "kinds": [[type(part).__name__, part.interface_info.kind, part.interface_info.major]
                  for part in (core, build, runtime)],
        "plugin": [core.plugin_name, core.plugin_version, core.plugin_namespace],
        "outputs": build.num_outputs,
        "description": build.metadata_string,
    }))
    # The plugin's code must outlive all that refers to it.
    del core, build, runtime, plugin, creator
    registry.deregister_library(handle)


def _array(value: str | int | float) -> Any:
    if isinstance(value, str):
        return np.frombuffer(value.encode(), np.int8)
    return np.array([value], np.int32 if isinstance(value, int) else np.float32)


if __name__ == "__main__":
    main(sys.argv[1])
