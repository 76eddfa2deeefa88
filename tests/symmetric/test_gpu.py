"""What only a GPU can show: torch's symmetric memory, capture and replay, ranks that wait for each other, big buffers.

Two ranks share one GPU where there is one (gloo between them, and torch's own switch for tests), so no figure is taken.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton import knobs

from epbackend.device import get_device
from epbackend.dispatch.base import DispatchSettings, LayerSpec, RankGroup
from epbackend.dispatch.symmetric import OVERLAP
from epbackend.dispatch.symmetric_exchange import SymmetricExchange
from epbackend.dispatch.symmetric_memory import ExchangeCapacity, SymmetricMemoryPeers
from epbackend.errors import CollectiveError
from epbackend.kernels.triton.symmetric import (
    SymmetricTensor,
    barrier,
    combine_send,
    dispatch,
    exchange_counts,
    recv_offsets,
    rows_at_receivers,
)
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap
from tests.helpers.dense import dense_moe, tolerance
from tests.helpers.virtual_ranks import Hub, VirtualPeers

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(knobs.runtime.interpret or not torch.cuda.is_available(), reason="there is no GPU"),
]
E, D, F, K, T = 8, 128, 96, 3, 40


def own_gpu(ranks: RankGroup) -> torch.device:
    """The rank's own GPU, or its share of the only one."""
    os.environ[OVERLAP] = "1"
    device = torch.device("cuda", ranks.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def symmetric_tensor(*shape: int, dtype: torch.dtype) -> SymmetricTensor:
    """A tensor that a single rank has for itself."""
    tensor = torch.empty(shape, dtype=dtype, device="cuda")
    return SymmetricTensor(tensor, torch.tensor([tensor.data_ptr()], device="cuda"))


class Layer:
    """A layer over all ranks, with tokens in buffers that stay where they are."""

    def __init__(self, ranks: RankGroup, static: bool) -> None:
        self.device, self.rank = own_gpu(ranks), ranks.rank
        draw = torch.Generator().manual_seed(0)
        self.gate_up = (torch.randn(E, 2 * F, D, generator=draw) / D**0.5).to(self.device, torch.bfloat16)
        self.down = (torch.randn(E, D, F, generator=draw) / F**0.5).to(self.device, torch.bfloat16)
        slot_map = SlotMap.uniform(E, ranks.size)
        mine = list(slot_map.local_experts(ranks.rank))
        self.layer = ExpertParallelMoE(
            self.gate_up[mine],
            self.down[mine],
            slot_map=slot_map,
            ranks=ranks,
            settings=DispatchSettings(level=2, dispatcher="symmetric", max_tokens=T, static=static),
            top_k=K,
            device="cuda",
        )
        self.hidden_TD = torch.empty(T, D, device=self.device, dtype=torch.bfloat16)
        self.ids_TK = torch.empty(T, K, device=self.device, dtype=torch.int64)
        self.weights_TK = torch.rand(T, K, device=self.device)
        self.load(0)

    def load(self, seed: int) -> None:
        """Other tokens, and another routing: from even to all in one slot."""
        draw = torch.Generator().manual_seed(seed + 1000 * self.rank)
        self.hidden_TD.copy_(torch.randn(T, D, generator=draw))
        self.ids_TK.copy_(torch.randint(0, max(1, E - 3 * seed), (T, K), generator=draw))

    def run(self, tokens: int = T) -> torch.Tensor:
        return self.layer(self.hidden_TD[:tokens], self.ids_TK[:tokens], self.weights_TK[:tokens])

    def check(self, out_TD: torch.Tensor, tokens: int = T) -> None:
        expected = dense_moe(
            self.hidden_TD[:tokens], self.ids_TK[:tokens], self.weights_TK[:tokens], self.gate_up, self.down
        )
        torch.testing.assert_close(out_TD.double(), expected, **tolerance(torch.bfloat16))


def eager(groups: dict[int, RankGroup]) -> None:
    layer = Layer(groups[1], static=False)
    for seed, tokens in enumerate([T, 5 * groups[1].rank, 0, T - groups[1].rank]):
        layer.load(seed)
        layer.check(layer.run(tokens), tokens)


def captured(groups: dict[int, RankGroup]) -> None:
    layer = Layer(groups[1], static=True)
    layer.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = layer.run()
    for seed in range(3):
        layer.load(seed)
        out_TD.fill_(torch.nan)
        graph.replay()
        layer.check(out_TD)


def nothing_waits(groups: dict[int, RankGroup]) -> None:
    layer = Layer(groups[1], static=True)
    layer.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("run", [eager, captured, nothing_waits], ids=lambda run: run.__name__)
def test_two_ranks_on_gpus(ranks, run):
    ranks.run(2, run)


class Alone(VirtualPeers):
    """One rank, which meets itself in the kernel."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(Hub((0,)), 0, device)
        self._signal_pad = symmetric_tensor(1, dtype=torch.int64)
        self._signal_pad.local.zero_()
        self._barriers_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self._timeout_report_2 = torch.zeros(2, dtype=torch.int64, pin_memory=True)

    def barrier(self, layer: int) -> None:
        barrier(self._signal_pad, self._barriers_1, self._timeout_report_2, self.rank, layer, timeout_s=5.0)


def test_one_rank_captured_and_replayed():
    """The phases alone, where a second rank cannot be had: experts that double a row."""
    hidden_TD = torch.empty(T, D, device="cuda", dtype=torch.bfloat16)
    ids_TK = torch.empty(T, K, device="cuda", dtype=torch.int64)
    weights_TK = torch.rand(T, K, device="cuda")
    settings = DispatchSettings(level=2, dispatcher="symmetric", static=True, max_tokens=T)
    cuda = get_device("cuda")
    spec = LayerSpec(RankGroup.single(), cuda, cuda.kernels, settings, slots=E, top_k=K)
    peers = Alone(hidden_TD.device)

    def load(seed: int) -> torch.Tensor:
        hidden_TD.copy_(torch.randn(T, D, generator=torch.Generator().manual_seed(seed)))
        ids_TK.copy_(torch.randint(0, max(1, E - 3 * seed), (T, K)))
        return (2 * hidden_TD.float() * weights_TK.sum(1, keepdim=True)).to(torch.bfloat16)

    def run() -> torch.Tensor:
        exchange = SymmetricExchange(spec, peers, ExchangeCapacity.of(spec), hidden_TD, ids_TK, weights_TK)
        for batch in exchange.dispatch():
            exchange.combine(2 * batch.rows_SD)
        return exchange.finish()

    load(0)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = run()
    for seed in range(3):
        expected = load(seed)
        out_TD.fill_(torch.nan)
        graph.replay()
        torch.testing.assert_close(out_TD, expected, **tolerance(torch.bfloat16))


def alone(groups: dict[int, RankGroup]) -> str:
    """The other rank leaves; this one hears of it, and its GPU takes no more work."""
    ranks = groups[1]
    device = own_gpu(ranks)
    peers = SymmetricMemoryPeers(ranks.group, device, timeout_s=2.0)
    peers.barrier(layer=3)
    torch.cuda.synchronize()
    if ranks.rank == 1:
        return ""
    peers.barrier(layer=4)
    with pytest.raises(CollectiveError) as failure:
        peers.read(torch.zeros(1, device=device))
    return str(failure.value)


def test_a_rank_that_does_not_come_to_a_barrier_is_named(ranks):
    try:
        heard, _ = ranks.run(2, alone)
    finally:
        ranks.close()  # its GPU context is lost
    assert heard.startswith("rank 1 did not come to an exchange of MoE layer 4 within timeout_s 2")


def test_rows_past_two_to_the_31_elements():
    tokens, top_k, width = 140_000, 8, 2048
    hidden_TD = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    ids_TK = torch.arange(top_k, device="cuda").expand(tokens, top_k).contiguous()

    table = symmetric_tensor(1, top_k + 1, dtype=torch.int32)
    rows, results = (symmetric_tensor(tokens * top_k, width, dtype=torch.bfloat16) for _ in range(2))
    choice_of_row = symmetric_tensor(tokens * top_k, dtype=torch.int64)
    before_BP = exchange_counts(ids_TK, tokens, table, 0)
    offsets = recv_offsets(table.local, 0, top_k, (0, tokens * top_k))
    row_S = rows_at_receivers(ids_TK, before_BP, offsets.bases_P)
    dispatch(hidden_TD, ids_TK, row_S, 0, rows, choice_of_row, 0, top_k)
    assert rows.local.numel() > 1 << 31
    assert torch.equal(rows.local[-tokens:], hidden_TD)
    combine_send(rows.local, offsets.counts_L, choice_of_row.local, results)
    assert torch.equal(results.local.view(tokens, top_k, width)[-9:, -1], hidden_TD[-9:])
