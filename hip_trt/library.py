"""The plugin library ``libhip_trt_plugin.so``: where it is, and its C ABI (plugins/cuda/hip_attention.h) by ctypes.

TensorRT loads the same library for its plugin; here it is called directly, on PyTorch tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, resources
from pathlib import Path

import torch
from torch import Tensor

from hip_trt import operator as names
from hip_trt.config import HipConfig
from hip_trt.config_v2 import HipConfigV2
from hip_trt.decode_library import ANY_CALL, FUNCTIONS_V2, INPUTS, TYPES, ConfigV2Struct, ParamsV2Struct, ShapeStruct
from hip_trt.errors import ConfigError, PluginError, RuntimeInputError
from hip_trt.spec import ModelSpec

ABI_VERSION = 1
"""HIP_TRT_ABI_VERSION of the header that this module mirrors."""

_CUDA_ERROR = 4


class ConfigStruct(ctypes.Structure):
    """HipTrtConfig."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in (
            "mask_k", "decode_mask_k", "block_q", "block_k", "stride_q", "stride_k", "branch", "leaf_branch",
            "reuse_level", "page_size", "sink_tokens", "window_tokens", "mask_per_query_head", "dense",
        )),
        ("scale", ctypes.c_float),
    ]


class ParamsStruct(ctypes.Structure):
    """HipTrtParams."""

    _fields_ = [
        ("config", ConfigStruct), ("shape", ShapeStruct),
        *((name, ctypes.c_void_p) for name in (*names.INPUTS, *names.OUTPUTS, "chosen_blocks", "workspace")),
        ("workspace_size", ctypes.c_size_t),
    ]


@dataclass(frozen=True)
class Shape:
    """Sizes of a call, named as in the header. Those with default 0 may be left open when asking :meth:`validate`.

    Attributes:
        dtype: float16, bfloat16 or float32.
        num_query_heads, num_kv_heads, head_dim: Hq, Hkv, D.
        batch: B.
        new_tokens: S; 1 is a decode step.
        num_pages: P, pages in the pool.
        pages_per_sequence: M, slots in a row of the page table.
    """

    dtype: torch.dtype
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    batch: int = 0
    new_tokens: int = 0
    num_pages: int = 0
    pages_per_sequence: int = 0


class Library:
    """A loaded plugin library.

    Args:
        path: of the library file.

    Raises:
        PluginError: it is missing, cannot be loaded, or is of another version than this package.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise PluginError(
                f"{self.path}: no such plugin library.",
                "Install hip-trt where a CUDA compiler can be had, and without the option that leaves the plugin out.",
            )
        try:
            self._functions = ctypes.CDLL(str(self.path))
            for name, result, arguments in (
                ("hipTrtAbiVersion", ctypes.c_int32, ()),
                ("hipTrtOperatorVersion", ctypes.c_int32, ()),
                ("hipTrtVersion", ctypes.c_char_p, ()),
                ("hipTrtStatusText", ctypes.c_char_p, (ctypes.c_int,)),
                ("hipTrtLastCudaError", ctypes.c_char_p, ()),
                ("hipTrtValidate", ctypes.c_int, (
                    ctypes.POINTER(ConfigStruct), ctypes.POINTER(ShapeStruct), ctypes.c_char_p, ctypes.c_size_t)),
                ("hipTrtWorkspaceSize", ctypes.c_int, (
                    ctypes.POINTER(ConfigStruct), ctypes.POINTER(ShapeStruct), ctypes.POINTER(ctypes.c_size_t))),
                ("hipTrtAttention", ctypes.c_int, (ctypes.POINTER(ParamsStruct), ctypes.c_void_p)),
                *FUNCTIONS_V2,
                ("hipTrtOffloadAttach", ctypes.c_int, (ctypes.c_void_p,)),
                ("hipTrtOffloadDetach", ctypes.c_int, (ctypes.c_void_p,)),
                ("hipTrtOffloadForget", ctypes.c_int, (ctypes.c_void_p, ctypes.c_void_p)),
                ("hipTrtOffloadLaneCreate", ctypes.c_int, (ctypes.POINTER(ctypes.c_void_p),)),
                ("hipTrtOffloadLaneDestroy", ctypes.c_int, (ctypes.c_void_p,)),
            ):
                function = getattr(self._functions, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise PluginError(f"{self.path}: cannot be loaded: {error}.", "Install hip-trt again.") from None
        here = (self.version, *(
            int(function()) for function in (self._functions.hipTrtOperatorVersion, self._functions.hipTrtAbiVersion)
        ))
        package = (metadata.version("hip-trt"), names.OP_VERSION, ABI_VERSION)
        if here != package:
            raise PluginError(
                "{}: version {} with operator {} and ABI {}, but the package is version {} with operator {} and ABI {}."
                .format(self.path, *here, *package), "Install hip-trt again, so that both come from one build.",
            )

    @property
    def version(self) -> str:
        """The package version that the library was built from."""
        version: bytes = self._functions.hipTrtVersion()
        return version.decode()

    def validate(self, config: HipConfig, shape: Shape, *, scale: float = 1.0, dense: bool = False) -> None:
        """Refuse what no kernel computes. Touches no GPU.

        Raises:
            ConfigError: naming the field, its value and what is allowed.
        """
        message = ctypes.create_string_buffer(512)
        status = self._functions.hipTrtValidate(
            _config_struct(config, scale, dense), _shape_struct(shape), message, len(message)
        )
        if status != 0:
            raise ConfigError(f"{message.value.decode()}.", "No CUDA kernel computes this configuration.")

    def workspace_size(self, config: HipConfig, shape: Shape, *, dense: bool = False) -> int:
        """Bytes that a call of this shape, or of a smaller batch, new_tokens or number of pages, needs.

        Raises:
            ConfigError: as :meth:`validate`; no size may be 0.
        """
        size = ctypes.c_size_t()
        status = self._functions.hipTrtWorkspaceSize(
            _config_struct(config, 1.0, dense), _shape_struct(shape), ctypes.byref(size)
        )
        if status != 0:
            self.validate(config, shape, dense=dense)
            raise ConfigError(f"{shape}: a size is 0.", "Give every size to learn what a call needs.")
        return size.value

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        page_table: Tensor,
        past_lengths: Tensor,
        query_lengths: Tensor,
        past_nodes: Tensor,
        refresh_mask: Tensor,
        *,
        config: HipConfig,
        scale: float,
        dense: bool = False,
        output: Tensor | None = None,
        present_key: Tensor | None = None,
        present_value: Tensor | None = None,
        present_nodes: Tensor | None = None,
        chosen_blocks: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """:func:`hip_trt.reference.hip_attention` on contiguous CUDA tensors, on PyTorch's current stream.

        Contents (lengths, page table, refresh_mask) are not checked: the kernels read them on the device only.

        Args:
            output, present_key, present_value, present_nodes: where results go; None allocates. A present tensor may be
                its past tensor: then nothing but the new rows is written.
            chosen_blocks: [B, Hm, ceil(S / block_q), K] int32, where the chosen blocks go, ascending, then -1; None if
                not wanted.
            workspace: at least :meth:`workspace_size` bytes; None allocates.

        Returns:
            output, present_key, present_value and present_nodes.

        Raises:
            ConfigError: no kernel computes the configuration.
            RuntimeInputError: a tensor's shape, type, device or layout does not fit.
            PluginError: a kernel could not be launched.
        """
        for name, tensor, rank in (("query", query, 4), ("key", key, 4), ("past_key", past_key, 4),
                                   ("page_table", page_table, 2)):
            if tensor.dim() != rank:
                raise RuntimeInputError(f"{name}: shape {list(tensor.shape)}; it must have {rank} dimensions.")
        batch, query_heads, new_tokens, head_dim = query.shape
        shape = Shape(
            query.dtype, query_heads, key.shape[1], head_dim, batch, new_tokens, past_key.shape[0], page_table.shape[1]
        )
        if workspace is None:
            workspace = query.new_empty(self.workspace_size(config, shape, dense=dense), dtype=torch.uint8)
        tensors = {
            "query": query, "key": key, "value": value, "past_key": past_key, "past_value": past_value,
            "page_table": page_table, "past_lengths": past_lengths, "query_lengths": query_lengths,
            "past_nodes": past_nodes, "refresh_mask": refresh_mask,
            "output": torch.empty_like(query) if output is None else output,
            "present_key": torch.empty_like(past_key) if present_key is None else present_key,
            "present_value": torch.empty_like(past_value) if present_value is None else present_value,
            "present_nodes": torch.empty_like(past_nodes) if present_nodes is None else present_nodes,
        }
        if chosen_blocks is not None:
            tensors["chosen_blocks"] = chosen_blocks
        _check_layout(tensors, _shapes(config, shape), shape.dtype)
        params = ParamsStruct(
            config=_config_struct(config, scale, dense), shape=_shape_struct(shape), workspace=workspace.data_ptr(),
            workspace_size=workspace.nbytes, **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )
        with self._stream(query.device) as stream:
            status = self._functions.hipTrtAttention(ctypes.byref(params), stream)
        if status != 0:
            self.validate(config, shape, scale=scale, dense=dense)
            raise self._failure(status, query.device)
        return tensors["output"], tensors["present_key"], tensors["present_value"], tensors["present_nodes"]

    def validate_v2(
        self, config: HipConfigV2, shape: Shape, *, kind: int = ANY_CALL, scale: float = 1.0, dense: bool = False
    ) -> None:
        """:meth:`validate` for version 2.

        Args:
            kind: size of call_kind; by default both are asked for, and ``shape.new_tokens`` is prefill's.
        """
        message = ctypes.create_string_buffer(512)
        status = self._functions.hipTrtV2Validate(
            _config_v2_struct(config, scale, dense), _shape_struct(shape), kind, message, len(message)
        )
        if status != 0:
            raise ConfigError(f"{message.value.decode()}.", "No CUDA kernel computes this configuration.")

    def workspace_size_v2(
        self, config: HipConfigV2, shape: Shape, *, kind: int = ANY_CALL, dense: bool = False
    ) -> int:
        """:meth:`workspace_size` for version 2; ``kind`` as in :meth:`validate_v2`."""
        size = ctypes.c_size_t()
        status = self._functions.hipTrtV2WorkspaceSize(
            _config_v2_struct(config, 1.0, dense), _shape_struct(shape), kind, ctypes.byref(size)
        )
        if status != 0:
            self.validate_v2(config, shape, kind=kind, dense=dense)
            raise ConfigError(f"{shape}: a size is 0.", "Give every size to learn what a call needs.")
        return size.value

    def attention_v2(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        page_table: Tensor,
        past_lengths: Tensor,
        query_lengths: Tensor,
        past_bounds: Tensor,
        past_codes: Tensor,
        past_blocks: Tensor,
        refresh_mask: Tensor,
        call_kind: Tensor,
        *,
        config: HipConfigV2,
        scale: float,
        dense: bool = False,
        output: Tensor | None = None,
        present_key: Tensor | None = None,
        present_value: Tensor | None = None,
        present_bounds: Tensor | None = None,
        present_codes: Tensor | None = None,
        present_blocks: Tensor | None = None,
        chosen_blocks: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """:func:`hip_trt.reference.operator_v2.hip_attention_v2` on contiguous CUDA tensors.

        It runs on PyTorch's current stream.
        Contents are not checked: the kernels read them on the device only. Of call_kind only the size counts.

        Args:
            output, present_key, present_value, present_bounds, present_codes, present_blocks: where results go; None
                allocates. A present tensor may be its past tensor: then nothing but what is new is written.
            chosen_blocks: [B, Hm, ceil(S / block_q), K] int32, K being ``config.mask_blocks``: where the chosen blocks
                of a prefill go, ascending, then -1; None if not wanted. A decode call tells them by present_blocks.
            workspace: at least :meth:`workspace_size_v2` bytes; None allocates.

        Returns:
            output, present_key, present_value, present_bounds, present_codes and present_blocks.

        Raises:
            ConfigError: no kernel computes the configuration.
            RuntimeInputError: a tensor's shape, type, device or layout does not fit.
            PluginError: a kernel could not be launched.
        """
        batch, query_heads, new_tokens, head_dim = query.shape
        shape = Shape(
            query.dtype, query_heads, key.shape[1], head_dim, batch, new_tokens, past_key.shape[0], page_table.shape[1]
        )
        kind = call_kind.numel()
        if kind not in (names.PREFILL, names.DECODE):
            raise RuntimeInputError(f"call_kind: shape {list(call_kind.shape)} does not fit; it must be [1] for "
                                    "prefill or [2] for decode.")
        if chosen_blocks is not None and kind == names.DECODE:
            raise RuntimeInputError("chosen_blocks: a decode call has none.", "present_blocks are what it chose.")
        if workspace is None:
            workspace = query.new_empty(
                self.workspace_size_v2(config, shape, kind=kind, dense=dense), dtype=torch.uint8
            )
        inputs = (query, key, value, past_key, past_value, page_table, past_lengths, query_lengths, past_bounds,
                  past_codes, past_blocks, refresh_mask)
        results = (output, present_key, present_value, present_bounds, present_codes, present_blocks)
        tensors = dict(zip(INPUTS, inputs, strict=True))
        for name, result in zip(names.OUTPUTS_V2, results, strict=True):
            like = tensors[names.STATE_V2.get(name, "query")]
            tensors[name] = torch.empty_like(like) if result is None else result
        if chosen_blocks is not None:
            tensors["chosen_blocks"] = chosen_blocks
        _check_layout(tensors, _shapes_v2(config, shape), shape.dtype)
        params = ParamsV2Struct(
            config=_config_v2_struct(config, scale, dense), shape=_shape_struct(shape), call_kind=kind,
            workspace=workspace.data_ptr(), workspace_size=workspace.nbytes,
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )
        with self._stream(query.device) as stream:
            status = self._functions.hipTrtV2Attention(ctypes.byref(params), stream)
        if status != 0:
            self.validate_v2(config, shape, kind=kind, scale=scale, dense=dense)
            raise self._failure(status, query.device)
        found, *present = (tensors[name] for name in names.OUTPUTS_V2)
        return found, present[0], present[1], present[2], present[3], present[4]

    def _failure(self, status: int, device: torch.device) -> PluginError:
        """What a call's status says, where the configuration is not at fault."""
        text, remedy = self._functions.hipTrtStatusText(status).decode(), ""
        if status == _CUDA_ERROR:
            name = self._functions.hipTrtLastCudaError().decode()
            text = f"{text}: {name}"
            if name == "cudaErrorNoKernelImageForDevice":
                remedy = "Build hip-trt for this GPU: set HIP_TRT_CUDA_ARCHITECTURES=native and install it again."
        return PluginError(f"HipAttention on {device}: {text}.", remedy)

    def attach_offload(self, offload: ctypes.Structure) -> None:
        """Serve calls on pools in host memory through caches: see :class:`hip_trt.offload.BlockCaches`.

        Raises:
            PluginError: a pointer or size of the struct is not valid.
        """
        status = self._functions.hipTrtOffloadAttach(ctypes.byref(offload))
        if status != 0:
            raise PluginError(f"hipTrtOffloadAttach: {self._functions.hipTrtStatusText(status).decode()}.")

    def detach_offload(self, key_pool: Tensor) -> None:
        """Use a pool as plain memory from now on."""
        self._functions.hipTrtOffloadDetach(key_pool.data_ptr())

    def create_offload_lane(self, device: torch.device) -> int:
        """A HipTrtOffloadLane on a GPU: its address.

        Raises:
            PluginError: the GPU refused.
        """
        lane = ctypes.c_void_p()
        with self._stream(device):
            status = self._functions.hipTrtOffloadLaneCreate(ctypes.byref(lane))
        if status != 0 or lane.value is None:
            raise PluginError(f"hipTrtOffloadLaneCreate: {self._functions.hipTrtStatusText(status).decode()}.")
        return lane.value

    def destroy_offload_lane(self, lane: int) -> None:
        """Wait for what runs in it, and release it."""
        self._functions.hipTrtOffloadLaneDestroy(lane)

    def forget_offload(self, key_pool: Tensor) -> None:
        """Empty the caches of a pool, on PyTorch's current stream.

        Raises:
            PluginError: the GPU refused.
        """
        with self._stream(key_pool.device) as stream:
            status = self._functions.hipTrtOffloadForget(key_pool.data_ptr(), stream)
        if status != 0:
            raise PluginError(f"hipTrtOffloadForget: {self._functions.hipTrtStatusText(status).decode()}.")

    @contextmanager
    def _stream(self, device: torch.device) -> Iterator[int]:
        """The current stream of a device, which is made the current device."""
        if device.type != "cuda":
            raise RuntimeInputError(f"query: device {device} is not allowed.", "It must be a CUDA device.")
        with torch.cuda.device(device):
            yield torch.cuda.current_stream(device).cuda_stream


def plugin_path() -> Path:
    """The library that was installed with this package.

    Raises:
        PluginError: the package was installed without it.
    """
    # Asked for as a resource: an editable install keeps it apart from the Python files.
    path = Path(str(resources.files("hip_trt") / "libhip_trt_plugin.so"))
    if not path.is_file():
        raise PluginError(
            f"{path}: the plugin library was not installed.",
            "Install hip-trt again, without the option that leaves the plugin out.",
        )
    return path


@lru_cache(maxsize=1)
def load() -> Library:
    """The installed library, loaded once.

    Raises:
        PluginError: it is missing, cannot be loaded, or is of another version than this package.
    """
    return Library(plugin_path())


def version() -> str:
    """The package version that the installed library was built from; see :func:`load`."""
    return load().version


def validate(spec: ModelSpec) -> None:
    """Refuse a model that the installed library's kernels do not compute.

    Raises:
        ConfigError: naming the field, its value and what is allowed.
        PluginError: see :func:`load`.
    """
    load().validate(
        spec.hip, Shape(spec.torch_dtype, spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim)
    )


def _config_struct(config: HipConfig, scale: float, dense: bool) -> ConfigStruct:
    fields = {name: getattr(config, name) for name in names.INT_ATTRIBUTES if name != "dense"}
    return ConfigStruct(**fields, mask_per_query_head=config.mask_heads == "query", dense=dense, scale=scale)


def _config_v2_struct(config: HipConfigV2, scale: float, dense: bool) -> ConfigV2Struct:
    fields = {name: getattr(config, name) for name in names.INT_ATTRIBUTES_V2 if name != "dense"}
    return ConfigV2Struct(
        **fields, mask_per_query_head=config.mask_heads == "query", dense=dense, scale=scale,
        value_threshold=config.value_threshold,
    )


def _shape_struct(shape: Shape) -> ShapeStruct:
    if shape.dtype not in TYPES:
        raise ConfigError(f"type: {shape.dtype} is not supported; it must be float16, bfloat16 or float32.")
    fields = {name: getattr(shape, name) for name, _ in ShapeStruct._fields_ if name != "type"}  # type: ignore[misc]
    return ShapeStruct(type=TYPES[shape.dtype], **fields)


def _shapes(config: HipConfig, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Of every tensor of a call but query."""
    decode = shape.new_tokens == 1
    nodes = (shape.batch, config.num_masks(shape.num_query_heads, shape.num_kv_heads), config.decode_mask_blocks)
    return {
        **_common_shapes(config, shape, config.decode_mask_blocks if decode else config.mask_blocks),
        "past_nodes": nodes, "refresh_mask": (1,), "present_nodes": nodes,
    }


def _shapes_v2(config: HipConfigV2, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Of every tensor of a call of version 2 but query and call_kind."""
    pages, heads, dim = shape.num_pages, shape.num_kv_heads, shape.head_dim
    past = {
        "bounds": (pages, heads, config.page_size // config.decode_block_k, 2, dim),
        "codes": (pages, heads, config.page_size, dim // 16),
        "blocks": (shape.batch, config.num_masks(shape.num_query_heads, heads), config.decode_mask_blocks),
    }
    return {
        **_common_shapes(config, shape, config.mask_blocks), "refresh_mask": (shape.batch,),
        **{f"{when}_{name}": sizes for name, sizes in past.items() for when in ("past", "present")},
    }


def _common_shapes(config: HipConfig, shape: Shape, chosen: int) -> dict[str, tuple[int, ...]]:
    """Of what both versions have."""
    masks = config.num_masks(shape.num_query_heads, shape.num_kv_heads)
    new = (shape.batch, shape.num_kv_heads, shape.new_tokens, shape.head_dim)
    pool = (shape.num_pages, shape.num_kv_heads, config.page_size, shape.head_dim)
    return {
        "key": new, "value": new, "past_key": pool, "past_value": pool,
        "page_table": (shape.batch, shape.pages_per_sequence), "past_lengths": (shape.batch,),
        "query_lengths": (shape.batch,), "present_key": pool, "present_value": pool,
        "output": (shape.batch, shape.num_query_heads, shape.new_tokens, shape.head_dim),
        "chosen_blocks": (shape.batch, masks, -(-shape.new_tokens // config.block_q), chosen),
    }


def _check_layout(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], float_type: torch.dtype) -> None:
    device = tensors["query"].device
    for name, tensor in tensors.items():
        dtype = torch.int32 if name in _INTEGER_TENSORS else float_type
        if tuple(tensor.shape) != expected.get(name, tuple(tensor.shape)):
            raise RuntimeInputError(f"{name}: shape {list(tensor.shape)} does not fit; it must be "
                                    f"{list(expected[name])}.")
        if tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
            layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
            raise RuntimeInputError(f"{name}: {tensor.dtype} on {tensor.device}, {layout}, does not fit; it must be "
                                    f"{dtype} on {device}, contiguous.")


_INTEGER_TENSORS = {
    "page_table", "past_lengths", "query_lengths", "past_nodes", "refresh_mask", "present_nodes", "chosen_blocks",
    "past_codes", "past_blocks", "present_codes", "present_blocks",
}
