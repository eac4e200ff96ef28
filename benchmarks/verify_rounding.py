"""What rounding alone does to a model over the calls of hip-trt verify: where its tolerances come from.

    python benchmarks/verify_rounding.py build/model.onnx CHECKPOINT [--type float16|bfloat16] [--seeds 0 1 2 3]

The checkpoint in PyTorch, in float32, against itself with what every module gives rounded to the type; attention is
the reference's, over the same blocks. Of the export only the facts are used. Prints, by case and kind of output, the
largest error relative to the output's largest value. A minute a seed on two cores for a model of 135M parameters.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hip_trt import operator as names
from hip_trt import reference
from hip_trt.onnx_file import read_onnx
from hip_trt.verify import pytorch_runner
from hip_trt.verify.choices import Chooser
from hip_trt.verify.compare import LAYER_VALUES, Normalize
from hip_trt.verify.inputs import Script, plan_cases, real_text, searching_context


class Rounded:
    """A runner of the checkpoint, exact or rounded; rounded, it attends to the blocks that it chose when exact."""

    def __init__(self, checkpoint: Path, spec: Any, dtype: torch.dtype) -> None:
        self.dtype, self.on = dtype, False
        self._chosen: dict[int, list[Tensor]] = {}
        setattr(pytorch_runner, "attend", self._attend)  # noqa: B010  (in place of the one that is shown blocks)
        self._runner = pytorch_runner.PyTorchRunner(checkpoint, spec, lambda layer: None)
        for name, module in self._runner._model.named_modules():
            if name not in ("", "model", "lm_head") and not name.endswith("rotary_emb"):
                module.register_forward_hook(lambda _, __, output: self._round(output))

    def __call__(self, feed: dict[str, Tensor], *, rounded: bool) -> dict[str, Tensor]:
        self.on = rounded
        with torch.inference_mode():
            return self._runner.call(feed)

    def _round(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._round, value))
        if not self.on or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.to(self.dtype).float()

    def _attend(self, tensors: list[Tensor], layer: int, *, config: Any, scale: float, shown: Any) -> Any:
        tensors = [*map(self._round, tensors[:3]), *tensors[3:]]
        chooser = Chooser(self._chosen[layer] if self.on else None)
        output, *state = reference.hip_attention(*tensors, config=config, scale=scale, select=chooser)
        if not self.on:
            self._chosen[layer] = chooser.own
        return (self._round(output), *state), {}


def measure(model: Path, checkpoint: Path, dtype: torch.dtype, seed: int) -> dict[tuple[str, str], float]:
    """The largest relative error by case and kind of output."""
    spec = read_onnx(model).spec
    runner, worst = Rounded(checkpoint, spec, dtype), dict[tuple[str, str], float]()
    cases = plan_cases(spec, steps=2, max_tokens=searching_context(spec))
    script = Script(spec, cases, text=real_text(model.parent, spec.vocab_size))
    script._random.manual_seed(seed)
    for feed in script:
        exact, rounded = runner(feed, rounded=False), runner(feed, rounded=True)
        one, other = (
            Normalize(spec, script)(_Result(outputs)) for outputs in (exact, rounded)
        )
        for name, value in one.items():
            kind = name.partition(".")[0]
            if kind in (*LAYER_VALUES, names.LOGITS):
                error = float(abs(value - other[name]).max() / abs(value).max())
                key = script.calls[-1].case, kind
                worst[key] = max(worst.get(key, 0.0), error)
        # The next call goes on from what the exact one gave, in the model's type, as an exported model would give it.
        script.observe({
            name: value.to(spec.torch_dtype) if name.startswith("present.") else value for name, value in exact.items()
        })
    return worst


class _Result(dict[str, Tensor]):
    """Outputs as Polygraphy hands them to post-processing."""

    runtime, runner_name = 0.0, "pytorch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an export, of the type that is asked about")
    parser.add_argument("checkpoint", type=Path, help="what it was exported from")
    parser.add_argument("--type", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    options = parser.parse_args()
    for seed in options.seeds:
        found = measure(options.model, options.checkpoint, getattr(torch, options.type), seed)
        for case in dict.fromkeys(case for case, _ in found):
            errors = ", ".join(f"{kind} {error:.4f}" for (other, kind), error in found.items() if other == case)
            print(f"seed {seed}, {case}: {errors}", flush=True)


if __name__ == "__main__":
    main()
