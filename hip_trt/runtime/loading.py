"""From a file to a Generator."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from transformers import GenerationConfig

from hip_trt.errors import EngineError, EnvironmentProblem, RuntimeInputError
from hip_trt.files import require_whole
from hip_trt.huggingface import closed
from hip_trt.offload import Offload
from hip_trt.runtime.executor import Executor
from hip_trt.runtime.generator import Generator


def load(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    threads: int | None = None,
    max_seq_len: int | None = None,
    prefill_chunk: int | None = None,
    refresh_interval: int | None = None,
    offload: Offload | None = None,
    weight_budget: int | None = None,
) -> Generator:
    """Load an exported model, with the tokenizer and the generation config beside it.

    Args:
        path: .onnx (ONNX Runtime, on the CPU) or .plan (TensorRT, on a GPU).
        tokenizer: folder of another tokenizer than the one beside the model.
        threads: CPU threads, for .onnx.
        max_seq_len, prefill_chunk, refresh_interval, offload: see :class:`Generator`.
        weight_budget: for a .plan built with weight streaming: bytes of weights to keep on the GPU; by default what
            TensorRT finds best for the memory that is free, which leaves little to the KV cache.

    Returns:
        A generator; without a tokenizer it takes prompts as token ids.

    Raises:
        EngineError: if the file is missing, damaged, or not from hip-trt, or ``weight_budget`` is not allowed.
        EnvironmentProblem: if what is needed to run it is not there.
        RuntimeInputError: if ``offload`` or ``weight_budget`` is given for a .onnx.

    Example:
        >>> generator = load("build/model.onnx")                                    # doctest: +SKIP
        >>> generator.generate("The capital of France is", max_new_tokens=8)[0].text  # doctest: +SKIP
        ' Paris. ...'
    """
    path = Path(path)
    executor: Executor
    if path.suffix == ".onnx":
        if offload:
            refuse_offload(path)
        if weight_budget is not None:
            raise RuntimeInputError(
                f"{path}: ONNX Runtime runs it on the CPU, and streams no weights.",
                "Leave the weight budget out, or run an engine plan on a GPU.",
            )
        from hip_trt.runtime.onnxruntime import OrtExecutor

        executor = OrtExecutor(path, threads=threads)
    elif path.suffix in (".plan", ".engine"):
        from hip_trt.runtime.tensorrt import TensorRTExecutor

        executor = TensorRTExecutor.load(path, weight_budget=weight_budget)
    else:
        raise EngineError(f"{path}: neither .onnx nor .plan.", "Name a file that hip-trt export has made.")
    return Generator(
        executor, load_tokenizer(path.parent if tokenizer is None else tokenizer, required=tokenizer is not None),
        load_generation_config(path.parent), max_seq_len=max_seq_len, prefill_chunk=prefill_chunk,
        refresh_interval=refresh_interval, offload=offload,
    )


def refuse_offload(path: Path) -> NoReturn:
    """Say why a .onnx has nothing to offload.

    Raises:
        RuntimeInputError: always.
    """
    raise RuntimeInputError(
        f"{path}: ONNX Runtime runs it on the CPU, where the KV cache is in host memory already.",
        "Leave offload out (--offload), or run an engine plan on a GPU.",
    )


def load_tokenizer(folder: str | Path, *, required: bool = True) -> Any:
    """The transformers tokenizer saved in a folder; None where there is none and it is not required.

    Raises:
        EnvironmentProblem: if it is missing but required, or damaged.
    """
    folder = Path(folder)
    require_whole(folder)
    if not (folder / "tokenizer_config.json").is_file():
        if required:
            raise EnvironmentProblem(f"{folder}: no tokenizer_config.json.", "Name a folder with a tokenizer.")
        return None
    try:
        return closed.load_tokenizer(folder)
    except Exception as error:  # a tokenizer's loader may raise anything over a damaged file
        raise EnvironmentProblem(
            f"{folder}: its tokenizer cannot be loaded: {' '.join(str(error).split())[:300]}.", "Export again."
        ) from None


def load_generation_config(folder: str | Path) -> GenerationConfig | None:
    """The generation config saved in a folder; None where there is none.

    Raises:
        EnvironmentProblem: if it is damaged.
    """
    folder = Path(folder)
    if not (folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(
            f"{folder}: generation_config.json cannot be read: {' '.join(str(error).split())[:300]}.", "Export again."
        ) from None
