"""Feeds a library nonsense through its C ABI: python nonsense.py LIBRARY PART SEED COUNT.

Run in a process of its own, so that a fault is a failure of the test. What is about to be called is printed first.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from decode_cluster_cases import decode_case
from emulated import EmulatedLibrary
from kernel_checks import Results, run, same_bits
from operator_cases import SMALL, Case, make_inputs, named
from torch import Tensor

from hip_trt import decode_library
from hip_trt import library as binding
from hip_trt.offload import block_caches

SUCCESS, INVALID, UNSUPPORTED, TOO_SMALL = range(4)
REFUSED = {INVALID, UNSUPPORTED, TOO_SMALL}
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
NUMBERS = (INT_MIN, INT_MIN + 1, -16, -1, 0, 1, 2, 3, 7, 8, 16, 64, 100, 128, 4096, 65535, 65536, 1 << 20, 1 << 22,
           (1 << 22) + 1, 1 << 30, INT_MAX - 1, INT_MAX)
SHAPE = {"type": 0, "batch": 2, "new_tokens": 1, "num_query_heads": 4, "num_kv_heads": 2, "head_dim": 64,
         "num_pages": 8, "pages_per_sequence": 4}
DECODE = decode_library.DecodeSettings(mask_k=64, search_k=256, page_size=64)
TOO_MUCH = (
    {"batch": 65535, "new_tokens": 1 << 22, "num_query_heads": 65535, "num_kv_heads": 65535},
    {"batch": 65535, "new_tokens": 1 << 22, "num_query_heads": 64, "num_kv_heads": 64, "head_dim": 128},
    {"new_tokens": 1 << 22, "num_query_heads": 512, "num_kv_heads": 512},
    {"num_pages": INT_MAX, "num_kv_heads": 65535, "num_query_heads": 65535},
)
"""Sizes that are allowed each for itself, whose product overflows 32 or 64 bits."""


CALL_KINDS = (0, 1, 2)
"""Any, prefill, decode; see hip_attention_v2.h."""


def _of_kind(function: Any, kind: int, config: Any, shape: Any, *rest: Any) -> int:
    return int(function(config, shape, kind, *rest))


class Nonsense:
    """One library and a source of chance."""

    def __init__(self, path: str, seed: int) -> None:
        self.library = EmulatedLibrary(path)
        self.functions = ctypes.CDLL(path)
        self.random = random.Random(seed)
        self.tensor = torch.zeros(1 << 16, dtype=torch.uint8)
        self.address = self.tensor.data_ptr()
        assert self.address % 16 == 0

    def expect(self, statuses: set[int], what: str, function: Callable[..., int], *arguments: Any) -> int:
        print(what, flush=True)
        status = function(*arguments)
        assert status in statuses, f"status {status}: {what}"
        return status

    def config(self, kind: type, *, sensible: float) -> Any:
        """A configuration whose fields are sensible with that probability, and nonsense else."""
        good = DECODE.struct() if kind is decode_library.ConfigV2Struct else binding._config_struct(SMALL, 0.1, False)
        return self._spoil(good, sensible)

    def shape(self, kind: type, *, sensible: float) -> Any:
        return self._spoil(kind(**SHAPE), sensible)

    def _spoil(self, struct: Any, sensible: float) -> Any:
        for name, ctype in struct._fields_:
            if self.random.random() < sensible:
                continue
            number = ctype is ctypes.c_int32
            setattr(struct, name, self.random.choice(NUMBERS if number else (float("nan"), float("inf"), -1.0, 0.0)))
        return struct

    # Parts

    def questions(self, count: int) -> None:
        """What touches no memory but its arguments: any fields at all, null pointers, messages of any length."""
        for validate, workspace, config_kind, shape_kind in self._questions():
            for _ in range(count):
                sensible = self.random.choice((0.0, 0.5, 0.9, 0.95))
                config, shape = self.config(config_kind, sensible=sensible), self.shape(shape_kind, sensible=sensible)
                described = f"{config_kind.__name__} {_text(config)} {_text(shape)}"
                size = self.random.choice((0, 1, 2, 20, 512))
                message = ctypes.create_string_buffer(b"\x7f" * 600, 600)
                allowed = {SUCCESS, INVALID, UNSUPPORTED}
                both = ctypes.byref(config), ctypes.byref(shape)
                status = self.expect(allowed, described, validate, *both, message, size)
                assert message.raw[size:] == b"\x7f" * (600 - size), "written behind the message"
                assert size == 0 or b"\0" in message.raw[:size]
                assert status == SUCCESS or size < 20 or message.value
                bytes_ = ctypes.c_size_t(123)
                status = self.expect(allowed, described, workspace, *both, ctypes.byref(bytes_))
                assert bytes_.value <= 1 << 50 if status == SUCCESS else bytes_.value == 123
            for nulls in range(1, 8):
                arguments = [ctypes.byref(self.config(config_kind, sensible=1)), ctypes.byref(
                    self.shape(shape_kind, sensible=1)), ctypes.byref(ctypes.c_size_t())]
                given = [None if nulls >> index & 1 else value for index, value in enumerate(arguments)]
                self.expect({INVALID}, f"workspace, nulls {nulls:b}", workspace, *given)
                if nulls & 3:
                    self.expect({INVALID}, f"validate, nulls {nulls:b}", validate, given[0], given[1], None, 512)

    def _questions(self) -> Iterator[tuple[Any, Any, type, type]]:
        yield (self.functions.hipTrtValidate, self.functions.hipTrtWorkspaceSize, binding.ConfigStruct,
               binding.ShapeStruct)
        for kind in CALL_KINDS:
            yield (partial(_of_kind, self.functions.hipTrtV2Validate, kind),
                   partial(_of_kind, self.functions.hipTrtV2WorkspaceSize, kind),
                   decode_library.ConfigV2Struct, decode_library.ShapeStruct)

    def calls(self, count: int) -> None:
        """Calls with something wrong in them, which launch nothing: all pointers lead to one small buffer."""
        kinds: list[tuple[Any, type, Any, set[str]]] = [
            (self.functions.hipTrtAttention, binding.ParamsStruct, binding._config_struct(SMALL, 0.1, False),
             {"chosen_blocks"}),
        ]
        append = {"query", "past_blocks", "refresh_mask", "output", "present_blocks", "chosen_blocks", "workspace"}
        kinds += [(self.functions.hipTrtV2Attention, decode_library.ParamsV2Struct, DECODE.struct(), {"chosen_blocks"}),
                  (self.functions.hipTrtV2Append, decode_library.ParamsV2Struct, DECODE.struct(), append)]
        for function, kind, config, optional in kinds:
            self.expect({INVALID}, f"{kind.__name__} null", function, None, None)
            pointers = [name for name, ctype in kind._fields_ if ctype is ctypes.c_void_p]
            needed = [name for name in pointers if name not in optional]
            shape = dict(kind._fields_)["shape"]

            def params(kind: Any = kind, config: Any = config, pointers: Any = pointers, **sizes: int) -> Any:
                made = kind(config=config, shape=dict(kind._fields_)["shape"](**{**SHAPE, **sizes}),
                            workspace_size=2**63, **dict.fromkeys(pointers, self.address))
                if hasattr(made, "call_kind"):
                    made.call_kind = 2
                return made

            for sizes in TOO_MUCH:
                given = params(**sizes)
                self.expect(REFUSED, f"{kind.__name__} {sizes}", function, ctypes.byref(given), None)
            for _ in range(count):
                given = params()
                fault = self.random.choice(("null", "misaligned", "size", "workspace", "config"))
                name = self.random.choice(needed)
                what = f"{kind.__name__} {fault} {name}"
                if fault == "null":
                    setattr(given, name, None)
                elif fault == "misaligned":
                    setattr(given, name, self.address + self.random.randrange(1, 16))
                elif fault == "size":
                    field = self.random.choice([field for field, _ in shape._fields_])
                    value = self.random.choice((INT_MIN, -1, -2 if field == "type" else 0,
                                                -3 if field == "num_pages" else INT_MAX))
                    setattr(given.shape, field, value)
                    what += f" {field} {value}"
                elif fault == "workspace" and "workspace" in needed:
                    given.workspace_size = self.random.choice((0, 1, 16))
                else:
                    given.config.page_size = self.random.choice((INT_MIN, -1, 0, 1, 3, INT_MAX))
                self.expect(REFUSED, what, function, ctypes.byref(given), None)
            if optional == {"chosen_blocks"}:
                given = params()
                given.chosen_blocks = self.address + 4
                self.expect({INVALID}, "chosen_blocks misaligned", function, ctypes.byref(given), None)

    def offload(self, count: int) -> None:
        """What is attached to pools."""
        attach = self.functions.hipTrtOffloadAttach
        self.expect({INVALID}, "attach null", attach, None)
        self.expect({INVALID}, "lane null", self.functions.hipTrtOffloadLaneCreate, None)
        self.expect({SUCCESS}, "destroy null", self.functions.hipTrtOffloadLaneDestroy, None)
        self.expect({SUCCESS}, "detach null", self.functions.hipTrtOffloadDetach, None)
        self.expect({SUCCESS}, "forget null", self.functions.hipTrtOffloadForget, None, None)
        needed = ("key_pool", "value_pool", "counters", "staging_keys", "staging_values", "staging_table")
        for _ in range(count):
            given = self._offload()
            part, name = self.random.choice([
                *((None, name) for name in needed), *((cache, name) for cache in ("keys", "values") for name in (
                    "rows", "owners", "slots", "missed", "blocks", "pool_blocks")),
                ("landing", "rows"), ("landing", "tickets"), ("landing", "blocks"), (None, "staging_pages"),
            ])
            struct = given if part is None else getattr(given, part)
            if "blocks" in name or name == "staging_pages":
                odd = {("landing", "blocks"): (3, 33, INT_MAX), ("keys", "blocks"): (1, 33, INT_MAX - 31),
                       ("values", "blocks"): (1, 33, INT_MAX - 31)}.get((part, name), ())
                value = self.random.choice((INT_MIN, -32, -1, *odd))
            else:
                value = self.random.choice((None, self.address + self.random.randrange(1, 16)))
            setattr(struct, name, value)
            self.expect({INVALID}, f"attach {part} {name} {value}", attach, ctypes.byref(given))
        given = self._offload()
        self.expect({SUCCESS}, "attach", attach, ctypes.byref(given))
        params = binding.ParamsStruct(
            config=binding._config_struct(SMALL, 0.1, False), shape=binding.ShapeStruct(**SHAPE),
            workspace_size=2**63, **{name: self.address for name, kind in binding.ParamsStruct._fields_
                                     if kind is ctypes.c_void_p},
        )
        # The pools have 8 x 2 x 2 blocks, and the caches know of fewer.
        self.expect({INVALID}, "pools larger than the caches know",
                    self.functions.hipTrtAttention, ctypes.byref(params), None)
        self.functions.hipTrtOffloadDetach(ctypes.c_void_p(self.address))

    def _offload(self) -> Any:
        cache = {**dict.fromkeys(("rows", "owners", "slots", "missed"), self.address), "blocks": 32, "pool_blocks": 31}
        return block_caches._OffloadStruct(
            keys=block_caches._BlockCacheStruct(**cache), values=block_caches._BlockCacheStruct(**cache),
            landing=block_caches._LandingStruct(rows=self.address, tickets=self.address, blocks=16), staging_pages=4,
            **dict.fromkeys(("key_pool", "value_pool", "counters", "staging_keys", "staging_values", "staging_table"),
                            self.address),
        )

    def pages(self, count: int) -> None:
        """Page tables of one sequence with numbers outside the pool: the others get their bits, and no memory else is
        touched, which the tests of kernels hold every call to."""
        cases = [named("ragged"), named("reuse and search at once"), named("dense decode"), named("dense"),
                 named("mask per query head"), decode_case("ragged"), decode_case("reuse and search at once"),
                 decode_case("dense"), decode_case("512 candidates, five sequences")]
        for case in cases:
            inputs = make_inputs(case)
            expected = run(self.library, case, inputs, "cpu", alias=True)
            for _ in range(count):
                spoiled, pages = self._spoiled_pages(case, inputs)
                print(f"{case} {pages}", flush=True)
                self._compare(case, inputs, run(self.library, case, spoiled, "cpu", alias=True), expected)

    def _spoiled_pages(self, case: Case, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[int]]:
        table = inputs["page_table"].clone()
        total = inputs["past_key"].shape[0]
        used = -(-case.lengths[0] // case.config.page_size)
        outside = (-1, -2, INT_MIN, total, total + 1, 1 << 20, INT_MAX)
        for slot in range(used):
            if self.random.random() < 0.5 or slot == used - 1:
                table[0, slot] = self.random.choice(outside)
        return {**inputs, "page_table": table}, table[0].tolist()

    def _compare(self, case: Case, inputs: dict[str, Tensor], found: Results, expected: Results) -> None:
        for name in ("output", "present_nodes", "chosen_blocks"):
            assert same_bits(getattr(found, name)[1:], getattr(expected, name)[1:]), name
        own = inputs["page_table"][0].tolist()
        others = [page for page in range(inputs["past_key"].shape[0]) if page not in own]
        for name in ("present_key", "present_value"):
            same = same_bits(getattr(found, name)[others], getattr(expected, name)[others])
            assert same, f"{name}: another's page was written"


def _text(struct: ctypes.Structure) -> str:
    return " ".join(f"{name}={getattr(struct, name)}" for name, _ in struct._fields_)  # type: ignore[misc]


if __name__ == "__main__":
    path, part, seed, count = sys.argv[1:]
    getattr(Nonsense(path, int(seed)), part)(int(count))
    print("done")
