"""HipConfig: every bad value is refused on one line that names the field, the value and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hip_trt.config import HipConfig
from hip_trt.config_v2 import HipConfigV2
from hip_trt.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"mask_k": 0}, "at least 1"),
        ({"mask_k": 1000}, "a multiple of block_k (16)"),
        ({"mask_k": 1 << 23}, "at most 4194304"),
        ({"mask_k": "1024"}, "a whole number"),
        ({"mask_k": 1024.0}, "a whole number"),
        ({"mask_k": True}, "a whole number"),
        ({"mask_k": None}, "a whole number"),
        ({"decode_mask_k": -16}, "at least 1"),
        ({"decode_mask_k": 520}, "a multiple of block_k (16)"),
        ({"block_q": 0}, "at least 1"),
        ({"block_q": 48}, "a power of two"),
        ({"block_q": 256}, "at most 128"),
        ({"block_k": 1}, "at least 2"),
        ({"block_k": 24}, "a power of two"),
        ({"block_k": 256}, "at most 128"),
        ({"stride_q": 0}, "at least 1"),
        ({"stride_q": 3}, "a divisor of block_q (64)"),
        ({"stride_q": 128}, "a divisor of block_q (64)"),
        ({"stride_k": 0}, "at least 1"),
        ({"stride_k": 5}, "a divisor of block_k (16)"),
        ({"branch": 1}, "at least 2"),
        ({"branch": 17}, "at most 16"),
        ({"leaf_branch": 1}, "at least 2"),
        ({"leaf_branch": 17}, "at most 16"),
        ({"reuse_level": -1}, "at least 0"),
        ({"reuse_level": 2}, "at most 1"),
        ({"page_size": 1}, "at least 2"),
        ({"page_size": 72}, "a multiple of block_k (16)"),
        ({"sink_tokens": -1}, "at least 0"),
        ({"window_tokens": 0}, "at least 1"),
        ({"mask_heads": "group"}, "'kv' or 'query'"),
        ({"dense_layers": (-1,)}, "distinct layer indices of 0 or more, in ascending order"),
        ({"dense_layers": (2, 1)}, "distinct layer indices of 0 or more, in ascending order"),
        ({"dense_layers": (1, 1)}, "distinct layer indices of 0 or more, in ascending order"),
        ({"dense_layers": 3}, "a list of layer indices"),
        ({"refresh_interval": 0}, "at least 1"),
    ],
    ids=str,
)
def test_bad_value_is_refused(fields: dict[str, Any], allowed: str) -> None:
    ((field, value),) = fields.items()
    with pytest.raises(ConfigError) as error:
        HipConfig.create(**fields)
    assert str(error.value) == f"{field}: {value!r} is not allowed; it must be {allowed}"


def test_several_bad_values_are_all_named() -> None:
    with pytest.raises(ConfigError) as error:
        HipConfig.create(mask_k=0, branch=99)
    assert str(error.value) == (
        "mask_k: 0 is not allowed; it must be at least 1; branch: 99 is not allowed; it must be at most 16"
    )


def test_unknown_field_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"^block: no such field; the fields are mask_k, decode_mask_k, .*interval$"):
        HipConfig.create(block=3)


def test_layer_index_of_the_wrong_type_is_named_by_its_place() -> None:
    with pytest.raises(ConfigError, match=r"^dense_layers\.1: 'x' is not allowed; it must be a whole number$"):
        HipConfig.create(dense_layers=[0, "x"])


def test_replace_validates_again() -> None:
    config = HipConfig.create(block_k=8)
    assert config.replace(mask_k=1000).mask_blocks == 125
    with pytest.raises(ConfigError, match=r"mask_k: 1001 is not allowed; it must be a multiple of block_k \(8\)"):
        config.replace(mask_k=1001)


def test_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        HipConfig.create().mask_k = 512  # type: ignore[misc]


@pytest.mark.parametrize(
    "config",
    [
        HipConfig.create(),
        HipConfig.create(
            mask_k=96, decode_mask_k=64, block_q=32, block_k=8, stride_q=8, stride_k=2, branch=3, leaf_branch=5,
            reuse_level=0, page_size=24, sink_tokens=0, window_tokens=7, mask_heads="query", dense_layers=[0, 3],
            refresh_interval=1,
        ),
    ],
    ids=["defaults", "nothing default"],
)
def test_yaml_round_trip(config: HipConfig, tmp_path: Path) -> None:
    path = tmp_path / "hip.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert HipConfig.from_yaml(path) == config


def test_absent_yaml_fields_take_their_defaults(tmp_path: Path) -> None:
    path = tmp_path / "hip.yaml"
    path.write_text("# only this\nmask_k: 2048\n", encoding="utf-8")
    assert HipConfig.from_yaml(path) == HipConfig.create(mask_k=2048)
    path.write_text("", encoding="utf-8")
    assert HipConfig.from_yaml(path) == HipConfig.create()


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("mask_k: 1000\n", "mask_k: 1000 is not allowed; it must be a multiple of block_k (16)"),
        ("mask_k: many\n", "mask_k: 'many' is not allowed; it must be a whole number"),
        ("- 1\n- 2\n", "must hold field names and values, such as 'mask_k: 1024'."),
        ("1: 2\n", "must hold field names and values, such as 'mask_k: 1024'."),
        ("mask_k: [1\n", "not valid YAML:"),
        ("mask_k: \x00\n", "not valid YAML:"),
    ],
)
def test_bad_yaml_is_refused_on_one_line_that_names_the_file(text: str, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "hip.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        HipConfig.from_yaml(path)
    assert str(error.value).startswith(f"{path}: {cause}")
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "hip.yaml"
    path.write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ConfigError, match="not valid YAML"):
        HipConfig.from_yaml(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file or directory\.$"):
        HipConfig.from_yaml(tmp_path / "none.yaml")


def test_derived_sizes() -> None:
    config = HipConfig.create(mask_k=64, decode_mask_k=32, block_k=8)
    assert (config.mask_blocks, config.decode_mask_blocks) == (8, 4)
    assert config.num_masks(9, 3) == 3
    assert config.replace(mask_heads="query").num_masks(9, 3) == 9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decode_mask_k": 100}, "decode_mask_k: 100 is not allowed; it must be a multiple of decode_block_k (64)"),
        ({"decode_search_k": 100}, "decode_search_k: 100 is not allowed; it must be a multiple of decode_block_k (64)"),
        ({"decode_search_k": 64}, "decode_search_k: 64 is not allowed; it must be at least decode_mask_k (8192)"),
        ({"decode_block_k": 48}, "decode_block_k: 48 is not allowed; it must be a power of two"),
        ({"decode_block_k": 128}, "decode_block_k: 128 is not allowed; it must be at most 64"),
        ({"page_size": 32}, "page_size: 32 is not allowed; it must be a multiple of decode_block_k (64)"),
        ({"value_threshold": 1.0}, "value_threshold: 1.0 is not allowed; it must be less than 1"),
        ({"value_threshold": float("nan")}, "value_threshold: nan is not allowed; it must be a number"),
        ({"value_threshold": "0"}, "value_threshold: '0' is not allowed; it must be a number"),
        ({"reuse_level": 1}, "reuse_level: 1 is not allowed; it must be 0"),
        ({"mask_k": 1000}, "mask_k: 1000 is not allowed; it must be a multiple of block_k (16)"),
    ],
)
def test_version_2_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        HipConfigV2.create(**fields)
    assert str(error.value) == message


def test_version_2_has_blocks_of_its_own_in_decode(tmp_path: Path) -> None:
    config = HipConfigV2.create(block_k=128, page_size=128, mask_k=1024, decode_mask_k=64)
    assert (config.mask_blocks, config.decode_mask_blocks) == (8, 1)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert "reuse_level" not in path.read_text(encoding="utf-8")
    assert HipConfigV2.from_yaml(path) == config
