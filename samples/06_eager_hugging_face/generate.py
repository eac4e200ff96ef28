"""HiP in an eager Hugging Face model: no export, no engine, transformers' own generate().

    python samples/06_eager_hugging_face/generate.py ./Llama-3.2-1B "The capital of France is"

On a GPU, attention runs in the CUDA kernels; on a CPU in the reference, which is exact and slow.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hip_trt
from hip_trt.config import HipConfig
from hip_trt.errors import HipTrtError


def main(folder: str, prompt: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    for name, prepare in (
        ("dense", hip_trt.unpatch),  # the model's own attention
        ("HiP", lambda model: hip_trt.patch(model, HipConfig.create(mask_k=1024, refresh_interval=8))),
    ):
        output = prepare(model).generate(**inputs, max_new_tokens=32, do_sample=False)
        print(f"{name}: {tokenizer.decode(output[0, inputs['input_ids'].shape[1]:], skip_special_tokens=True)!r}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except HipTrtError as error:
        sys.exit(f"error: {error}")
