"""The TensorRT executor's stream and CUDA graphs on a GPU, with an engine that is a few torch operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hip_trt import operator as names
from hip_trt.runtime.tensorrt import CudaStream, TensorRTExecutor
from hip_trt.tensorrt_flavour import MessageLog

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


class Context:
    """logits = input_ids + past_lengths, slowly; past_nodes are counted up in place."""

    def __init__(self, live: dict[int, Tensor]) -> None:
        self.live, self.addresses, self.enqueued = live, dict[str, int](), 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return stream != 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == torch.cuda.current_stream().cuda_stream != 0
        self.enqueued += 1
        tensor = {name: self.live[address] for name, address in self.addresses.items()}
        torch.cuda._sleep(10_000_000)
        tensor[names.LOGITS].copy_((tensor[names.INPUT_IDS] + tensor[names.PAST_LENGTHS][:, None])[..., None])
        tensor[names.NODES.present(0)].add_(1)
        return True


class Flavour:
    module = SimpleNamespace(ExecutionContextAllocationStrategy=SimpleNamespace(ON_PROFILE_CHANGE=1))

    @contextmanager
    def messages(self) -> Iterator[MessageLog]:
        yield MessageLog()


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_calls_are_ordered_with_the_callers_stream(cuda_graphs: bool) -> None:
    device = torch.device("cuda", 0)
    live: dict[int, Tensor] = {}
    contexts: list[Context] = []

    def create_execution_context(strategy: Any) -> Context:
        contexts.append(Context(live))
        return contexts[-1]

    engine = SimpleNamespace(create_execution_context=create_execution_context)
    sidecar: Any = SimpleNamespace(
        plan=SimpleNamespace(name="engine.plan"), profile_index=["prefill", "decode"].index
    )
    flavour: Any = Flavour()
    executor = TensorRTExecutor(
        engine, flavour, sidecar, device=device, stream=CudaStream(device), cuda_graphs=cuda_graphs
    )
    ids = torch.zeros(2, 1, dtype=torch.int64, device=device)
    lengths = torch.zeros(2, dtype=torch.int32, device=device)
    nodes = torch.zeros(2, 1, 4, dtype=torch.int32, device=device)
    logits = torch.zeros(2, 1, 1, device=device)
    inputs = {names.INPUT_IDS: ids, names.PAST_LENGTHS: lengths, names.NODES.past(0): nodes}
    outputs = {names.LOGITS: logits, names.NODES.present(0): nodes}
    live |= {tensor.data_ptr(): tensor for tensor in (ids, lengths, nodes, logits)}
    for step in range(6):
        torch.cuda._sleep(10_000_000)  # a caller that is still busy writing the inputs
        ids.fill_(10 * step)
        lengths.fill_(step)
        executor.run(inputs, outputs)
        seen = logits.clone()  # on the caller's stream, with no synchronization of its own
        ids.fill_(-1)
        assert seen.flatten().tolist() == [11 * step] * 2
    assert nodes.flatten().tolist() == [6] * 8
    assert contexts[1].enqueued == (2 if cuda_graphs else 6)  # with graphs: once run, once captured
    assert next(iter(executor._decoders.values())).replay is None or cuda_graphs
