"""Writes operator_reference.md, beside this file, from the operator's ONNX schema and from HipConfig."""

from __future__ import annotations

from pathlib import Path

from onnx import defs

import hip_trt.export  # noqa: F401  (registers the operator with onnx)
from hip_trt.config import HipConfig
from hip_trt.operator import DOMAIN, OP_TYPE

PAGE = Path(__file__).with_suffix(".md")


def page() -> str:
    """The page's text."""
    schema = defs.get_schema(OP_TYPE, domain=DOMAIN)
    title, *paragraphs = schema.doc.strip().split("\n\n")
    types = ", ".join(f"`{name}`" for constraint in schema.type_constraints for name in constraint.allowed_type_strs)
    attributes = [
        (f"`{name}`", attribute.type.name.lower(), attribute.description)
        for name, attribute in schema.attributes.items()
    ]
    parts = [
        f"# {DOMAIN}.{OP_TYPE}, version {schema.since_version}",
        "Written by `python docs/operator_reference.py`; edit `export/schema.py` or `hip_trt/config.py` instead. What\n"
        "the operator computes is in [operator.md](operator.md).",
        title, *paragraphs, f"T is one of {types}.",
        "## Inputs", _parameters(schema.inputs), "## Outputs", _parameters(schema.outputs),
        "## Attributes", _table(("attribute", "type", "meaning"), sorted(attributes)),
        "## Settings of a model",
        "`HipConfig`: one YAML file (`--config`), or a flag of `hip-trt export` each. Those that are attributes go\n"
        "into every node; `dense_layers` decides `dense`.",
        _table(("setting", "default", "allowed"), _settings()),
    ]
    return "\n\n".join(parts) + "\n"


def _parameters(parameters: list[defs.OpSchema.FormalParameter]) -> str:
    rows = []
    for parameter in parameters:
        shape, _, meaning = parameter.description.partition("]. ")
        kind = parameter.type_str.removeprefix("tensor(").removesuffix(")")
        rows.append((f"`{parameter.name}`", f"{shape}] {kind}", meaning))
    return _table(("name", "shape, type", "meaning"), rows)


def _settings() -> list[tuple[str, ...]]:
    rows = []
    for name, schema in HipConfig.model_json_schema()["properties"].items():
        if "minimum" in schema:
            allowed = f"{schema['minimum']} to {schema.get('maximum', 'any')}"
        else:
            allowed = ", ".join(f"`{value}`" for value in schema.get("enum", ())) or "layer indices"
        default = schema["default"]
        rows.append((f"`{name}`", f"`{default}`" if default != [] else "none", allowed))
    return rows


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, ("---",) * len(titles), *rows))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
