"""How outputs of a call are brought into one form, and when they agree: post-processing and functions for Polygraphy's
Comparator."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from polygraphy.comparator import IterationResult
from polygraphy.comparator.compare import CompareResult, SimpleCompareFunc, Threshold
from torch import Tensor

from hip_trt import operator as names
from hip_trt.spec import DType, ModelSpec
from hip_trt.verify.choices import searches
from hip_trt.verify.inputs import Script
from hip_trt.verify.observed import attended_name, chosen_name, query_name

LAYER_VALUES = ("query", "key", "value", "attended")
"""What is compared of a layer by value, in the order in which it is computed."""
LAYER_CHOICES = ("chosen_blocks", "nodes")
"""What is compared of a layer by agreement: the blocks of its searches, and the nodes kept for the next step."""


@dataclass(frozen=True)
class Tolerances:
    """How far outputs may be apart.

    An output agrees if its largest absolute error is at most ``atol + rtol * m``, where m is the largest absolute value
    that the other side has for it. Weights of one output share its scale, so a single wrong element is an error as
    large as the output itself, and rounding is small against it.

    Attributes:
        atol: absolute, in the output's own unit.
        rtol: relative to the output's largest value.
        agreement: least share of chosen blocks, and of kept nodes, that both sides have in common.
    """

    atol: float
    rtol: float
    agreement: float


# At least twice what rounding alone does to the sample (benchmarks/verify_rounding.py): docs/verification.md.
DEFAULTS: dict[DType, Tolerances] = {
    "float32": Tolerances(1e-4, 1e-3, 0.99),
    "float16": Tolerances(1e-3, 5e-2, 0.9),
    "bfloat16": Tolerances(1e-2, 0.25, 0.7),
}


class Normalize:
    """Post-processing: the valid rows of every output, on the CPU in float32, under names that all runners share.

    Args:
        spec: the model.
        script: whose last feed the outputs belong to.
    """

    def __init__(self, spec: ModelSpec, script: Script) -> None:
        self._spec, self._script = spec, script

    def __call__(self, result: IterationResult) -> IterationResult:
        spec, feed = self._spec, self._script.feed
        raw = {name: torch.as_tensor(value) for name, value in result.items()}
        past, counts = feed[names.PAST_LENGTHS], feed[names.QUERY_LENGTHS]
        b, s = (torch.arange(feed[names.INPUT_IDS].shape[1]) < counts[:, None]).nonzero(as_tuple=True)
        position = past[b].long() + s
        page = feed[names.PAGE_TABLE][b, position // spec.hip.page_size].long()
        outputs: OrderedDict[str, np.ndarray[Any, Any]] = OrderedDict()

        def put(name: str, tensor: Tensor) -> None:
            outputs[name] = tensor.float().contiguous().numpy()

        for layer in range(spec.num_layers):
            if query_name(layer) in raw:
                put(f"query.{layer}", raw[query_name(layer)][b, :, s])
            for kind, pool in (("key", names.KEY.present), ("value", names.VALUE.present)):
                put(f"{kind}.{layer}", raw[pool(layer)][page, :, position % spec.hip.page_size])
            if attended_name(layer) in raw:
                put(f"attended.{layer}", raw[attended_name(layer)][b, :, s])
            blocks = self._blocks(layer, raw)
            if blocks is not None:
                outputs[f"chosen_blocks.{layer}"] = blocks
            if self._script.calls[-1].decode:
                outputs[f"nodes.{layer}"] = raw[names.NODES.present(layer)].numpy()
        logits = raw[names.LOGITS]
        put(names.LOGITS, logits[counts > 0, 0] if logits.shape[1] == 1 else logits[b, s])
        return IterationResult(outputs, runtime=result.runtime, runner_name=result.runner_name)

    def _blocks(self, layer: int, raw: Mapping[str, Tensor]) -> np.ndarray[Any, Any] | None:
        """[N, K], the chosen blocks of each search of the call; None where there was none, or they are not shown.

        A model shows them for all query blocks, [query blocks, B, Hm, K], the reference for its searches only.
        """
        shown = raw.get(chosen_name(layer))
        if shown is None or shown.ndim == 2:
            return None if shown is None else shown.numpy()
        spec, call = self._spec, self._script.calls[-1]
        rows = [
            shown[block, b, mask] for b, block, mask in searches(
                spec.hip, spec.num_masks, list(call.past), list(call.new), decode=call.decode,
                dense=layer in spec.hip.dense_layers,
            )
        ]
        return torch.stack(rows).numpy() if rows else None


class ValuesCompareFunc:
    """Polygraphy's SimpleCompareFunc on largest errors, with an absolute tolerance that follows each output's scale.

    Args:
        tolerances: how far outputs may be apart.
    """

    def __init__(self, tolerances: Tolerances) -> None:
        self._tolerances = tolerances

    def __call__(self, model: IterationResult, other: IterationResult) -> OrderedDict[str, Any]:
        left, right = (_only(result, LAYER_VALUES, names.LOGITS) for result in (model, other))
        scales = {name: float(np.abs(value).max(initial=0)) for name, value in right.items()}
        limits = {name: self._tolerances.atol + scale * self._tolerances.rtol for name, scale in scales.items()}
        compare = SimpleCompareFunc(atol={"": 0.0, **limits}, rtol=0.0, check_error_stat="max")
        results: OrderedDict[str, Any] = compare(left, right)
        for name, result in results.items():
            if not isinstance(result, bool):  # it is one where shapes differ
                result.scale = scales[name]
        return results


class AgreementThreshold(Threshold):  # type: ignore[misc]
    """Least share in common."""

    METRIC_FIELDS = ["agreement"]  # noqa: RUF012  (as Polygraphy has it)

    def __init__(self, least: float) -> None:
        self.least = least

    def passed(self, metric_values: Mapping[str, float]) -> bool:
        """See Polygraphy's Threshold."""
        return metric_values["agreement"] >= self.least


class AgreementResult(CompareResult):  # type: ignore[misc]
    """Share of entries that both sides have, from 0 to 1."""

    _THRESHOLD_CLASS = AgreementThreshold

    def __init__(self, agreement: float, thresholds: AgreementThreshold | None = None) -> None:
        super().__init__(thresholds=thresholds)
        self.agreement = agreement


class ChoicesCompareFunc:
    """Compares sets of indices, row by row, -1 for none: order does not matter, the share in common does."""

    def __init__(self, tolerances: Tolerances) -> None:
        self._threshold = AgreementThreshold(tolerances.agreement)

    def __call__(self, model: IterationResult, other: IterationResult) -> OrderedDict[str, AgreementResult]:
        left, right = (_only(result, LAYER_CHOICES) for result in (model, other))
        results: OrderedDict[str, AgreementResult] = OrderedDict()
        for name, value in left.items():
            if name in right:
                results[name] = AgreementResult(_agreement(value, right[name]), self._threshold)
        return results


def _only(result: IterationResult, kinds: tuple[str, ...], *others: str) -> IterationResult:
    return IterationResult(
        OrderedDict((name, value) for name, value in result.items()
                    if name.rpartition(".")[0] in kinds or name in others),
        runtime=result.runtime, runner_name=result.runner_name,
    )


def _agreement(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> float:
    rows = [array.reshape(-1, array.shape[-1]) for array in (left, right)]
    common = most = 0
    for one, two in zip(*rows, strict=True):
        sets = [set(row[row >= 0].tolist()) for row in (one, two)]
        common += len(sets[0] & sets[1])
        most += max(map(len, sets))
    return common / most if most else 1.0
