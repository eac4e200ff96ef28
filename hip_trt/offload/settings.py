"""Offload: how much GPU memory serves a KV cache in host memory."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from hip_trt.errors import ConfigError

KEY_SHARE = 0.038
VALUE_SHARE = 0.009
"""Of the full cache, where the user says nothing: together, with what caches need beside, under 5%."""

KEY_STEPS = 1
VALUE_STEPS = 2
"""What a step reads, so often, is the least where the user says nothing. A step's values are few, and other ones in the
next step more often than its keys."""

_SPLIT = KEY_SHARE / (KEY_SHARE + VALUE_SHARE)


class Offload(BaseModel):
    """The KV cache lives in host memory; this says what of the GPU's serves it.

    Sizes are for all layers together, in MiB or as a share of the full cache (keys and values of every page). They are
    a matter of speed: results are the same bits with any. (Prefill without a staging area is the one exception, on GPUs
    of compute capability 9.0: other kernels run, which add in another order.)

    A decode step scores about ``decode_mask_k / block_k * leaf_branch`` key blocks per KV head, and attends to
    ``decode_mask_k`` tokens beside window and sink. Caches that hold less than one step reads are of little use, and
    are warned about; by default they hold at least that, and values of two steps.

    Raises:
        ConfigError: from :meth:`create`, naming the field, its value and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key_cache: float | None = Field(
        None, ge=0, le=1, description="Cache of keys, for the mask search, as a share of the full cache."
    )
    value_cache: float | None = Field(
        None, ge=0, le=1, description="Cache of values, for the attention, as a share of the full cache."
    )
    key_cache_mib: float | None = Field(None, ge=0, allow_inf_nan=False, description="Cache of keys, in MiB.")
    value_cache_mib: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="Cache of values, in MiB."
    )
    staging_tokens: int | None = Field(
        None, ge=0,
        description="Tokens of one layer, all sequences together, that prefill attends from in GPU memory; calls with "
        "larger page tables, and all at 0, read tokens over the bus. By default all that page tables can hold.",
    )
    release_staging: bool = Field(
        True, description="Whether that memory is given back when decoding begins, and taken again by the next prefill."
    )

    @model_validator(mode="after")
    def _check_one_unit(self) -> Offload:
        for field in ("key_cache", "value_cache"):
            if getattr(self, field) is not None and getattr(self, f"{field}_mib") is not None:
                raise PydanticCustomError("offload", "{name}: give either a share or MiB, not both", {"name": field})
        return self

    @classmethod
    def create(cls, **fields: Any) -> Offload:
        """Validate fields; unlike the constructor, a bad value raises :class:`ConfigError`."""
        try:
            return cls(**fields)
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(item) for item in error.errors())) from None

    @classmethod
    def of_share(cls, share: float, **fields: Any) -> Offload:
        """Both caches together as a share of the full cache, divided as the defaults are.

        Raises:
            ConfigError: it is not from 0 to 1.
        """
        if not 0 <= share <= 1:
            raise ConfigError(f"cache_share: {share} is not allowed; it must be from 0 to 1")
        # Shares are of keys and values together, so that a cache of keys has no use for more than half.
        return cls.create(key_cache=_SPLIT * share, value_cache=(1 - _SPLIT) * share, **fields)


def _explain(item: Any) -> str:
    if item["type"] == "offload":
        return str(item["msg"])
    field = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{field}: no such field; the fields are {', '.join(Offload.model_fields)}"
    return f"{field}: {item['input']!r} is not allowed; {item['msg'].replace('Input should', 'it must')}"
