"""torch.ops.hip_trt and hip_trt.patch on a GPU, where they call the CUDA kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_checks import check_output, same_bits
from operator_cases import Case, make_inputs, named, reference
from oracle import tiny_llama
from torch import Tensor

import hip_trt
from hip_trt import operator as names
from hip_trt import ops  # noqa: F401  (importing it registers torch.ops.hip_trt)
from hip_trt.config import HipConfig
from hip_trt.errors import ConfigError, RuntimeInputError

pytestmark = [
    pytest.mark.usefixtures("installed"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SPARSE = HipConfig.create(
    mask_k=16, decode_mask_k=16, block_q=8, block_k=4, stride_q=4, page_size=8, sink_tokens=4, window_tokens=8,
    branch=2, leaf_branch=2, refresh_interval=3,
)
STATE = ("past_key", "past_value", "past_nodes")


def call(case: Case, **changes: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    inputs = {name: tensor.cuda() for name, tensor in {**make_inputs(case), **changes}.items()}
    return inputs, {**names.attributes(case.config, scale=case.scale), "dense": int(case.dense)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["ragged", "reuse and search at once", "dense"])
def test_both_forms_agree_with_the_reference(name: str, dtype: torch.dtype) -> None:
    case = replace(named(name), dtype=dtype)
    inputs, attributes = call(case)
    inputs["query"] = inputs["query"].transpose(1, 2).contiguous().transpose(1, 2)  # as models have it
    results = torch.ops.hip_trt.attention(*inputs.values(), **attributes)
    output = torch.ops.hip_trt.attention_(*inputs.values(), **attributes)
    expected = reference(case, make_inputs(case))
    check_output(case, results[0].cpu(), expected[0].double())
    for result, in_place in zip(results, (output, *(inputs[name] for name in STATE)), strict=True):
        assert same_bits(result, in_place)
    for result, other in zip(results[1:], expected[1:], strict=True):
        assert same_bits(result.cpu(), other)


def test_registration() -> None:
    case = named("reuse and search at once")
    inputs, attributes = call(case)
    inputs = {name: tensor.nan_to_num() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    for op in (torch.ops.hip_trt.attention.default, torch.ops.hip_trt.attention_.default):
        torch.library.opcheck(op, list(inputs.values()), attributes)


def test_compiles_and_replays_in_a_cuda_graph() -> None:
    case = named("reuse and search at once")
    inputs, attributes = call(case)
    expected = torch.ops.hip_trt.attention(*inputs.values(), **attributes)[0]
    compiled = torch.compile(
        lambda *tensors: torch.ops.hip_trt.attention(*tensors, **attributes)[0], fullgraph=True, backend="aot_eager"
    )
    assert same_bits(compiled(*inputs.values()), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = torch.ops.hip_trt.attention(*inputs.values(), **attributes)[0]
    output.fill_(float("nan"))
    graph.replay()
    assert same_bits(output, expected)


def test_misfit_is_named() -> None:
    inputs, attributes = call(named("ragged"))
    with pytest.raises(RuntimeInputError, match="value"):
        torch.ops.hip_trt.attention(*{**inputs, "value": inputs["value"].half()}.values(), **attributes)
    with pytest.raises(RuntimeInputError, match="page_table"):
        torch.ops.hip_trt.attention(*{**inputs, "page_table": inputs["page_table"].cpu()}.values(), **attributes)
    doubles = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    with pytest.raises(ConfigError, match="float64"):
        torch.ops.hip_trt.attention(*doubles.values(), **attributes)


def test_tiny_model_generates_as_on_the_cpu() -> None:
    model = hip_trt.patch(tiny_llama(initializer_range=0.2), SPARSE)
    ids, valid = torch.randint(1, 61, (2, 90)), torch.ones(2, 90, dtype=torch.long)
    valid[1, :41] = 0
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 24}
    with torch.inference_mode():
        expected = model.generate(ids, attention_mask=valid, **options)
        actual = model.cuda().generate(ids.cuda(), attention_mask=valid.cuda(), **options)
    assert actual.cpu().equal(expected)


@pytest.mark.sample
def test_sample_model_generates_the_same_64_tokens_as_the_reference(sample_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sample_model.parent, gguf_file=sample_model.name)
    model = AutoModelForCausalLM.from_pretrained(
        sample_model.parent, gguf_file=sample_model.name, dtype=torch.float32
    ).eval()
    # Small budgets, so that a prompt of a few hundred tokens is sparse.
    hip_trt.patch(model, HipConfig.create(mask_k=64, decode_mask_k=64, sink_tokens=16, window_tokens=64))
    text = "The history of the lighthouse is long. " * 40 + "In one sentence, a lighthouse is"
    inputs = tokenizer(text, return_tensors="pt")
    options = {"do_sample": False, "min_new_tokens": 64, "max_new_tokens": 64}
    with torch.inference_mode():
        expected = model.generate(**inputs, **options)
        actual = model.cuda().generate(**inputs.to("cuda"), **options)
    assert actual.cpu().equal(expected)
