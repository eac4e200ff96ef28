"""HipConfig: the one description of how a model's attention is pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from hip_trt.errors import ConfigError

MaskHeads = Literal["kv", "query"]


class HipConfig(BaseModel):
    """Settings of the ``HipAttention`` operator, and of how a model uses it.

    Lengths are in tokens. The defaults come from perplexity measured on SmolLM2-135M (docs/evaluation.md): scoring
    every token of the representative block and a wide leaf level keep quality; sharing one mask per key/value head and
    keeping no layer dense cost little. They trade about 1% of perplexity at 8k tokens for speed; mask_k 2048 and
    decode_mask_k 1024 lose half of that. Each field says its own reason.

    Raises:
        ConfigError: from :meth:`create`, :meth:`from_yaml` and :meth:`replace`, naming the field, its value and what is
            allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    _in_key_blocks: ClassVar[tuple[str, ...]] = ("mask_k", "decode_mask_k", "page_size")

    mask_k: int = Field(
        1024, ge=1, le=1 << 22,
        description="Tokens that a prefill query block selects beyond sink and window. On the worst of four texts "
        "1024 cost 1.3% of perplexity at 8k tokens and 1.8% at 16k; 2048 cost 0.5% at both (docs/evaluation.md).",
    )
    decode_mask_k: int = Field(
        512, ge=1, le=1 << 22,
        description="Tokens that a decoded token selects. On the worst of four texts 512 cost 1.0% of perplexity at 8k "
        "tokens and 4.2% at 16k, 1024 cost 0.6% and 2.8%. To find single facts in long contexts take 4096, or a "
        "sixteenth of the context if that is more (docs/evaluation.md).",
    )
    block_q: int = Field(
        64, ge=1, le=128,
        description="Query rows that share one mask in prefill; a power of two. 64 fills a tensor-core tile.",
    )
    block_k: int = Field(
        16, ge=2, le=128,
        description="Tokens per key block, the unit of selection; a power of two. 8, 16 and 32 are alike in "
        "perplexity; small ones hold more of the attention, larger ones are read faster.",
    )
    stride_q: int = Field(
        4, ge=1, le=128,
        description="Every stride_q-th row of a query block scores keys, counted back from the last; divides block_q.",
    )
    stride_k: int = Field(
        1, ge=1, le=128,
        description="Every stride_k-th token of a representative block is scored; divides block_k. Strides above 1 "
        "cost quality.",
    )
    branch: int = Field(
        4, ge=2, le=16,
        description="Children per tree node above level 1. Without effect up to some 16k tokens; wider means fewer "
        "dependent levels, and found more facts at 128k.",
    )
    leaf_branch: int = Field(
        16, ge=2, le=16,
        description="Key blocks per level-1 node. Wide is better: the greedy upper levels are what misses.",
    )
    reuse_level: int = Field(
        1, ge=0, le=1,
        description="What decode steps between refreshes reuse: 0 the chosen blocks (the paper), 1 the level-1 nodes, "
        "with blocks chosen anew for each token, which loses a fraction of the quality that 0 loses.",
    )
    page_size: int = Field(
        64, ge=2, le=4096,
        description="Tokens per page of the KV pool; a multiple of block_k.",
    )
    sink_tokens: int = Field(
        64, ge=0, le=1 << 20,
        description="First tokens of the sequence that are always attended, rounded up to whole key blocks.",
    )
    window_tokens: int = Field(
        512, ge=1, le=1 << 20,
        description="Newest tokens that are always attended, rounded up to whole key blocks.",
    )
    mask_heads: MaskHeads = Field(
        "kv",
        description="'kv': the query heads of a GQA group share a mask; 'query': one mask per query head (the paper).",
    )
    dense_layers: tuple[int, ...] = Field(
        (),
        description="Layers that attend to everything. None by default: keeping the first three of thirty dense gained "
        "0.2 to 0.4 points of perplexity.",
    )
    refresh_interval: int = Field(
        8, ge=1, le=1 << 20,
        description="Decode steps from one search from the top to the next; 1 searches at every step.",
    )

    @model_validator(mode="after")
    def _check_combinations(self) -> HipConfig:
        for field in ("block_q", "block_k"):
            value = getattr(self, field)
            require(self, value & (value - 1) == 0, field, "a power of two")
        require(self, self.block_q % self.stride_q == 0, "stride_q", f"a divisor of block_q ({self.block_q})")
        require(self, self.block_k % self.stride_k == 0, "stride_k", f"a divisor of block_k ({self.block_k})")
        for field in self._in_key_blocks:
            require(self, getattr(self, field) % self.block_k == 0, field, f"a multiple of block_k ({self.block_k})")
        layers = self.dense_layers
        require(
            self, all(layer >= 0 for layer in layers) and list(layers) == sorted(set(layers)), "dense_layers",
            "distinct layer indices of 0 or more, in ascending order",
        )
        return self

    @classmethod
    def create(cls, **fields: Any) -> Self:
        """Validate fields; unlike the constructor, a bad value raises :class:`ConfigError`, one line per field."""
        if isinstance(fields.get("dense_layers"), list):
            fields["dense_layers"] = tuple(fields["dense_layers"])
        try:
            return cls(**fields)
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(item, cls) for item in error.errors())) from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML file of field names and values; absent fields take their defaults."""
        try:
            fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}.") from None
        if fields is None:
            fields = {}
        if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
            raise ConfigError(f"{path}: must hold field names and values, such as 'mask_k: 1024'.")
        try:
            return cls.create(**fields)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.cause}") from None

    def to_yaml(self) -> str:
        """All fields as YAML text that :meth:`from_yaml` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def replace(self, **fields: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return self.create(**{**self.model_dump(), **fields})

    @property
    def mask_blocks(self) -> int:
        """Key blocks that a prefill query block selects (the contract's K)."""
        return self.mask_k // self.block_k

    @property
    def decode_mask_blocks(self) -> int:
        """Key blocks that a decoded token selects, and nodes kept per mask head (the contract's Kd)."""
        return self.decode_mask_k // self.block_k

    def num_masks(self, num_attention_heads: int, num_key_value_heads: int) -> int:
        """Mask heads per sequence (the contract's Hm)."""
        return num_key_value_heads if self.mask_heads == "kv" else num_attention_heads


def require(config: HipConfig, ok: bool, field: str, allowed: str) -> None:
    """Refuse a field of a configuration, from a validator."""
    if not ok:
        raise PydanticCustomError(
            "hip_config", "{field}: {value} is not allowed; it must be {allowed}",
            {"field": field, "value": repr(getattr(config, field)), "allowed": allowed},
        )


def _explain(item: Any, config: type[HipConfig]) -> str:
    """One pydantic error as 'field: value is not allowed; it must be ...'."""
    if item["type"] == "hip_config":
        return str(item["msg"])
    field = ".".join(str(part) for part in item["loc"])
    value, context = repr(item["input"]), item.get("ctx", {})
    if item["type"] == "extra_forbidden":
        return f"{field}: no such field; the fields are {', '.join(config.model_fields)}"
    match item["type"]:
        case "greater_than_equal":
            allowed = f"at least {context['ge']}"
        case "less_than_equal":
            allowed = f"at most {context['le']}"
        case "less_than":
            allowed = f"less than {context['lt']:g}"
        case "literal_error":
            allowed = context["expected"]
        case "int_type":
            allowed = "a whole number"
        case "float_type" | "finite_number":
            allowed = "a number"
        case "tuple_type":
            allowed = "a list of layer indices"
        case _:
            allowed = item["msg"]
    return f"{field}: {value} is not allowed; it must be {allowed}"
