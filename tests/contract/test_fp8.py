"""Experts in float8 blocks: as near to the same layer with float weights as three bits of mantissa allow."""

from __future__ import annotations

import pytest
import torch

from epbackend.device import get_device
from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.errors import ConfigError
from epbackend.kernels import ExpertWeights
from epbackend.kernels.fp8 import BLOCK, Fp8Blocks
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap
from tests.helpers.dense import dense_moe

D, F, E, K = 2 * BLOCK, BLOCK, 4, 2


@pytest.fixture
def fp8_device(device):
    """Each device that takes float8 experts."""
    if device.name == "ascend":
        pytest.skip("device ascend takes no float8 experts")
    return device


def on(place: torch.device, weights_LNK: torch.Tensor) -> Fp8Blocks:
    blocks = Fp8Blocks.of(weights_LNK)
    return Fp8Blocks(blocks.values_LNK.to(place), blocks.scale_LBB.to(place))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 8% of the values' size: weights and rows lose up to 1 part in 16, in two products one after the other."""
    error = (found.double() - expected).norm() / expected.norm().clamp(min=1e-9)
    assert error < 0.08


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_experts(kernels, fp8_device, dtype):
    place = fp8_device.torch_device(0)
    gate_up_L2FD, down_LDF = torch.randn(3, 2 * F, D) / D**0.5, torch.randn(3, D, F) / F**0.5
    packed = [kernels.prepack(on(place, weights)) for weights in (gate_up_L2FD, down_LDF)]
    counts_L = torch.tensor([4, 0, 2])
    rows_SD = torch.randn(7, D).to(dtype)
    out_SD = kernels.expert_mlp(rows_SD.to(place), counts_L.to(place), ExpertWeights(*packed)).cpu()
    assert out_SD.dtype == dtype
    slot_S1 = torch.tensor([0, 0, 0, 0, 2, 2]).unsqueeze(1)
    close(out_SD[:6], dense_moe(rows_SD[:6], slot_S1, torch.ones(6, 1), gate_up_L2FD, down_LDF))


def test_values_that_float8_holds_are_exact(kernels, fp8_device):
    """Blocks, scales and slots that are mixed up show; so does an addition in less than float32."""
    place = fp8_device.torch_device(0)
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(-2, 3, (2, 2 * BLOCK, 3 * BLOCK), generator=draw).to(torch.float8_e4m3fn)
    scales = 2.0 ** torch.randint(-3, 4, (2, 2, 3), generator=draw)
    experts = Fp8Blocks(values.to(place), scales.to(place))
    rows = torch.randint(-1, 2, (20, 3 * BLOCK), generator=draw).float() * 448
    rows *= torch.tensor([1.0, 0.5, 4.0]).repeat_interleave(BLOCK)
    rows[:, ::BLOCK] = 448 * torch.tensor([1.0, 0.5, 4.0])  # the largest of its block
    found = kernels.grouped_matmul(
        rows.to(place), kernels.prepack(experts), torch.tensor([3, 17], device=place)
    ).cpu()
    slot_S = torch.tensor([0] * 3 + [1] * 17)
    full_LNK = Fp8Blocks(values, scales).dequantized().double()
    assert torch.equal(found.double(), torch.einsum("sk,snk->sn", rows.double(), full_LNK[slot_S]))


def layer_is_close(groups: dict[int, RankGroup], settings: DispatchSettings, name: str) -> None:
    ranks = groups[1]
    device = get_device(name)
    place = device.torch_device(ranks.rank)
    slot_map = SlotMap.of((*range(E), 0, 3), ranks.size)
    draw = torch.Generator().manual_seed(0)
    gate_up = torch.randn(E, 2 * F, D, generator=draw) / D**0.5
    down = torch.randn(E, D, F, generator=draw) / F**0.5
    mine = list(slot_map.local_experts(ranks.rank))
    layer = ExpertParallelMoE(
        on(place, gate_up[mine]),
        on(place, down[mine]),
        slot_map=slot_map,
        ranks=ranks,
        settings=settings,
        top_k=K,
        device=name,
    )
    draw.manual_seed(1 + ranks.rank)
    hidden = torch.randn(9 - 4 * ranks.rank, D, generator=draw).bfloat16()
    ids = torch.rand(len(hidden), E, generator=draw).argsort(1)[:, :K]
    weights = torch.rand(len(hidden), K, generator=draw)
    close(
        layer(hidden.to(place), ids.to(place), weights.to(place)).cpu(),
        dense_moe(hidden, ids, weights, gate_up, down),
    )


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_layer(ranks, fp8_device, size, level):
    ranks.run(size, layer_is_close, DispatchSettings(level=level), fp8_device.name)


@pytest.mark.ascend
def test_ascend_says_that_it_takes_none(device):
    if device.name != "ascend":
        pytest.skip(f"device {device.name} takes float8 experts")
    with pytest.raises(
        ConfigError, match="float8 experts are not supported; serve this model in bfloat16 or"
    ):
        device.kernels.prepack(on(device.torch_device(0), torch.randn(1, BLOCK, BLOCK)))
