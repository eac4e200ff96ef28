"""``hip-trt inspect``: what is in a file that export has made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hip_trt.cli.console import Json, Verbose, out, print_json, set_verbose

if TYPE_CHECKING:
    from hip_trt.inspect import Description, Tensor

_EPILOG = """
Examples:

  hip-trt inspect build/model.onnx

  hip-trt inspect build/engine.plan --all

  hip-trt inspect build/engine.plan --json | jq .engine.compute_capabilities
"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog=_EPILOG)(inspect)


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An .onnx file or a .plan from [b]hip-trt export[/].")],
    every: Annotated[bool, typer.Option("--all", help="Show the tensors of every layer, not of the first.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show a model's layers, attention, inputs, outputs, profiles and sizes. Needs no GPU."""
    from hip_trt.inspect import describe
    from hip_trt.progress import Steps

    set_verbose(verbose)
    with Steps().step(f"Check {file.name}", total=file.stat().st_size if file.is_file() else None) as advance:
        description = describe(file, advance)
    if as_json:
        print_json(description.model_dump(mode="json"))
        return
    console = out()
    _show_facts(console, description)
    _show_tensors(console, description, every)
    _show_layers(console, description)
    console.print(f"These facts come from {description.source}", style="dim", soft_wrap=True, markup=False)


def _show_facts(console: Console, description: Description) -> None:
    from hip_trt.files import format_size

    spec, engine = description.spec, description.engine
    rows = {
        "model": f"{spec.source} ({spec.model_type})",
        "size": f"{spec.num_layers} layers, {spec.num_attention_heads} query and {spec.num_key_value_heads} key/value "
        f"heads of {spec.head_dim}, vocabulary {spec.vocab_size}, context {spec.max_position_embeddings}",
        "type": f"{spec.dtype}; logits of {'every token' if spec.logits == 'all' else 'the last token'}",
    }
    if description.parameters:
        parameters = description.parameters
        rows["parameters"] = f"{parameters.count:,} ({format_size(parameters.size)})"
    rows["files"] = ", ".join(f"{file.name} ({format_size(file.size)})" for file in description.files)
    if engine:
        rows["built by"] = f"{engine.flavour} {engine.tensorrt_version} with plugin {engine.plugin_version}"
        rows["built on"] = engine.created
        rows["built for"] = f"GPUs of compute capability {', '.join(engine.compute_capabilities)}"
        limits = engine.limits
        rows["limits"] = (
            f"batch {limits.max_batch}, {limits.max_prefill} new tokens per call, {limits.max_seq_len} tokens per "
            f"sequence, {limits.max_pages} pages"
        )
    else:
        rows["function"] = (
            "carries HipAttention's body: plain ONNX Runtime runs it" if description.function_body
            else "no body of HipAttention: a runtime must bring its own"
        )
    rows["exported by"] = f"hip-trt {spec.hip_trt_version}"
    rows["attention"] = ", ".join(f"{field} {_plain(value)}" for field, value in spec.hip.model_dump().items())
    table = Table(show_header=False, box=None, pad_edge=False, title=Text(description.path), title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table, highlight=False, markup=False)
    console.print()


def _show_tensors(console: Console, description: Description, every: bool) -> None:
    profiles = description.engine.profiles if description.engine else ()
    table = Table(pad_edge=False, box=None)
    for title in ("tensor", "type", "shape", *(f"{profile.name}: min to max" for profile in profiles)):
        table.add_column(title, overflow="fold")
    hidden = 0
    for direction, tensors in (("in", description.inputs), ("out", description.outputs)):
        for tensor in tensors:
            if not every and _of_later_layer(tensor):
                hidden += 1
                continue
            ranges = [profile.shapes.get(tensor.name) for profile in profiles]
            table.add_row(
                f"{direction:3} {tensor.name}", tensor.dtype, _shape(tensor.shape),
                *(f"{_shape(item.min)} to {_shape(item.max)}" if item else "" for item in ranges),
            )
    console.print(table, highlight=False, markup=False)
    if hidden:
        console.print(f"and {hidden} tensors alike of the other layers (--all shows them)", style="dim")
    console.print()


def _show_layers(console: Console, description: Description) -> None:
    what = "HipAttention plugin layers" if description.kind == "plan" else "HipAttention nodes"
    console.print(f"[b]{len(description.attention)} {what}[/]", highlight=False)
    layers = ", ".join(f"{name} {count}" for name, count in description.layers.items())
    console.print(f"all layers: {layers}", highlight=False, markup=False, soft_wrap=True)


def _of_later_layer(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a layer after the first; such names have the layer's index between dots."""
    return any(part.isdecimal() and int(part) > 0 for part in tensor.name.split("."))


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _plain(value: object) -> str:
    return "none" if value == () else str(value)
