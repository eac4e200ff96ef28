"""Which shapes an engine accepts: the dynamic dimensions of the model graph, and their optimization profiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hip_trt import operator
from hip_trt.errors import EngineError
from hip_trt.runtime.executor import Limits
from hip_trt.sidecar import ProfileName, ProfileRecord, ShapeRange
from hip_trt.spec import ModelSpec

DEFAULT_MAX_BATCH = 4
DEFAULT_MAX_PREFILL = 2048
"""New tokens per call; the runtime splits longer prompts. Activations grow with it, and beyond about this many a GPU is
busy anyway."""
MAX_ELEMENTS = 2**31 - 1
"""Elements in one tensor, TensorRT's limit."""

_B, _S, _P, _M = "batch", "new tokens", "pages", "page slots"
_Dim = int | str


@dataclass(frozen=True)
class Range:
    """Smallest, usual and largest size of a dynamic dimension."""

    min: int
    opt: int
    max: int


def graph_shapes(spec: ModelSpec) -> dict[str, tuple[_Dim, ...]]:
    """Shape of every input of the model graph; dynamic dimensions by name."""
    shapes: dict[str, tuple[_Dim, ...]] = {
        operator.INPUT_IDS: (_B, _S),
        operator.PAST_LENGTHS: (_B,),
        operator.QUERY_LENGTHS: (_B,),
        operator.PAGE_TABLE: (_B, _M),
        operator.REFRESH_MASK: (1,),
    }
    for layer in range(spec.num_layers):
        for tensor in operator.STATE:
            shapes[tensor.past(layer)] = (_P if tensor.paged else _B, *spec.state_shape(tensor, 0)[1:])
    return shapes


@dataclass(frozen=True)
class EngineLimits:
    """Largest shapes of an engine, with nothing left open.

    Attributes:
        max_batch: sequences per call.
        max_prefill: new tokens per sequence and call.
        max_seq_len: tokens per sequence, prompt and generated together.
        max_pages: pages in the pool.
    """

    max_batch: int
    max_prefill: int
    max_seq_len: int
    max_pages: int

    @classmethod
    def resolve(
        cls,
        spec: ModelSpec,
        *,
        max_batch: int | None = None,
        max_prefill: int | None = None,
        max_seq_len: int | None = None,
        max_pages: int | None = None,
    ) -> EngineLimits:
        """Fill what is None: the model's own context length, and pages for ``max_batch`` sequences of ``max_seq_len``.

        Raises:
            EngineError: a value is out of range; the text names it and what is allowed.
        """
        batch = DEFAULT_MAX_BATCH if max_batch is None else max_batch
        length = spec.max_position_embeddings if max_seq_len is None else max_seq_len
        prefill = min(DEFAULT_MAX_PREFILL, length) if max_prefill is None else max_prefill
        page = spec.hip.page_size
        most_pages = MAX_ELEMENTS // (spec.num_key_value_heads * page * spec.head_dim)
        _require("max_batch", batch, 1, 1 << 16)
        _require("max_seq_len", length, 1, spec.max_position_embeddings, "the model's context length")
        _require("max_prefill", prefill, 1, length, "max_seq_len")
        per_sequence = -(-length // page)
        if max_pages is None:
            pages = batch * per_sequence
            if pages > most_pages:
                raise EngineError(
                    f"max_batch {batch} times max_seq_len {length} needs {pages} pages, and TensorRT's limit of "
                    f"2^31 - 1 elements per tensor allows {most_pages}.",
                    "Lower one of them, or name --max-pages.",
                )
        else:
            pages = max_pages
            _require("max_pages", pages, per_sequence, most_pages, "TensorRT's 2^31 - 1 elements per tensor")
        return cls(batch, prefill, length, pages)

    def as_limits(self) -> Limits:
        """The same, as the runtime's :class:`~hip_trt.runtime.executor.Limits`."""
        return Limits(self.max_batch, self.max_prefill, self.max_seq_len, self.max_pages)


def profiles(spec: ModelSpec, limits: EngineLimits) -> tuple[ProfileRecord, ...]:
    """The two optimization profiles: prefill, tuned for one long prompt, and decode, for a full batch.

    A decode call has exactly one new token, which lets TensorRT fix that dimension.
    """
    pages = Range(1, limits.max_pages, limits.max_pages)
    slots = -(-limits.max_seq_len // spec.hip.page_size)
    table = Range(1, slots, slots)
    prefill = {_B: Range(1, 1, limits.max_batch), _S: Range(1, limits.max_prefill, limits.max_prefill)}
    decode = {_B: Range(1, limits.max_batch, limits.max_batch), _S: Range(1, 1, 1)}
    shared = {_P: pages, _M: table}
    return (_profile("prefill", spec, prefill | shared), _profile("decode", spec, decode | shared))


def _profile(name: ProfileName, spec: ModelSpec, ranges: Mapping[str, Range]) -> ProfileRecord:
    def pick(shape: tuple[_Dim, ...], which: str) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else getattr(ranges[dim], which) for dim in shape)

    return ProfileRecord(name=name, shapes={
        tensor: ShapeRange(min=pick(shape, "min"), opt=pick(shape, "opt"), max=pick(shape, "max"))
        for tensor, shape in graph_shapes(spec).items()
        if any(isinstance(dim, str) for dim in shape)
    })


def _require(field: str, value: int, least: int, most: int, reason: str = "") -> None:
    if not least <= value <= most:
        because = f" ({reason})" if reason else ""
        raise EngineError(f"{field}: {value} is not allowed; it must be from {least} to {most}{because}.")
