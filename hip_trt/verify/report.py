"""What a verification found: for programs (JSON) and for the reader's table."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Against = Literal["reference", "onnxruntime", "pytorch"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OutputRecord(_Record):
    """Errors of one output over the calls of a case.

    Attributes:
        name: "logits", or kind and layer: "query.3", "key.3", "value.3", "attended.3".
        max_abs: largest absolute error.
        relative: largest absolute error of a call, relative to the output's largest value on the other side.
        max_rel: largest error relative to the element itself on the other side; says little where that is near 0.
        mean_abs: largest mean absolute error of a call.
        limit: the tolerance of the call that came nearest to it, or went beyond it most.
        ratio: error divided by tolerance in that call; above 1 is a difference.
    """

    name: str
    max_abs: float
    relative: float
    max_rel: float
    mean_abs: float
    limit: float
    ratio: float


class AgreementRecord(_Record):
    """Share of entries in common, the least of a case's calls.

    Attributes:
        name: kind and layer: "chosen_blocks.3" or "nodes.3".
    """

    name: str
    agreement: float
    least: float


class CaseRecord(_Record):
    """A case.

    Attributes:
        calls: label of each call, such as "prefill 5".
        outputs: by value.
        agreements: by choice; a search makes them, so short contexts have none.
        first: the first output, in order of computation, that differs; None if all agree.
        first_call: the call where it does.
        first_layer: its layer; None for logits, or where all agree.
        cause: what that says about the kind of difference.
        model_seconds, other_seconds: inference time of both sides.
    """

    name: str
    calls: tuple[str, ...]
    outputs: tuple[OutputRecord, ...]
    agreements: tuple[AgreementRecord, ...]
    first: str | None = None
    first_call: str | None = None
    first_layer: int | None = None
    cause: str | None = None
    model_seconds: float
    other_seconds: float

    @property
    def agrees(self) -> bool:
        return self.first is None


class Check(_Record):
    """Something about the files that was looked at without running them."""

    name: str
    passed: bool
    detail: str


class Report(_Record):
    """All of it.

    Attributes:
        model: the file under test.
        runner: what ran it, in words.
        other: what it was compared with, in words.
        notes: what could not be compared, and why.
        state: which state each call began with.
        atol, rtol, agreement: the tolerances, see :class:`hip_trt.verify.compare.Tolerances`.
    """

    format_version: Literal[1] = 1
    model: str
    against: Against
    runner: str
    other: str
    dtype: str
    atol: float
    rtol: float
    agreement: float
    state: str
    checks: tuple[Check, ...]
    cases: tuple[CaseRecord, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def agrees(self) -> bool:
        """Whether every check passed and every case agrees."""
        return all(check.passed for check in self.checks) and all(case.agrees for case in self.cases)
