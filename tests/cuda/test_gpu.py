"""What only a GPU can show: capture and replay, no waiting for the host, sizes past 2^31."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton import knobs

from epbackend.device import get_device
from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.kernels import ExpertWeights
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap
from tests.helpers.dense import dense_moe, tolerance
from tests.helpers.routing import routing

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(knobs.runtime.interpret or not torch.cuda.is_available(), reason="there is no GPU"),
]
L, D, F, K, T = 8, 128, 96, 3, 40


class Layer:
    """The kernels' part of a MoE layer on one rank, in buffers that stay where they are."""

    def __init__(self, kernels, dtype=torch.bfloat16) -> None:
        self.kernels = kernels
        self.gate_up = (torch.randn(L, 2 * F, D, device="cuda") / D**0.5).to(dtype)
        self.down = (torch.randn(L, D, F, device="cuda") / F**0.5).to(dtype)
        self.weights = ExpertWeights(kernels.prepack(self.gate_up), kernels.prepack(self.down))
        self.hidden_TD = torch.empty(T, D, device="cuda", dtype=dtype)
        self.ids_TK = torch.empty(T, K, device="cuda", dtype=torch.int64)
        self.weights_TK = torch.rand(T, K, device="cuda")
        self.load(0)

    def load(self, seed: int) -> None:
        """Other tokens, and another routing: from even to all in one slot."""
        self.hidden_TD.copy_(torch.randn(T, D, generator=torch.Generator().manual_seed(seed)))
        self.ids_TK.copy_(routing(T, K, 0, max(1, L - 3 * seed), seed))

    def run(self) -> torch.Tensor:
        permuted = self.kernels.permute(self.hidden_TD, self.ids_TK, L)
        rows_SD = self.kernels.expert_mlp(permuted.rows_SD, permuted.counts_L, self.weights)
        out_TD = torch.zeros(T, D, device="cuda")
        self.kernels.unpermute(rows_SD, permuted.choice_of_row_S, self.weights_TK, out_TD)
        return out_TD

    def expected(self) -> torch.Tensor:
        return dense_moe(self.hidden_TD, self.ids_TK, self.weights_TK, self.gate_up, self.down)


@pytest.mark.parametrize("name", ["triton", "grouped_mm"])
def test_captured_kernels_are_replayed_with_other_routings(cuda, name):
    layer = Layer(cuda.kernel_set(name))
    layer.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = layer.run()
    for seed in range(3):
        layer.load(seed)
        out_TD.fill_(torch.nan)
        graph.replay()
        torch.testing.assert_close(out_TD.double(), layer.expected(), **tolerance(torch.bfloat16))


def test_a_captured_layer_is_replayed_with_another_routing():
    """`ExpertParallelMoE` on one rank: what a decode step of an engine replays."""
    kernels = get_device("cuda").kernels
    inside = Layer(kernels)
    layer = ExpertParallelMoE(
        inside.gate_up,
        inside.down,
        slot_map=SlotMap.uniform(L, 1),
        ranks=RankGroup.single(),
        settings=DispatchSettings(),
        top_k=K,
        device="cuda",
    )
    layer(inside.hidden_TD, inside.ids_TK, inside.weights_TK)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = layer(inside.hidden_TD, inside.ids_TK, inside.weights_TK)
    inside.load(1)
    graph.replay()
    torch.testing.assert_close(out_TD.double(), inside.expected(), **tolerance(torch.bfloat16))


@pytest.mark.parametrize("name", ["triton", "grouped_mm"])
def test_kernels_never_wait_for_the_device(cuda, name):
    layer = Layer(cuda.kernel_set(name))
    layer.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_give_the_same_bits_each_time(kernels):
    layer = Layer(kernels)
    first = layer.run()
    assert all(torch.equal(layer.run(), first) for _ in range(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_equals_the_dense_formula(kernels, dtype):
    layer = Layer(kernels, dtype)
    torch.testing.assert_close(layer.run().double(), layer.expected(), **tolerance(dtype))


def test_rows_past_2_to_the_31_elements(kernels):
    tokens, top_k, width = 140_000, 8, 2048
    hidden_TD = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    ids_TK = torch.arange(top_k, device="cuda").expand(tokens, top_k).contiguous()
    permuted = kernels.permute(hidden_TD, ids_TK, top_k)
    assert permuted.rows_SD.numel() > 1 << 31
    assert torch.equal(permuted.rows_SD[-tokens:], hidden_TD)
    weight_LNK = torch.randn(top_k, 64, width, device="cuda", dtype=torch.bfloat16) / width**0.5
    rows_SN = kernels.grouped_matmul(permuted.rows_SD, kernels.prepack(weight_LNK), permuted.counts_L)
    expected = hidden_TD[-9:].float() @ weight_LNK[-1].float().T
    torch.testing.assert_close(rows_SN[-9:].float(), expected, **tolerance(torch.bfloat16))
    out_TD = torch.zeros(tokens, width, device="cuda")
    kernels.unpermute(
        permuted.rows_SD, permuted.choice_of_row_S, torch.ones(tokens, top_k, device="cuda"), out_TD
    )
    torch.testing.assert_close(out_TD[-9:], top_k * hidden_TD[-9:].float())


def test_weights_past_2_to_the_31_elements(kernels):
    slots, columns, depth = 40, 8192, 8192
    weight_LNK = torch.empty(slots, columns, depth, device="cuda", dtype=torch.bfloat16)
    weight_LNK[-1] = torch.randn(columns, depth, device="cuda") / depth**0.5
    rows_SK = torch.randn(20, depth, device="cuda", dtype=torch.bfloat16)
    counts_L = torch.zeros(slots, dtype=torch.int64, device="cuda")
    counts_L[-1] = 20
    rows_SN = kernels.grouped_matmul(rows_SK, kernels.prepack(weight_LNK), counts_L)
    expected = rows_SK.float() @ weight_LNK[-1].float().T
    torch.testing.assert_close(rows_SN.float(), expected, **tolerance(torch.bfloat16))
