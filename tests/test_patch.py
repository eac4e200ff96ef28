"""hip_trt.patch: Hugging Face models with HiP in eager mode, through transformers' own forward and generate()."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import OracleExecutor, tiny_llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    BertConfig,
    BertModel,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import hip_trt
from hip_trt import operator as names
from hip_trt.config import HipConfig
from hip_trt.errors import CheckpointError, ConfigError, RuntimeInputError
from hip_trt.huggingface import HipCache, cache_argument, output_cache
from hip_trt.huggingface.cache_name import cache_name
from hip_trt.reference import hip_attention
from hip_trt.runtime import Generator

DENSE = HipConfig.create(
    mask_k=512, decode_mask_k=512, block_q=8, block_k=4, stride_q=4, page_size=8, sink_tokens=4, window_tokens=8
)
SPARSE = DENSE.replace(mask_k=16, decode_mask_k=16, branch=2, leaf_branch=2, refresh_interval=3)
GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture
def model() -> Iterator[LlamaForCausalLM]:
    model = tiny_llama(initializer_range=0.2)
    with torch.inference_mode():
        yield model


def prompts(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(seed))


class Calls(TorchDispatchMode):
    """Records the calls of torch.ops.hip_trt.attention_: its attributes, and past_lengths, query_lengths, refresh."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.hip_trt.attention_.default:
            inputs = dict(zip(names.INPUTS, args, strict=True))
            lists = ("past_lengths", "query_lengths", "refresh_mask")
            self.calls.append({**kwargs, **{name: inputs[name].tolist() for name in lists}})
        return func(*args, **(kwargs or {}))


# Where the candidates fit, HiP is dense attention.


@pytest.mark.parametrize("tokens", [1, 7, 64, 90])
def test_logits_equal_dense_where_candidates_fit(model: LlamaForCausalLM, tokens: int) -> None:
    ids = prompts(2, tokens)
    expected = model(ids).logits
    torch.testing.assert_close(hip_trt.patch(model, DENSE)(ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2, "num_return_sequences": 2}, {"prefill_chunk_size": 16}], ids=["greedy", "beams", "chunks"],
)
def test_generates_as_dense_where_candidates_fit(model: LlamaForCausalLM, options: dict[str, Any]) -> None:
    ids = prompts(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    options = {**GREEDY, **options, "attention_mask": mask, "max_new_tokens": 12}
    expected = model.generate(ids, **options)
    assert hip_trt.patch(model, DENSE).generate(ids, **options).equal(expected)


def test_another_family_that_uses_the_interface() -> None:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**{**TINY, "vocab_size": 61, "num_key_value_heads": 1})).eval()
    ids = prompts(1, 50)
    expected = model(ids).logits
    torch.testing.assert_close(hip_trt.patch(model, DENSE)(ids).logits, expected, atol=1e-4, rtol=1e-4)


# Sparse: what the reference computes.


def direct(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, *, scaling: float, hip: HipConfig, **_: Any
) -> tuple[Tensor, None]:
    """An attention function that calls the reference on one whole prompt per sequence."""
    batch, heads, tokens, head_dim = query.shape
    slots = -(-tokens // hip.page_size)
    pool = torch.full((batch * slots, key.shape[1], hip.page_size, head_dim), float("nan"))
    nodes = torch.full((batch, hip.num_masks(heads, key.shape[1]), hip.decode_mask_blocks), -1, dtype=torch.int32)
    lengths = torch.zeros(batch, dtype=torch.int32)
    output = hip_attention(
        query, key, value, pool, pool, torch.arange(batch * slots, dtype=torch.int32).view(batch, slots), lengths,
        lengths + tokens, nodes, torch.ones(1, dtype=torch.int32),
        config=hip, scale=scaling, dense=module.layer_idx in hip.dense_layers,
    )[0]
    return output.transpose(1, 2), None


@pytest.mark.parametrize(
    "config", [SPARSE.replace(mask_heads="query"), SPARSE.replace(dense_layers=[1])], ids=["mask heads", "dense layer"]
)
def test_logits_equal_the_reference(model: LlamaForCausalLM, config: HipConfig) -> None:
    ids = prompts(2, 90)
    dense = model(ids).logits
    actual = hip_trt.patch(model, config)(ids).logits
    AttentionInterface.register("direct", direct)
    hip_trt.unpatch(model).set_attn_implementation("direct")
    expected = model(ids, use_cache=False, hip=config).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(actual, dense, atol=1e-2)  # the mask leaves something out


@pytest.mark.parametrize("config", [SPARSE, SPARSE.replace(reuse_level=0, mask_heads="query")], ids=["1", "0"])
def test_generates_as_the_runtime_does(model: LlamaForCausalLM, config: HipConfig) -> None:
    prompt = prompts(1, 70)
    expected = Generator(OracleExecutor(model, config)).generate([prompt[0].tolist()], max_new_tokens=16)[0].tokens
    actual = hip_trt.patch(model, config).generate(prompt, max_new_tokens=16, **GREEDY)
    assert tuple(actual[0, 70:].tolist()) == tuple(expected)


def test_searches_from_the_top_every_refresh_interval(model: LlamaForCausalLM) -> None:
    hip_trt.patch(model, SPARSE.replace(dense_layers=[0]))
    with Calls() as recorded:
        cache = output_cache(model, model(prompts(2, 20)))
        for tokens in (1, 1, 1, 1, 1, 4, 1, 1):
            model(prompts(2, tokens), **cache_argument(model, cache))
    first, second = recorded.calls[::2], recorded.calls[1::2]
    assert [call["refresh_mask"] for call in second] == [[n] for n in (1, 1, 0, 0, 1, 0, 1, 1, 0)]
    assert [call["past_lengths"] for call in second] == [[n, n] for n in (0, 20, 21, 22, 23, 24, 25, 29, 30)]
    assert {call["dense"] for call in first} == {1}
    assert {call["dense"] for call in second} == {0}


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", sorted({"past_key_values", cache_name(LlamaForCausalLM)}))
@pytest.mark.parametrize("stack", [False, True], ids=["model", "decoder stack"])
def test_chunks_of_whole_query_blocks_give_the_same(model: LlamaForCausalLM, name: str, stack: bool) -> None:
    """Whatever this transformers calls the cache, and by its older name."""
    ids = prompts(2, 100)
    hip_trt.patch(model, SPARSE)
    whole, cache = model(ids), None
    parts = []
    for part in ids.split(32, dim=1):
        if stack:
            result = model.model(part, use_cache=True, **{name: cache})
            parts.append(model.lm_head(result.last_hidden_state))
        else:
            result = model(part, use_cache=True, **{name: cache})
            parts.append(result.logits)
        cache = output_cache(model, result)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == 100


def test_cache_by_both_names_is_refused(model: LlamaForCausalLM) -> None:
    hip_trt.patch(model, SPARSE)
    stack, cache = model.model, HipCache(model.config, SPARSE)
    with pytest.raises(TypeError, match="cache and past_key_values are two names of one argument"):
        stack(prompts(1, 8), cache=cache, past_key_values=HipCache(model.config, SPARSE))
    result = stack(prompts(1, 8), cache=cache, past_key_values=None)
    assert output_cache(stack, result) is cache


def test_loss_over_a_long_text(model: LlamaForCausalLM) -> None:
    ids = prompts(1, 120)
    hip_trt.patch(model, SPARSE)
    with_cache, without = model(ids, labels=ids), model(ids, labels=ids, use_cache=False)
    torch.testing.assert_close(with_cache.logits, without.logits, atol=0, rtol=0)
    assert torch.isfinite(without.loss)
    assert output_cache(model, without) is None
    assert isinstance(output_cache(model, with_cache), HipCache)


# Padding


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padded_row_gives_what_it_gives_alone(model: LlamaForCausalLM, left: bool) -> None:
    hip_trt.patch(model, SPARSE)
    ids, valid = prompts(2, 90), torch.ones(2, 90, dtype=torch.long)
    valid[1, slice(0, 23) if left else slice(67, 90)] = 0
    positions = (valid.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=valid, position_ids=positions).logits
    torch.testing.assert_close(logits[:1], model(ids[:1]).logits, atol=1e-5, rtol=1e-5)
    alone = model(ids[1:, valid[1].bool()]).logits
    torch.testing.assert_close(logits[1:, valid[1].bool()], alone, atol=1e-5, rtol=1e-5)


def test_left_padded_batch_generates_what_each_row_does_alone(model: LlamaForCausalLM) -> None:
    hip_trt.patch(model, SPARSE)
    ids, valid = prompts(2, 90), torch.ones(2, 90, dtype=torch.long)
    valid[1, :41] = 0
    together = model.generate(ids, attention_mask=valid, max_new_tokens=16, **GREEDY)[:, 90:]
    for row, start in ((0, 0), (1, 41)):
        alone = model.generate(ids[row : row + 1, start:], max_new_tokens=16, **GREEDY)[:, 90 - start:]
        assert together[row].equal(alone[0])


def test_padding_is_neither_attended_nor_kept(model: LlamaForCausalLM) -> None:
    hip_trt.patch(model, SPARSE)
    ids, valid = prompts(3, 30), torch.ones(3, 30, dtype=torch.long)
    valid[1, :11] = 0
    valid[2] = 0
    cache = output_cache(model, model(ids, attention_mask=valid))
    assert cache.layers[1].lengths.tolist() == [30, 19, 0]
    assert cache.get_seq_length() == 30


# The cache


def test_pools_grow_with_the_sequences(model: LlamaForCausalLM) -> None:
    hip_trt.patch(model, SPARSE)
    cache = output_cache(model, model(prompts(2, 9)))
    layer = cache.layers[0]
    assert layer.page_table.tolist() == [[0, 2], [1, 3]]
    before = layer.keys.clone()
    model(prompts(2, 10), **cache_argument(model, cache))
    assert layer.page_table.tolist() == [[0, 2, 4], [1, 3, 5]]
    assert layer.keys.shape == (6, 2, 8, 8)
    assert layer.keys[:2].equal(before[:2])  # the full pages


def test_pools_allocated_at_once_stay(model: LlamaForCausalLM) -> None:
    hip_trt.patch(model, SPARSE)
    cache = HipCache(model.config, SPARSE, max_tokens=64)
    model(prompts(1, 3), **cache_argument(model, cache))
    address = cache.layers[1].values.data_ptr()
    for _ in range(4):
        model(prompts(1, 15), **cache_argument(model, cache))
    assert cache.layers[1].values.data_ptr() == address


def test_sequences_can_be_reordered_repeated_and_forgotten(model: LlamaForCausalLM) -> None:
    hip_trt.patch(model, SPARSE)
    ids, last = prompts(3, 60), prompts(4, 1, seed=1)
    valid = torch.ones_like(ids)
    valid[1, :20] = 0
    order = torch.tensor([1, 0, 1, 2])
    cache = output_cache(model, model(ids, attention_mask=valid))
    cache.batch_select_indices(order[:3])
    cache.reorder_cache(torch.tensor([2, 1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 4, 5]))  # sequences 1, 0, 1, 1
    order = torch.tensor([1, 0, 1, 1])
    expected = output_cache(model, model(ids[order], attention_mask=valid[order]))
    step = {"attention_mask": torch.ones(4, 61), "position_ids": torch.full((4, 1), 60)}
    torch.testing.assert_close(
        *(model(last, **cache_argument(model, one), **step).logits for one in (cache, expected)),
        atol=1e-5, rtol=1e-5,
    )
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(ids[order], **cache_argument(model, cache)).logits, model(ids[order]).logits)


# Patching


def test_unpatch_restores(model: LlamaForCausalLM) -> None:
    ids = prompts(2, 90)
    expected, implementation = model(ids), model.config._attn_implementation
    hip_trt.patch(hip_trt.patch(model, DENSE), SPARSE)
    assert model.config._attn_implementation == "hip_trt"
    assert not torch.allclose(model(ids).logits, expected.logits, atol=1e-2)
    assert hip_trt.unpatch(model) is model
    assert model.config._attn_implementation == implementation
    result = model(ids)
    assert result.logits.equal(expected.logits)
    assert type(output_cache(model, result)) is type(output_cache(model, expected))
    hip_trt.unpatch(model)


def test_models_are_patched_one_by_one(model: LlamaForCausalLM) -> None:
    other, ids = tiny_llama(initializer_range=0.2), prompts(1, 90)
    expected = other(ids).logits
    sparse, dense = hip_trt.patch(model, SPARSE)(ids).logits, hip_trt.patch(other, DENSE)(ids).logits
    torch.testing.assert_close(dense, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sparse, dense, atol=1e-2)
    assert model(ids).logits.equal(sparse)


def test_importing_hip_trt_imports_no_transformers() -> None:
    program = "import sys, hip_trt; print('transformers' in sys.modules, 'patch' in hip_trt.__all__)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False True\n"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MistralForCausalLM(MistralConfig(sliding_window=64, num_key_value_heads=1, **TINY)),
         "sliding window of 64 tokens"),
        (lambda: Gemma2ForCausalLM(Gemma2Config(layer_types=["full_attention"], **TINY)), "attn_logit_softcapping"),
        (lambda: Qwen2ForCausalLM(Qwen2Config(layer_types=["linear_attention"], **TINY)), "linear_attention"),
        (lambda: T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=1, vocab_size=9)), "T5"),
        (lambda: BertModel(BertConfig(**TINY)), "BertModel: the model does not attend causally"),
        (lambda: tiny_llama(is_causal=False), r"does not attend causally \(is_causal false\)"),
        (lambda: torch.nn.Linear(2, 2), "Linear does not use transformers' attention interface"),
    ],
    ids=["sliding window", "soft-capping", "mixed layers", "encoder-decoder", "encoder", "not causal", "other module"],
)
def test_model_that_is_not_supported_is_refused(build: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        hip_trt.patch(build())


TINY = {"vocab_size": 9, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_dense_layer_beyond_the_last_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match=r"dense_layers: 2 is not allowed; it must be below 2"):
        hip_trt.patch(model, SPARSE.replace(dense_layers=[0, 2]))
    assert model.config._attn_implementation != "hip_trt"


def filled_cache() -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    return cache


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda model: {"output_attentions": True}, "output_attentions"),
        (lambda model: {"attention_mask": torch.ones(1, 1, 8, 8)}, "4-D attention_mask"),
        (lambda model: {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), "use_cache": False}, "packed seq"),
        (lambda model: cache_argument(model, StaticCache(config=model.config, max_cache_len=32)), "a StaticCache"),
        (lambda model: cache_argument(model, filled_cache()), "a DynamicCache"),
        (lambda model: cache_argument(model, output_cache(model, model(prompts(2, 3)))), "holds 2 sequences, the call"),
    ],
    ids=["weights", "4-D mask", "packed", "static cache", "filled cache", "another batch"],
)
def test_call_that_is_not_supported_is_refused(model: LlamaForCausalLM, options: Any, message: str) -> None:
    hip_trt.patch(model, SPARSE)
    with pytest.raises(RuntimeInputError, match=message):
        model(prompts(1, 8), **options(model))


@pytest.mark.parametrize("name", ["sliding_window", "softcap", "s_aux"])
def test_argument_of_other_attention_is_refused(model: LlamaForCausalLM, name: str) -> None:
    hip_trt.patch(model, SPARSE)
    with pytest.raises(RuntimeInputError, match=name):
        model(prompts(1, 8), **{name: 3})


def test_dropout_is_refused() -> None:
    model = hip_trt.patch(tiny_llama(attention_dropout=0.1), SPARSE).train()
    with pytest.raises(RuntimeInputError, match="dropout"):
        model(prompts(1, 8))


def test_assisted_generation_is_refused(model: LlamaForCausalLM) -> None:
    hip_trt.patch(model, SPARSE)
    with pytest.raises((RuntimeInputError, ValueError), match="crop"):  # from 5.24 on, transformers refuses it itself
        model.generate(prompts(1, 20), prompt_lookup_num_tokens=3, max_new_tokens=8, **GREEDY)


def test_implementation_set_by_hand_is_refused(model: LlamaForCausalLM) -> None:
    hip_trt.unpatch(hip_trt.patch(model, SPARSE)).set_attn_implementation("hip_trt")
    with pytest.raises(RuntimeInputError, match=r"hip_trt\.patch"):
        model(prompts(1, 8))


# Tracing


@pytest.fixture
def one_layer() -> Iterator[LlamaForCausalLM]:
    with torch.inference_mode():
        yield tiny_llama(initializer_range=0.2, num_hidden_layers=1)


def test_compiles_without_graph_breaks(one_layer: LlamaForCausalLM) -> None:
    model = hip_trt.patch(one_layer, SPARSE)
    ids, valid = prompts(2, 70), torch.ones(2, 70, dtype=torch.long)
    valid[0, :9] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = compiled(ids, attention_mask=valid, use_cache=False).logits
    torch.testing.assert_close(actual, model(ids, attention_mask=valid, use_cache=False).logits, atol=1e-4, rtol=1e-4)


def test_compiled_decode_steps_keep_the_cache(one_layer: LlamaForCausalLM) -> None:
    model = hip_trt.patch(one_layer, SPARSE)
    ids, compiled = prompts(1, 60), torch.compile(model, fullgraph=True, backend="aot_eager")
    caches = [output_cache(model, model(ids, use_cache=True)) for _ in range(2)]
    for token in prompts(4, 1, 1, seed=2):
        eager, traced = (
            one(token, **cache_argument(model, cache)) for one, cache in zip((model, compiled), caches, strict=True)
        )
        torch.testing.assert_close(traced.logits, eager.logits, atol=1e-4, rtol=1e-4)
    assert caches[1].layers[0].lengths.tolist() == [64]


def test_exports_with_dynamic_shapes(one_layer: LlamaForCausalLM) -> None:
    model = hip_trt.patch(one_layer, SPARSE)
    with torch.no_grad():
        program = torch.export.export(
            model, (prompts(2, 30),), {"use_cache": False}, strict=False,
            dynamic_shapes={"input_ids": {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("tokens", min=9)},
                            "use_cache": None},
        )
    ids = prompts(3, 90, seed=1)
    actual = program.module()(ids, use_cache=False).logits
    torch.testing.assert_close(actual, model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5)
