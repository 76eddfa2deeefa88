"""A layer of quantized experts beside the same layer with float weights, and the forms that such weights come in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from epbackend.device import get_device
from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.kernels.fp8 import BLOCK, Fp8Blocks
from epbackend.kernels.int8 import Int8Matrix, Int8Weights
from epbackend.kernels.weight_formats import Matrices
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap
from tests.helpers.dense import dense_moe
from tests.helpers.layer_case import place_of

E, K = 8, 3


def int8_matrices(weights_EXX: Tensor, place: torch.device) -> list[Int8Matrix]:
    """An expert each, as they are loaded one by one."""
    matrices = [Int8Matrix.of(weight) for weight in weights_EXX]
    return [Int8Matrix(each.values_NK.to(place), each.scale_N.to(place)) for each in matrices]


def int8_weights(weights_EXX: Tensor, place: torch.device) -> Int8Weights:
    """All experts in one tensor."""
    weights = Int8Weights.of(weights_EXX)
    return Int8Weights(weights.values_LNK.to(place), weights.scale_LN.to(place))


def fp8_blocks(weights_EXX: Tensor, place: torch.device) -> Fp8Blocks:
    blocks = Fp8Blocks.of(weights_EXX)
    return Fp8Blocks(blocks.values_LNK.to(place), blocks.scale_LBB.to(place))


@dataclass(frozen=True)
class Form:
    """How a layer's weights are quantized, its sizes, and how far its answer may be from the float layer's."""

    quantize: Callable[[Tensor, torch.device], Matrices]
    hidden: int
    width: int
    within: float
    """Relative to the answer's norm."""


# Each product rounds its rows too, and may round scales to bfloat16; float8 loses up to 1 part in 16, twice.
INT8 = Form(int8_matrices, 64, 64, 0.03)
FP8 = Form(fp8_blocks, 2 * BLOCK, BLOCK, 0.08)


def assert_near(found: Tensor, expected: Tensor, form: Form) -> None:
    error = (found.double() - expected).norm() / expected.norm().clamp(min=1e-9)
    assert error < form.within


def layer_is_near(
    groups: dict[int, RankGroup],
    settings: DispatchSettings,
    slots: tuple[int, ...],
    device_name: str,
    form: Form = INT8,
) -> None:
    """Fail unless this rank's tokens get what the float layer gives them.

    `slots` names the expert in each slot, rank by rank; ranks have unequal numbers of tokens, and rank 2 has none.
    """
    ranks = groups[1]
    device = get_device(device_name)
    place = place_of(device, ranks.rank)
    slot_map = SlotMap.of(slots, ranks.size)
    draw = torch.Generator().manual_seed(0)
    gate_up = torch.randn(E, 2 * form.width, form.hidden, generator=draw) / form.hidden**0.5
    down = torch.randn(E, form.hidden, form.width, generator=draw) / form.width**0.5
    mine = list(slot_map.local_experts(ranks.rank))
    layer = ExpertParallelMoE(
        form.quantize(gate_up[mine], place),
        form.quantize(down[mine], place),
        slot_map=slot_map,
        ranks=ranks,
        settings=settings,
        top_k=K,
        device=device_name,
    )
    tokens = (7, 5, 0, 3)[ranks.rank]
    draw.manual_seed(1 + ranks.rank)
    hidden = torch.randn(tokens, form.hidden, generator=draw).bfloat16()
    ids = torch.rand(tokens, E, generator=draw).argsort(1)[:, :K]
    weights = torch.rand(tokens, K, generator=draw)
    found = layer(hidden.to(place), ids.to(place), weights.to(place)).cpu()
    assert_near(found, dense_moe(hidden, ids, weights, gate_up, down), form)
