"""Run the study, or make its page anew from its JSON.

    python -m benchmarks.decode_study --model FILE.gguf --device cuda --out benchmarks/results
    python -m benchmarks.decode_study --again benchmarks/results/decode_study.json --out benchmarks/results

Needs a GPU: about 11 minutes on an H200. Writes decode_study.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from hip_trt.evaluate import texts
from hip_trt.evaluate.machine import describe
from hip_trt.evaluate.models import encode, load_model

from . import run
from .log_text import log
from .report import study

RECALL = Path(__file__).parent.parent / "recall_model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--again", type=Path, help="the JSON of an earlier run; nothing is measured")
    parser.add_argument("--text", type=Path, action="append", default=[], help="a file beside those that are installed")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=700, help="after which no row of perplexity is begun")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.again is not None:
        before = json.loads(options.again.read_text(encoding="utf-8"))
        study(before["data"], before["parameters"], before["measured_on"]).publish(options.out)
        return
    measured(options)


def measured(options: argparse.Namespace) -> None:
    """Measure; write after each part what there is."""
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(options.model, device=options.device)
    recall, _ = load_model(RECALL, device=options.device)
    files = {path.stem for path in options.text}
    shipped = [name for name in texts.installed() if name not in files]
    found = [*texts.gather(shipped, options.text), log()]
    by_name = {text.name: text for text in found}
    long = encode(tokenizer, texts.manual().content + texts.code().content, run.STRETCH * run.STRETCHES, "long")
    parameters = {
        "model": options.model.name, "recall_model": RECALL.name, "dtype": "float32",
        "texts": {text.name: f"{text.source}, {text.sha256}" for text in found},
    }
    data: dict[str, Any] = {}

    def save(part: str, rows: list[dict[str, Any]]) -> None:
        data[part] = rows
        content = {"data": data, "parameters": parameters, "measured_on": describe(options.device)}
        (options.out / "decode_study.json").write_text(json.dumps(content), encoding="utf-8")

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {line}", flush=True)

    run.measure(model, tokenizer, recall, by_name, long, seconds=options.seconds, say=say, save=save)
    study(data, parameters, describe(options.device)).publish(options.out)


if __name__ == "__main__":
    main()
