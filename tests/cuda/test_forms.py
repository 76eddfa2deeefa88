"""Whole forms of experts are used where they are: on a GPU there is no room for a second copy."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.kernels.fp8 import Fp8Blocks
from epbackend.kernels.int8 import Int8Weights
from epbackend.kernels.triton import kernels as triton_kernels
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap

pytestmark = pytest.mark.cuda


@pytest.fixture
def packed(monkeypatch):
    """What the kernels get to multiply with."""
    seen = []

    class Products(triton_kernels.Products):
        def gated(self, rows, experts, bias):
            seen.append(experts)
            return super().gated(rows, experts, bias)

        def plain(self, rows, experts, bias):
            seen.append(experts)
            return super().plain(rows, experts, bias)

    monkeypatch.setattr(triton_kernels, "Products", Products)
    return seen


@pytest.mark.parametrize("form", [torch.Tensor.bfloat16, Int8Weights.of, Fp8Blocks.of])
def test_nothing_is_copied(packed, place, form):
    halves = [form(torch.randn(2, *shape, device=place)) for shape in ((256, 128), (128, 128))]
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
    assert [addresses(each) for each in packed] == [addresses(half) for half in halves]


def addresses(experts) -> list[int]:
    if isinstance(experts, torch.Tensor):
        return [experts.data_ptr()]
    return [tensor.data_ptr() for tensor in vars(experts).values()]
