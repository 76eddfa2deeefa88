"""Static calls: nothing is read back, and what happens does not depend on the routing.

How many collectives a call makes is checked for both kinds of calls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch

from epbackend.device import get_device
from epbackend.dispatch.base import DispatchSettings, LayerSpec
from epbackend.dispatch.choose import choose
from epbackend.dispatch.collectives import Collectives
from epbackend.kernels.reference import ReferenceKernels
from tests.helpers.host_reads import HostReads, Unwatched

L, D, K, T = 3, 16, 2, 8
REPLICATED = DispatchSettings(level=1)
ALLGATHER = DispatchSettings(level=1, dispatcher="allgather")
ALLTOALL = DispatchSettings(level=2, dispatcher="alltoall")
CHUNKS = replace(ALLTOALL, overlap_chunks=3, overlap_min_tokens=1)
ROUNDS = replace(ALLTOALL, buffer_scale_factors=((0, 0.5),))
PASSES = replace(ALLGATHER, topk_scaling_factor=0.5, cutoff_min_tokens=1)


@dataclass(frozen=True)
class Seen:
    """What one call did on one rank."""

    out_TD: torch.Tensor
    reads: list[str]
    collectives: list[str]
    rows: list[int]
    """Tokens that each batch is taken from."""
    passes: int
    rounds: int


def one_call(groups, token_size: int, settings: DispatchSettings, tokens: int, only_slot: int | None) -> Seen:
    """A layer whose experts double their rows. `only_slot` is what all choose; None: each something else."""
    ranks = groups[token_size]
    kernels = Unwatched(ReferenceKernels())
    dispatcher, _ = choose(LayerSpec(ranks, get_device("cpu"), kernels, settings, L, K))
    draw = torch.Generator().manual_seed(ranks.source)
    hidden_TD = torch.randn(tokens, D, generator=draw)
    ids_TK = torch.rand(tokens, L * ranks.size, generator=draw).argsort(1)[:, :K]
    if only_slot is not None:
        ids_TK = torch.full_like(ids_TK, only_slot)
    weights_TK = torch.rand(tokens, K, generator=draw)
    called, start = [], Collectives._start

    def spy(self, name, *args, **options):
        called.append(name)
        return start(self, name, *args, **options)

    rows = []
    with mock.patch.object(Collectives, "_start", spy), HostReads() as reads:
        exchange = dispatcher.begin(hidden_TD, ids_TK, weights_TK)
        for batch in exchange.dispatch():
            rows.append(len(getattr(exchange, "_inner", exchange)._local._hidden_ND))
            exchange.combine(batch.rows_SD * 2)
        out_TD = exchange.finish()
    return Seen(out_TD, reads, called, rows, exchange.passes, exchange.rounds)


def test_the_helper_finds_every_read():
    values = torch.arange(4)
    with HostReads() as reads:
        values.sum().item()
        values[values > 1]
        values.nonzero()
        bool(values[0])
        values.max().tolist()
        Unwatched(ReferenceKernels()).count(values[:, None], 2)
    assert {name.removeprefix("aten.").split(".")[0] for name in reads} == {
        "item",
        "index",
        "nonzero",
        "__bool__",
        "tolist",
    }


CALLS = {
    "replicated": (4, REPLICATED, ["all_reduce"]),
    "allgather": (1, ALLGATHER, ["all_gather", "reduce_scatter"]),
    "alltoall": (1, ALLTOALL, ["all_gather", "all_to_all"]),
    "allgather of slices": (2, ALLGATHER, ["all_gather", "reduce_scatter", "all_gather"]),
    "alltoall of slices": (2, ALLTOALL, ["all_gather", "all_to_all", "all_gather"]),
    "int8": (1, replace(ALLGATHER, dispatch_dtype="int8"), ["all_gather", "reduce_scatter"]),
    "fp8": (1, replace(ALLTOALL, dispatch_dtype="fp8"), ["all_gather", "all_to_all"]),
    "passes": (1, PASSES, ["all_gather", "reduce_scatter"]),
    "chunks": (1, CHUNKS, ["all_gather"] * 2 + ["all_to_all", "all_gather"] + ["all_to_all"] * 2),
    "rounds": (1, ROUNDS, ["all_gather"] * 2 + ["all_to_all", "all_gather"] * 2 + ["all_to_all"] * 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_read_back_and_routing_changes_nothing(ranks, name):
    token_size, settings, collectives = CALLS[name]
    static = replace(settings, static=True)
    for seen, other, exact in zip(
        ranks.run(4, one_call, token_size, static, T, None),
        ranks.run(4, one_call, token_size, static, T, 5),
        ranks.run(4, one_call, token_size, settings, T, None),
        strict=True,
    ):
        assert seen.reads == other.reads == []
        assert seen.collectives == other.collectives == collectives
        assert (seen.rows, seen.passes, seen.rounds) == (other.rows, other.passes, other.rounds)
        assert exact.passes <= seen.passes
        assert exact.rounds <= seen.rounds
        torch.testing.assert_close(seen.out_TD, exact.out_TD)


def test_worst_case_is_covered(ranks):
    """All choose one slot: its rank gets every token, and its passes and rounds hold them."""
    for settings in (PASSES, ROUNDS):
        for seen in ranks.run(4, one_call, 1, replace(settings, static=True), T, 5):
            assert seen.passes * seen.rounds == {PASSES: 2, ROUNDS: 4}[settings]
            assert seen.out_TD.abs().min() > 0


@pytest.mark.parametrize(
    ("token_size", "settings", "collectives"),
    [
        (4, REPLICATED, ["all_reduce"]),
        (1, ALLGATHER, ["all_gather", "all_gather", "reduce_scatter"]),
        (1, ALLTOALL, ["all_gather", "all_to_all", "all_to_all"]),
        (2, ALLTOALL, ["all_gather", "all_to_all", "all_to_all", "all_gather"]),
        (1, CHUNKS, ["all_gather"] + ["all_to_all"] * 6),
    ],
)
def test_an_exact_call_reads_once_at_most(ranks, token_size, settings, collectives):
    for seen in ranks.run(4, one_call, token_size, settings, T, None):
        assert seen.collectives == collectives
        assert seen.reads == ["tolist"] * (settings != REPLICATED)


@pytest.mark.parametrize("name", CALLS)
def test_few_tokens_give_the_same_as_an_exact_call(ranks, name):
    """None, and fewer than ranks that share them or than steps."""
    token_size, settings, _ = CALLS[name]
    for tokens in (0, 1, 3):
        exact = ranks.run(4, one_call, token_size, settings, tokens, None)
        static = ranks.run(4, one_call, token_size, replace(settings, static=True), tokens, None)
        for one, other in zip(static, exact, strict=True):
            assert one.reads == []
            assert one.out_TD.shape == (tokens, D)
            torch.testing.assert_close(one.out_TD, other.out_TD)
