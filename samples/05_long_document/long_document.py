"""A document longer than GPU memory: the KV cache in host memory, hot blocks on the GPU, and several questions.

    python samples/05_long_document/long_document.py build/engine.plan book.txt "Who is the hero?" "How does it end?"

The document is read once, into a session; each question continues it. Needs a GPU that the plan was built for. With a
.onnx, which ONNX Runtime runs on the CPU, the cache is in host memory anyway, and the program runs without offload.
The same from the command line, for one question: hip-trt run build/engine.plan -f book.txt --offload --stats
"""

from __future__ import annotations

import sys
from pathlib import Path

import hip_trt
from hip_trt.errors import HipTrtError
from hip_trt.offload import Offload

NEW_TOKENS = 64


def main() -> None:
    model, document, *questions = sys.argv[1:]
    generator = hip_trt.load(model, offload=None if model.endswith(".onnx") else Offload())
    text = Path(document).read_text(encoding="utf-8")
    prompts = [generator.encode(f"{text}\n\nQuestion: {question}\nAnswer:") for question in questions]
    # Pages for the longest prompt and its answer. What a prompt has in common with the one before, the document, is not
    # computed again.
    with generator.session(max_seq_len=max(map(len, prompts)) + NEW_TOKENS) as session:
        for question, prompt in zip(questions, prompts, strict=True):
            stream = generator.stream([prompt], session=session, max_new_tokens=NEW_TOKENS)
            answer = "".join(step.texts[0] for step in stream)
            stats = stream.stats
            print(f"{question}\n  {answer.strip()}\n  {stats.prompt_tokens} tokens read, {stats.reused_tokens} reused")
            if stream.offload_stats:
                keys, values = stream.offload_stats.all_keys.hit_ratio, stream.offload_stats.all_values.hit_ratio
                print(f"  hot blocks on the GPU: {keys:.1%} of keys, {values:.1%} of values")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    try:
        main()
    except HipTrtError as error:
        sys.exit(f"error: {error}")
