"""What the kernels behind the C ABI of version 2 are held to, wherever they run: test_kernels_v2.py emulated,
test_plugin.py as TensorRT runs them."""

from __future__ import annotations

from dataclasses import dataclass

import decode_cases
import torch
from decode_checks import ROUNDING, TOLERANCES
from kernel_checks import Guarded, same_bits
from torch import Tensor
from v2_chains import Chain, Outputs, chosen_blocks, drive

from hip_trt import operator as names
from hip_trt.library import Library


@dataclass
class Results:
    """What one call wrote, on the CPU."""

    outputs: Outputs
    chosen_blocks: Tensor | None


def run(
    library: Library, chain: Chain, inputs: dict[str, Tensor], device: str, *, alias: bool = False, chosen: bool = True
) -> Results:
    """One call with every result poisoned before and guarded on both sides; ``alias`` writes onto the past tensors."""
    here = {name: Guarded(tensor.to(device)) for name, tensor in inputs.items()}
    there = {name: here[past] if alias else Guarded.poisoned(inputs[past], device)
             for name, past in names.STATE_V2.items()}
    there["output"] = Guarded.poisoned(inputs["query"], device)
    if chosen:
        shape = (*inputs["past_blocks"].shape[:2], -(-inputs["query"].shape[2] // chain.config.block_q),
                 chain.config.mask_blocks)
        there["chosen_blocks"] = Guarded.poisoned(torch.empty(shape, dtype=torch.int32), device)
    library.attention_v2(
        **{name: guarded.tensor for name, guarded in here.items()}, config=chain.config, scale=chain.scale,
        dense=chain.dense, **{name: guarded.tensor for name, guarded in there.items()},
    )
    for name, guarded in [*here.items(), *there.items()]:
        assert guarded.intact(), f"{name}: written out of bounds"
    for name, guarded in here.items():
        unchanged = same_bits(guarded.tensor.cpu(), inputs[name])
        assert unchanged or (alias and name in names.STATE_V2.values()), f"{name}: an input was changed"
    output, *state = (there[name].tensor.cpu() for name in names.OUTPUTS_V2)
    return Results((output, state[0], state[1], state[2], state[3], state[4]),
                   there["chosen_blocks"].tensor.cpu() if chosen else None)


def check_chain(
    library: Library, chain: Chain, device: str, *, alias: bool = False, chosen: bool = True
) -> None:
    """Compare every call with the reference; ``chosen`` is False where a library does not tell the chosen blocks."""

    def call(inputs: dict[str, Tensor]) -> Outputs:
        prefill = len(inputs["call_kind"]) == names.PREFILL
        found = run(library, chain, inputs, device, alias=alias, chosen=chosen and prefill)
        if found.chosen_blocks is not None and chain.nan is None:
            assert torch.equal(found.chosen_blocks, chosen_blocks(chain, inputs)), "chosen_blocks"
        return found.outputs

    rounding = decode_cases.ROUNDING
    decode_cases.ROUNDING = ROUNDING
    try:
        drive(chain, call, tolerance=TOLERANCES[chain.dtype])
    finally:
        decode_cases.ROUNDING = rounding
