"""``hip-trt export``: from a checkpoint to ONNX and to a TensorRT engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hip_trt.cli.config_options import resolve_config, with_config_options
from hip_trt.cli.console import Verbose, out, set_verbose
from hip_trt.errors import ExportError

if TYPE_CHECKING:
    from hip_trt.export import ExportedModel
    from hip_trt.export.onnx_export import Quantization
    from hip_trt.sidecar import Sidecar
    from hip_trt.spec import DType, Logits, ModelSpec

_ONNX_NAME = "model.onnx"
_MODEL_PANEL, _ENGINE_PANEL = "Model", "Engine"
_EPILOG = """
Examples:

  An engine, with the ONNX model and the tokenizer beside it. With TensorRT-RTX no GPU is needed:

    hip-trt export --model ./SmolLM2-135M --out build/engine.plan

  Only the ONNX model, in float32 for ONNX Runtime on the CPU:

    hip-trt export --model ./model.gguf --out build/model.onnx --dtype float32

  From the Hugging Face hub:

    hip-trt export --model org/name --allow-download --out build/engine.plan

  An engine from an ONNX model that is there already, for one kind of GPU:

    hip-trt export --model m.onnx --out m.plan --compute-capability 8.9

  An engine of a model that is larger than memory: nothing is copied, and the engine holds no weights:

    hip-trt export --model ./Llama-3.1-8B --out build/engine.plan --strip-weights --link-weights

  Closer to dense attention than the defaults, and slower; docs/evaluation.md says by how much:

    hip-trt export --model ./m --out m.plan --mask-k 2048 --decode-mask-k 1024

  Some layers dense:

    hip-trt export --model ./m --out m.plan --dense-layers 0,1
"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog=_EPILOG)(with_config_options(export))


def export(
    *,
    model: Annotated[
        str,
        typer.Option(
            "--model", metavar="MODEL", rich_help_panel=_MODEL_PANEL,
            help="A Hugging Face folder, a .gguf file, a hub id, or an .onnx file exported before.",
        ),
    ],
    to: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FILE", rich_help_panel=_MODEL_PANEL,
            help=f"A .plan builds an engine, with {_ONNX_NAME} and the tokenizer beside it; an .onnx stops there.",
        ),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="float16|bfloat16|float32", rich_help_panel=_MODEL_PANEL, show_default="the checkpoint's own",
            help="Type of weights, activations and KV cache.",
        ),
    ] = None,
    logits: Annotated[
        str | None,
        typer.Option(
            metavar="last|all", rich_help_panel=_MODEL_PANEL, show_default="last",
            help="Compute logits for the last token of each sequence, or for all.",
        ),
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=_MODEL_PANEL, show_default="the model's context length",
            help="Longest context that the model will be given. A model with a sliding window can be exported for "
            "contexts up to the window.",
        ),
    ] = None,
    link_weights: Annotated[
        bool,
        typer.Option(
            "--link-weights", rich_help_panel=_MODEL_PANEL,
            help="Make hard links to the checkpoint's safetensors files rather than copy the weights, where no "
            "conversion is asked for; the Python package onnx refuses such links. In the checkpoint's own folder its "
            "files are used as they lie in any case.",
        ),
    ] = False,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="int4", rich_help_panel=_MODEL_PANEL, show_default="none",
            help="Write the weights of linear layers in four bits, rounded to nearest; needs NVIDIA Model Optimizer "
            "(pip install nvidia-modelopt onnx-graphsurgeon onnxslim lief).",
        ),
    ] = None,
    allow_download: Annotated[
        bool,
        typer.Option(
            "--allow-download", rich_help_panel=_MODEL_PANEL,
            help="Fetch a hub id that the local Hugging Face cache lacks, or what it lacks of it.",
        ),
    ] = False,
    runtime: Annotated[
        str,
        typer.Option(
            metavar="auto|tensorrt|tensorrt-rtx", rich_help_panel=_ENGINE_PANEL,
            help="Which TensorRT builds the engine, and will run it. auto: tensorrt if it is installed and there is a "
            "GPU, else tensorrt-rtx, which builds without one.",
        ),
    ] = "auto",
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X.Y", rich_help_panel=_ENGINE_PANEL, show_default="all that TensorRT-RTX supports",
            help="Build for GPUs of this compute capability, such as 8.9; may be given several times.",
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=_ENGINE_PANEL, show_default="4", help="Most sequences per call."),
    ] = None,
    max_prefill: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=_ENGINE_PANEL, show_default="2048",
            help="Most new tokens per sequence and call; longer prompts are split.",
        ),
    ] = None,
    max_seq_len: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=_ENGINE_PANEL, show_default="the model's context length",
            help="Most tokens per sequence, prompt and generated together.",
        ),
    ] = None,
    max_pages: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=_ENGINE_PANEL, show_default="enough for every sequence at its longest",
            help="Most pages in the KV pool.",
        ),
    ] = None,
    strip_weights: Annotated[
        bool,
        typer.Option(
            "--strip-weights", rich_help_panel=_ENGINE_PANEL,
            help=f"Leave the weights out of the engine; they are read from {_ONNX_NAME}'s files when it is loaded. For "
            "models that are larger than this machine's memory.",
        ),
    ] = False,
    weight_streaming: Annotated[
        bool,
        typer.Option(
            "--weight-streaming", rich_help_panel=_ENGINE_PANEL,
            help="Let the GPU hold a part of the weights only, the rest in host memory; slower.",
        ),
    ] = False,
    verbose: Verbose = False,
    config_file: Path | None,
    fields: dict[str, Any],
) -> None:
    """Export a Llama-family model with HiP attention to ONNX, and build a TensorRT engine.

    Nothing is retrained. Results appear when all is done: a failure or Ctrl-C leaves what was there before.
    """
    from hip_trt.files import staging
    from hip_trt.progress import Steps

    set_verbose(verbose)
    steps = Steps()
    exported = Path(model)
    is_onnx, wants_plan = exported.suffix == ".onnx", to.suffix in (".plan", ".engine")
    if not wants_plan and to.suffix != ".onnx":
        raise ExportError(f"--out {to}: must end in .plan, for an engine, or .onnx.")
    if is_onnx:
        _refuse_model_options(exported, to, dtype=dtype, logits=logits, max_context=max_context,
                              link_weights=link_weights or None, quantize=quantize, config=config_file, **fields)
    if not wants_plan:
        _refuse_engine_options(to, strip_weights=strip_weights, weight_streaming=weight_streaming)
    build = _engine_builder(runtime, compute_capability or []) if wants_plan else None
    both = wants_plan and not is_onnx
    with staging(to.parent, exclusive=True) if both else nullcontext():  # nobody exports between model and engine
        if not is_onnx:
            from hip_trt.export import export_onnx

            def check_engine(spec: ModelSpec) -> None:
                """Refuse now what the engine's build would refuse after the model's long export."""
                from hip_trt import library
                from hip_trt.export.profiles import EngineLimits

                library.validate(spec)
                EngineLimits.resolve(
                    spec, max_batch=max_batch, max_prefill=max_prefill, max_seq_len=max_seq_len, max_pages=max_pages
                )

            exported = to.parent / _ONNX_NAME if wants_plan else to
            made = export_onnx(
                model, exported, config=resolve_config(config_file, fields), allow_download=allow_download, steps=steps,
                dtype=cast("DType | None", dtype), logits=cast("Logits", logits or "last"),  # it refuses other values
                max_context=max_context, check=check_engine if wants_plan else None, link_weights=link_weights,
                quantize=cast("Quantization | None", quantize),
            )
            _report_model(made)
        if build is not None:
            sidecar = build(
                exported, to, max_batch=max_batch, max_prefill=max_prefill, max_seq_len=max_seq_len,
                max_pages=max_pages, strip_weights=strip_weights, weight_streaming=weight_streaming, steps=steps,
            )
            _report_engine(to, sidecar)


def _refuse_model_options(model: Path, to: Path, **options: Any) -> None:
    """What was decided when an .onnx was exported cannot be changed afterwards."""
    if to.suffix == ".onnx":
        raise ExportError(f"--model {model}: exported already.", "Name a .plan with --out to build its engine.")
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ExportError(
            f"--{given[0].replace('_', '-')}: cannot be changed in {model}, which is exported already.",
            "Name the checkpoint with --model to export it anew.",
        )


def _refuse_engine_options(to: Path, **options: bool) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise ExportError(f"--{given[0].replace('_', '-')}: needs an engine.", f"Name a .plan with --out, not {to}.")


def _engine_builder(runtime: str, compute_capabilities: list[str]) -> Callable[..., Sidecar]:
    """:func:`build_engine` for a TensorRT and GPUs that are checked now, before the model's long export."""
    from hip_trt import library
    from hip_trt.export.engine import build_engine, resolve_compute_capabilities
    from hip_trt.tensorrt_flavour import find_flavour

    flavour = find_flavour(runtime)  # type: ignore[arg-type]  # it checks the name itself
    targets = resolve_compute_capabilities(flavour, compute_capabilities)
    flavour.load_plugin(library.plugin_path())
    return functools.partial(build_engine, runtime=flavour, compute_capabilities=targets)


def _report_model(model: ExportedModel) -> None:
    """Say what was made, and what must stay where it is."""
    from hip_trt.files import format_size

    size = format_size(sum(path.stat().st_size for path in model.data))
    first, *others = (path.relative_to(model.path.parent).as_posix() for path in model.data)
    names = f"{first}{f' and {len(others)} more' if others else ''}"
    weights = {
        "copied": f"copied to {names}",
        "linked": f"linked, not copied: {names} are the checkpoint's own files under a second name (which the Python "
        "package onnx refuses to read; without --link-weights they are copied)",
        "in place": f"not copied: the model reads the checkpoint's own files, which must stay where they are, {names}",
    }[model.placement]
    out().print(
        f"{model.path}: ONNX, for any runtime; {size} of weights {weights}", soft_wrap=True, highlight=False,
        markup=False,
    )


def _report_engine(plan: Path, sidecar: Sidecar) -> None:
    from hip_trt.files import format_size

    limits = sidecar.limits
    weights = "" if sidecar.weights == "embedded" else f"; no weights, which stay with {sidecar.model[0].name}"
    out().print(
        f"{plan}: {sidecar.flavour} {sidecar.tensorrt_version} engine for GPUs of compute capability "
        f"{', '.join(sidecar.compute_capabilities)}; {format_size(sidecar.plan.size)}; {len(sidecar.plugin_layers)} "
        f"HipAttention plugin layers; up to {limits.max_batch} sequences of {limits.max_seq_len} tokens{weights}",
        soft_wrap=True, highlight=False, markup=False,
    )
