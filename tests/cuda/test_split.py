"""The splits on the device give the CPU's integers, with few choices and with many."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("numba", reason="numba is not installed, with which the CPU's level split is compiled")

from epbackend.kernels.replica_split import EvenReplicas, LevelReplicas
from epbackend.kernels.triton import even_split, permute
from epbackend.placement import replica_split as split
from epbackend.placement.placement import Layout
from epbackend.placement.speeds import checked_speeds

pytestmark = pytest.mark.cuda

LAYOUTS = {
    "no replicas": Layout.even(6, 3),
    "one copied": Layout.of([0, 1, 2, 3, 0, 4], 3, 5),
    "a chain": Layout.of([0, 1, 1, 2, 2, 3, 3, 4], 4, 5),
    "twice on a rank": Layout.of([0, 0, 1, 2, 0, 3, 2, 1], 4, 4),
    "uneven ranks": Layout(((0, 1, 2), (0,), (3, 1), (0, 4)), 5),
    "many replicas": Layout.even(7, 8, 32),
}


def draw(layout: Layout, seed: int, tokens: int = 60) -> list[np.ndarray]:
    """ids_TK of every source, some without tokens, skewed towards a few experts."""
    random = np.random.default_rng(seed)
    chances_E = random.pareto(1.0, layout.experts) + 0.01
    sizes_R = random.integers(0, tokens, layout.ranks) * random.integers(0, 2, layout.ranks)
    return [random.choice(layout.experts, (int(size), 2), p=chances_E / chances_E.sum()) for size in sizes_R]


WAYS = ["few", "many"]


@pytest.fixture
def way(request, monkeypatch):
    """Choices are counted in the split's own launch, or before it."""
    if request.param == "many":
        for module in (even_split, permute):
            monkeypatch.setattr(module, "MOST_CHOICES", 0)


def check(
    kernels,
    place,
    layout: Layout,
    ids_of: list[np.ndarray],
    node_size: int,
    step: int = 1,
    rank_speed: tuple[float, ...] = (),
    by_node: bool = False,
) -> None:
    """The split of every `step`-th source, beside the CPU's."""
    counts_RE = np.stack([np.bincount(ids.flatten(), minlength=layout.experts) for ids in ids_of])
    if by_node:
        shares_P = split.level_by_node_shares(counts_RE, layout, node_size, rank_speed)
    else:
        shares_P = split.level_shares(counts_RE.sum(0), layout, rank_speed)
    on_device = torch.from_numpy(counts_RE).to(place)
    for source, ids_TK in list(enumerate(ids_of))[::step]:
        replicas = LevelReplicas(
            layout.slots_EC,
            layout,
            layout,
            source,
            node_size,
            lambda _: on_device,
            rank_speed,
            by_node=by_node,
        )
        quota_P = split.own_quota(counts_RE, shares_P, layout, source, node_size)
        expected = split.assign(ids_TK, quota_P, layout)
        found = kernels.level_split(replicas, place, None)(torch.from_numpy(ids_TK).to(place))
        assert np.array_equal(found.cpu().numpy(), expected)


# Counts are the same in every layout, whoever has counted: one of them shows that here.
RARER = {("many", name) for name in LAYOUTS if name != "twice on a rank"}


@pytest.mark.parametrize(
    ("way", "name", "node_size"),
    [
        pytest.param(way, name, n % 2 * 2, marks=[pytest.mark.slow] * ((way, name) in RARER))
        for way in WAYS
        for n, name in enumerate(LAYOUTS)
    ],
    indirect=["way"],
)
def test_level_equals_the_cpu_integer_for_integer(way, kernels, place, name, node_size):
    # The interpreter takes seconds for a source.
    step = 3 if (name, place.type) == ("many replicas", "cpu") else 1
    check(kernels, place, LAYOUTS[name], draw(LAYOUTS[name], seed=len(name)), node_size, step)


@pytest.mark.parametrize("name", ["a chain", "uneven ranks"])
def test_level_equals_the_cpu_where_ranks_differ_in_speed(kernels, place, name):
    layout = LAYOUTS[name]
    rank_speed = checked_speeds([1 / (1 + rank % 3) for rank in range(layout.ranks)], layout.ranks)
    check(kernels, place, layout, draw(layout, seed=len(name)), 0, step=3, rank_speed=rank_speed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["twice on a rank", "a chain", "many replicas"])
def test_level_by_node_equals_the_cpu(kernels, place, name):
    layout = LAYOUTS[name]
    seeds, step = (12, 1) if place.type == "cuda" else (2, 3)  # the interpreter takes seconds for a source
    for seed in range(seeds):
        check(kernels, place, layout, draw(layout, seed), node_size=2, step=step, by_node=True)


@pytest.mark.parametrize("tokens", [pytest.param(500, marks=pytest.mark.slow), 501])
def test_level_moves_loads_along_a_chain_of_ranks(kernels, place, tokens):
    """All tokens lie at one end of a chain of ranks: sweeps alone would take long to spread them."""
    held = [(0,), *[(rank - 1, rank) for rank in range(1, 7)], (6,)]
    counts_E = np.random.default_rng(0).integers(0, 9, 7)
    counts_E[0] = tokens
    ids = np.random.default_rng(1).permutation(np.repeat(np.arange(7), counts_E))
    check(kernels, place, Layout(tuple(held), 7), np.array_split(ids[:, None], 8), node_size=4, step=5)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_even_with_several_programs_advances_once_a_call(way, kernels, place):
    layout = LAYOUTS["many replicas"]
    even = kernels.even_split(EvenReplicas(layout.slots_EC, layout.slots_EC >= 0), place, None)
    for call in range(3):
        ids_TK = np.random.default_rng(call).integers(0, layout.experts, (50, 2))
        quota_P = split.even_shares(np.bincount(ids_TK.flatten(), minlength=layout.experts), layout, call)
        found = even(torch.from_numpy(ids_TK).to(place)).cpu().numpy()
        assert np.array_equal(found, split.assign(ids_TK, quota_P, layout))
