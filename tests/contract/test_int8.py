"""W8A8 on every device: equal to the same layer with float weights within what rounding to int8 costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from epbackend.device import get_device
from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.kernels import ExpertWeights, int8
from epbackend.kernels.weight_formats import Matrices
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap
from tests.helpers.dense import dense_moe

D, F, E, K = 64, 64, 8, 3
WAYS = {
    "level1": DispatchSettings(level=1),
    "level2": DispatchSettings(level=2),
    "passes": DispatchSettings(level=1, topk_scaling_factor=0.34, cutoff_min_tokens=1),
    "rounds": DispatchSettings(level=2, buffer_scale_factors=((0, 0.3),)),
}
REPLICAS = (0, 1, 2, 3, 4, 5, 6, 7, 0, 3, 0, 5)


def quantized(weights_EXX: torch.Tensor, place: torch.device) -> list[int8.Int8Matrix]:
    matrices = [int8.Int8Matrix.of(weight) for weight in weights_EXX]
    return [int8.Int8Matrix(each.values_NK.to(place), each.scale_N.to(place)) for each in matrices]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 3% of the values' size: each product rounds its rows, and may round its scales to bfloat16."""
    error = (found.double() - expected).norm() / expected.norm().clamp(min=1e-9)
    assert error < 0.03


def test_quantized_rows_are_within_half_a_step():
    rows_SK = torch.randn(5, 33) * torch.tensor([1e-6, 0.1, 1, 10, 0]).unsqueeze(1)
    values_SK, scale_S = int8.quantize_rows(rows_SK)
    assert values_SK.dtype == torch.int8
    steps = (values_SK * scale_S.unsqueeze(1) - rows_SK).abs() / scale_S.unsqueeze(1)
    assert steps.max() < 0.501
    assert values_SK[:4].abs().amax(1).tolist() == [127] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 40], ids=["fusable", "odd width"])
@pytest.mark.parametrize("slots", [1, 3])
def test_experts(kernels, device, dtype, width, slots):
    place = device.torch_device(0)
    gate_up_L2FD, down_LDF = torch.randn(slots, 2 * width, D) / 8, torch.randn(slots, D, width) / 8
    packed = [kernels.prepack(quantized(weights, place)) for weights in (gate_up_L2FD, down_LDF)]
    counts_L = torch.tensor([4, 0, 2][:slots])
    rows_SD = torch.randn(7, D).to(dtype)
    out_SD = kernels.expert_mlp(rows_SD.to(place), counts_L.to(place), ExpertWeights(*packed)).cpu()
    assert out_SD.dtype == dtype
    rows = int(counts_L.sum())
    slot_S1 = torch.repeat_interleave(torch.arange(slots), counts_L).unsqueeze(1)
    close(out_SD[:rows], dense_moe(rows_SD[:rows], slot_S1, torch.ones(rows, 1), gate_up_L2FD, down_LDF))


def whole(weights_EXX: torch.Tensor, place: torch.device) -> int8.Int8Weights:
    weights = int8.Int8Weights.of(weights_EXX)
    return int8.Int8Weights(weights.values_LNK.to(place), weights.scale_LN.to(place))


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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("slots", [tuple(range(E)), REPLICAS], ids=["uniform", "replicas"])
def test_layer(ranks, device, way, size, slots):
    ranks.run(size, layer_is_close, WAYS[way], slots, device.name)


@pytest.mark.parametrize("size", [1, 2])
def test_layer_of_whole_weights(ranks, device, size):
    ranks.run(size, layer_is_close, WAYS["level1"], REPLICAS, device.name, D, whole)
