"""An exported .onnx executed node by node: ordinary nodes by PyTorch, HipAttention nodes by the real TensorRT plugin.

With it the exported graph and the plugin are proven together on GPUs that no installable TensorRT runs on.
"""

from graph_host.executor import GraphExecutor
from graph_host.graph import UnsupportedGraph
from graph_host.plugin import Plugin, PluginFailure

__all__ = ["GraphExecutor", "Plugin", "PluginFailure", "UnsupportedGraph"]
