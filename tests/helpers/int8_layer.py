"""A layer of int8 experts beside the same layer with float weights, and the forms that its weights come in."""

from __future__ import annotations

from collections.abc import Callable

import torch

from epbackend.device import get_device
from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.kernels import int8
from epbackend.kernels.weight_formats import Matrices
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap
from tests.helpers.dense import dense_moe

D, F, E, K = 64, 64, 8, 3


def quantized(weights_EXX: torch.Tensor, place: torch.device) -> list[int8.Int8Matrix]:
    matrices = [int8.Int8Matrix.of(weight) for weight in weights_EXX]
    return [int8.Int8Matrix(each.values_NK.to(place), each.scale_N.to(place)) for each in matrices]


def whole(weights_EXX: torch.Tensor, place: torch.device) -> int8.Int8Weights:
    weights = int8.Int8Weights.of(weights_EXX)
    return int8.Int8Weights(weights.values_LNK.to(place), weights.scale_LN.to(place))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 3% of the values' size: each product rounds its rows, and may round its scales to bfloat16."""
    error = (found.double() - expected).norm() / expected.norm().clamp(min=1e-9)
    assert error < 0.03


def layer_is_close(
    groups: dict[int, RankGroup],
    settings: DispatchSettings,
    slots: tuple[int, ...],
    name: str,
    hidden_size: int = D,
    form: Callable[[torch.Tensor, torch.device], Matrices] = quantized,
) -> None:
    """Run a layer of experts in a quantized form, fail unless this rank's tokens get what the float layer gives."""
    ranks = groups[1]
    device = get_device(name)
    place = device.torch_device(ranks.rank)
    slot_map = SlotMap.of(slots, ranks.size)
    draw = torch.Generator().manual_seed(0)
    gate_up = torch.randn(E, 2 * F, hidden_size, generator=draw) / hidden_size**0.5
    down = torch.randn(E, hidden_size, F, generator=draw) / 8
    mine = list(slot_map.local_experts(ranks.rank))
    layer = ExpertParallelMoE(
        form(gate_up[mine], place),
        form(down[mine], place),
        slot_map=slot_map,
        ranks=ranks,
        settings=settings,
        top_k=K,
        device=name,
    )
    tokens = (7, 0, 11, 3)[ranks.rank]
    draw.manual_seed(1 + ranks.rank)
    hidden = torch.randn(tokens, hidden_size, generator=draw).bfloat16()
    ids = torch.rand(tokens, E, generator=draw).argsort(1)[:, :K]
    weights = torch.rand(tokens, K, generator=draw)
    close(
        layer(hidden.to(place), ids.to(place), weights.to(place)).cpu(),
        dense_moe(hidden, ids, weights, gate_up, down),
    )
