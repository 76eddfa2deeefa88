"""Experts given as one tensor or one quantized whole are used in place: a GPU has no room for a second copy."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.kernels.fp8 import Fp8Blocks
from epbackend.kernels.int8 import Int8Weights
from epbackend.kernels.triton import expert_mlp
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap

pytestmark = pytest.mark.cuda


@pytest.fixture
def multiplied(monkeypatch):
    """The experts that the products are called with."""
    seen = []

    class Watched(expert_mlp.GroupedMatmul):
        def __init__(self, experts, *more, **named):
            seen.append(experts)
            super().__init__(experts, *more, **named)

    monkeypatch.setattr(expert_mlp, "GroupedMatmul", Watched)
    return seen


@pytest.mark.parametrize("weight_format", [torch.Tensor.bfloat16, Int8Weights.of, Fp8Blocks.of])
def test_weights_are_multiplied_in_place(multiplied, place, weight_format):
    halves = [weight_format(torch.randn(2, *shape, device=place)) for shape in ((256, 128), (128, 128))]
    layer = ExpertParallelMoE(
        *halves,
        slot_map=SlotMap.uniform(2, 1),
        ranks=RankGroup.single(),
        settings=DispatchSettings(),
        top_k=1,
        device="cuda",
    )
    hidden = torch.randn(3, 128, device=place).bfloat16()
    layer(hidden, torch.zeros(3, 1, dtype=torch.int64, device=place), torch.ones(3, 1, device=place))
    assert [addresses(each) for each in multiplied] == [addresses(half) for half in halves]


def addresses(experts) -> list[int]:
    if isinstance(experts, torch.Tensor):
        return [experts.data_ptr()]
    return [tensor.data_ptr() for tensor in vars(experts).values()]
