"""The `level` split on the device gives the CPU's integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
split = pytest.importorskip("epbackend.placement.split", reason="needs numba", exc_type=ImportError)

from epbackend.kernels.triton.split import SplitTable, level_split
from epbackend.kernels.triton.split.level import level_shares
from epbackend.placement.layout import Layout

pytestmark = pytest.mark.cuda

LAYOUTS = {
    "no copies": Layout.even(6, 3),
    "one copied": Layout.of([0, 1, 2, 3, 0, 4], 3, 5),
    "a chain": Layout.of([0, 1, 1, 2, 2, 3, 3, 4], 4, 5),
    "twice on a rank": Layout.of([0, 0, 1, 2, 0, 3, 2, 1], 4, 4),
    "uneven ranks": Layout(((0, 1, 2), (0,), (3, 1), (0, 4)), 5),
    "many copies": Layout.even(7, 8, 32),
}


def draw(layout: Layout, seed: int, tokens: int = 60) -> list[np.ndarray]:
    """ids_TK of every source, some without tokens, skewed towards a few experts."""
    random = np.random.default_rng(seed)
    chances_E = random.pareto(1.0, layout.experts) + 0.01
    sizes_R = random.integers(0, tokens, layout.ranks) * random.integers(0, 2, layout.ranks)
    return [random.choice(layout.experts, (int(size), 2), p=chances_E / chances_E.sum()) for size in sizes_R]


def check(place: torch.device, layout: Layout, ids_of: list[np.ndarray], node_size: int) -> None:
    counts_RE = np.stack([np.bincount(ids.flatten(), minlength=layout.experts) for ids in ids_of])
    table = SplitTable.of(layout.slot_to_expert_P.tolist(), layout.rank_of_slot_P.tolist(), place)
    shares_P = split.level_shares(counts_RE.sum(0), layout)
    on_device = torch.from_numpy(counts_RE).to(place)
    found_XC = level_shares(on_device.sum(0), table)
    here_XC = table.slots_XC >= 0
    assert found_XC[here_XC].tolist() == shares_P[table.slots_XC[here_XC].cpu().numpy()].tolist()
    for source, ids_TK in enumerate(ids_of):
        quota_P = split.own_quota(counts_RE, shares_P, layout, source, node_size)
        expected = split.assign(ids_TK, quota_P, layout)
        found = level_split(torch.from_numpy(ids_TK).to(place), on_device, table, source, node_size)
        assert np.array_equal(found.cpu().numpy(), expected)


@pytest.mark.parametrize(("name", "node_size"), [(name, n % 2 * 2) for n, name in enumerate(LAYOUTS)])
def test_integer_for_integer(place, name, node_size):
    check(place, LAYOUTS[name], draw(LAYOUTS[name], seed=len(name)), node_size)


@pytest.mark.parametrize("tokens", [500, 501])
def test_loads_are_carried_along_a_chain(place, tokens):
    """All tokens lie at one end of a chain of ranks: sweeps alone would take long to spread them."""
    held = [(0,), *[(rank - 1, rank) for rank in range(1, 7)], (6,)]
    counts_E = np.random.default_rng(0).integers(0, 9, 7)
    counts_E[0] = tokens
    ids = np.random.default_rng(1).permutation(np.repeat(np.arange(7), counts_E))
    check(place, Layout(tuple(held), 7), np.array_split(ids[:, None], 8), node_size=4)
