"""The levelling split: as good as the linear program, and the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epbackend.errors import ConfigError
from epbackend.placement import replica_split_reference as reference
from epbackend.placement.loads import Loads
from epbackend.placement.placement import Layout
from epbackend.placement.planners import plan
from epbackend.placement.replica_split import even_shares, level_by_node_shares, level_shares
from epbackend.placement.speeds import checked_speeds, rank_weights
from tests.helpers.linear_program import least_crossing, optimum
from tests.helpers.placement_strategies import layouts


def within_the_gap(most: float, bound: float) -> bool:
    """A thousandth above the bound at most, once the bound is rounded up to a whole token."""
    return int(most) - (int(most) >> 10) <= np.ceil(bound - 1e-6)


def rank_loads(shares_P: np.ndarray, layout: Layout) -> np.ndarray:
    return np.bincount(layout.rank_of_slot_P, weights=shares_P, minlength=layout.ranks)


def expert_sums(shares_P: np.ndarray, layout: Layout) -> list[int]:
    return (
        np.bincount(layout.slot_to_expert_P, weights=shares_P, minlength=layout.experts).astype(int).tolist()
    )


def topology(ranks: int, each: int, partners: list[list[int]]) -> Layout:
    """Experts in order, and beside them replicas of the k-th expert of the k-th partner, as LPLB has them."""
    own = [list(range(rank * each, (rank + 1) * each)) for rank in range(ranks)]
    replicas = [[own[partner[rank]][k] for k, partner in enumerate(partners)] for rank in range(ranks)]
    return Layout(tuple(tuple(a + b) for a, b in zip(own, replicas, strict=True)), ranks * each)


def ring(ranks: int, step: int) -> list[int]:
    return [(rank + step) % ranks for rank in range(ranks)]


def anywhere(experts: int, ranks: int, slots: int, seed: int) -> Layout:
    """Replicas of any experts on any ranks, also twice on one, and any number of slots a rank."""
    random = np.random.default_rng(seed)
    held_P = random.permutation([*range(experts), *random.integers(0, experts, slots - experts)])
    cuts = np.sort(random.choice(np.arange(1, slots), ranks - 1, replace=False))
    return Layout(tuple(tuple(part.tolist()) for part in np.split(held_P, cuts)), experts)


CUBE = ([3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3])
LAYOUTS = {
    "one ring": topology(32, 8, [ring(32, 1)]),
    "two rings": topology(64, 4, [ring(64, 1), ring(64, -1)]),
    "cubes": topology(16, 4, [[8 * (r // 8) + column[r % 8] for r in range(16)] for column in CUBE]),
    "even": Layout.even(64, 16, 80),
    "uneven": anywhere(64, 16, 96, seed=1),
    "many replicas": anywhere(16, 12, 96, seed=2),
    "chain": Layout(((0,), *((rank, rank - 1) for rank in range(1, 39)), (38,)), 39),
}
SKEWS = {
    "flat": lambda random, experts: random.uniform(0.9, 1.1, experts),
    "log-normal": lambda random, experts: random.lognormal(0, 0.8, experts),
    "one hot": lambda random, experts: np.eye(experts)[random.integers(experts)] + 1e-3,
    "some unused": lambda random, experts: random.exponential(1, experts) * (random.random(experts) < 0.3),
}


@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_within_the_promised_gap_of_the_linear_program(name, skew):
    layout, random = LAYOUTS[name], np.random.default_rng(7)
    for tokens in (300, 8192, 10**7):
        weight_E = SKEWS[skew](random, layout.experts)
        tokens_E = random.multinomial(tokens, weight_E / weight_E.sum())
        shares_P = level_shares(tokens_E, layout)
        assert expert_sums(shares_P, layout) == tokens_E.tolist()
        assert within_the_gap(rank_loads(shares_P, layout).max(), optimum(tokens_E, layout))


@pytest.mark.parametrize("name", LAYOUTS)
def test_times_are_within_two_thousandths_of_the_linear_program_where_ranks_differ_in_speed(name):
    layout, random = LAYOUTS[name], np.random.default_rng(11)
    rank_speed = checked_speeds(random.uniform(0.25, 1, layout.ranks).tolist(), layout.ranks)
    for skew in SKEWS.values():
        weight_E = skew(random, layout.experts)
        tokens_E = random.multinomial(10**6, weight_E / weight_E.sum())
        shares_P = level_shares(tokens_E, layout, rank_speed)
        assert shares_P.tolist() == reference.level_shares(tokens_E, layout, rank_speed).tolist()
        assert expert_sums(shares_P, layout) == tokens_E.tolist()
        most = (rank_loads(shares_P, layout) / rank_speed).max()
        assert most <= 1.002 * optimum(tokens_E, layout, rank_speed) + 1 / min(rank_speed)


@pytest.mark.parametrize("seed", range(4))
def test_rounding_costs_less_than_half_a_point_at_1024_tokens(seed):
    layout, random = LAYOUTS["one ring"], np.random.default_rng(seed)
    chance_E = random.dirichlet(np.full(layout.experts, 8.0))
    for tokens_E in random.multinomial(1024 * 8, chance_E, size=5):
        points = 100 * (
            rank_loads(level_shares(tokens_E, layout), layout).max() / optimum(tokens_E, layout) - 1
        )
        assert points <= 0.5


@given(layouts(), st.data())
def test_compiled_and_reference_agree_to_the_token(layout, data):
    tokens_E = np.array(
        data.draw(st.lists(st.integers(0, 50), min_size=layout.experts, max_size=layout.experts))
    )
    speeds = data.draw(st.lists(st.sampled_from([1, 0.5, 0.3]), min_size=layout.ranks, max_size=layout.ranks))
    rank_speed = checked_speeds(speeds, layout.ranks)
    shares_P = level_shares(tokens_E, layout, rank_speed)
    assert shares_P.tolist() == reference.level_shares(tokens_E, layout, rank_speed).tolist()
    assert expert_sums(shares_P, layout) == tokens_E.tolist()
    assert shares_P.min() >= 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_compiled_and_reference_agree_on_larger_layers(name):
    layout, random = LAYOUTS[name], np.random.default_rng(3)
    for scale in (1, 30, 10**6):
        tokens_E = np.floor(random.lognormal(0, 1, layout.experts) * scale).astype(np.int64)
        assert level_shares(tokens_E, layout).tolist() == reference.level_shares(tokens_E, layout).tolist()


@settings(max_examples=50)
@given(layouts(), st.integers(0, 2**32))
def test_never_fuller_than_the_even_split(layout, seed):
    tokens_E = np.random.default_rng(seed).integers(0, 2000, layout.experts)
    level, even = (rank_loads(split(tokens_E, layout), layout).max() for split in (level_shares, even_shares))
    assert within_the_gap(level, even)


@st.composite
def batches_on_nodes(draw):
    """A layout on several nodes, the counts of all its sources, ranks a node, and speeds."""
    ranks, node_size = draw(st.sampled_from([(2, 1), (4, 1), (4, 2)]))
    layout = draw(layouts(ranks=ranks))
    sources = draw(st.sampled_from([ranks, ranks // node_size]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    counts_GE = random.integers(0, 40, (sources, layout.experts)) * random.integers(
        0, 2, (sources, layout.experts)
    )
    speeds = draw(st.lists(st.sampled_from([1, 0.5, 0.3]), min_size=ranks, max_size=ranks))
    return layout, counts_GE, node_size, checked_speeds(speeds, ranks)


def of_nodes(counts_GE: np.ndarray, layout: Layout, node_size: int) -> np.ndarray:
    return counts_GE.reshape(layout.ranks // node_size, -1, layout.experts).sum(axis=1)


@given(batches_on_nodes())
def test_by_node_ranks_are_hardly_slower_and_no_fewer_tokens_stay_than_with_level(batch):
    layout, counts_GE, node_size, rank_speed = batch
    counts_ME, tokens_E = of_nodes(counts_GE, layout, node_size), counts_GE.sum(axis=0)
    level_P = level_shares(tokens_E, layout, rank_speed)
    shares_P = level_by_node_shares(counts_GE, layout, node_size, rank_speed)
    weight_R = rank_weights(rank_speed, layout.ranks)
    assert shares_P.min() >= 0
    assert expert_sums(shares_P, layout) == tokens_E.tolist()
    slowest, by_level = ((rank_loads(each_P, layout) / weight_R).max() for each_P in (shares_P, level_P))
    assert slowest <= by_level * (1 + 1 / 64)
    stays = [reference.at_home(each_P, counts_ME, layout, node_size) for each_P in (shares_P, level_P)]
    assert stays[0] >= stays[1]
    plain = reference.level_by_node_shares(counts_ME, layout, node_size, rank_speed)
    assert shares_P.tolist() == plain.tolist()


@pytest.mark.parametrize("name", ["even", "uneven", "many replicas", "cubes"])
def test_by_node_hardly_more_tokens_cross_than_the_linear_program_lets(name):
    """Three hundredths of all tokens; sources differ, as those with topics of their own do."""
    layout, random = LAYOUTS[name], np.random.default_rng(5)
    for node_size in (2, layout.ranks // 2):
        weight_RE = random.lognormal(0, 1, (layout.ranks, layout.experts))
        counts_RE = np.array([random.multinomial(4000, each / each.sum()) for each in weight_RE])
        counts_ME = of_nodes(counts_RE, layout, node_size)
        shares_P = level_by_node_shares(counts_RE, layout, node_size)
        most = rank_loads(level_shares(counts_RE.sum(axis=0), layout), layout).max() * (1 + 1 / 64)
        crossing = counts_RE.sum() - reference.at_home(shares_P, counts_ME, layout, node_size)
        assert crossing - least_crossing(counts_ME, layout, node_size, most) <= 0.03 * counts_RE.sum()
        assert shares_P.tolist() == reference.level_by_node_shares(counts_ME, layout, node_size).tolist()


@pytest.mark.parametrize(
    ("ranks", "experts", "slots", "node_size"),
    [
        (8, 32, 48, 4),
        pytest.param(16, 64, 96, 4, marks=pytest.mark.slow),
        pytest.param(32, 256, 384, 8, marks=pytest.mark.slow),
    ],
)
def test_on_plans_by_node_is_near_the_least_crossing_of_the_linear_program(ranks, experts, slots, node_size):
    """Within 1% of all choices on the mean, and 3% at worst."""
    random, above = np.random.default_rng(0), []
    for _ in range(4):
        weight_RE = random.lognormal(0, 1, (ranks, experts))
        counts_RE = np.array([random.multinomial(4000, each / each.sum()) for each in weight_RE])
        loads = Loads.of(counts_RE.sum(axis=0)[None].astype(float))
        layout = plan(loads, ranks=ranks, slots=slots, node_size=node_size).layers[0]
        counts_ME = of_nodes(counts_RE, layout, node_size)
        shares_P = level_by_node_shares(counts_RE, layout, node_size)
        most = rank_loads(level_shares(counts_RE.sum(axis=0), layout), layout).max() * (1 + 1 / 64)
        crossing = counts_RE.sum() - reference.at_home(shares_P, counts_ME, layout, node_size)
        above.append((crossing - least_crossing(counts_ME, layout, node_size, most)) / counts_RE.sum())
    assert np.mean(above) <= 0.01
    assert max(above) <= 0.03


def test_with_a_replica_of_each_expert_on_each_node_no_token_needs_to_cross():
    layout = Layout(((0, 1), (2, 3), (0, 3), (1, 2)), 4)
    counts_RE = np.array([[8, 2, 8, 2], [8, 2, 8, 2], [2, 8, 2, 8], [2, 8, 2, 8]])
    counts_ME = of_nodes(counts_RE, layout, 2)
    by_node_P = level_by_node_shares(counts_RE, layout, 2)
    assert rank_loads(by_node_P, layout).tolist() == [20, 20, 20, 20]
    assert reference.at_home(by_node_P, counts_ME, layout, 2) == 80
    level_P = level_shares(counts_RE.sum(axis=0), layout)
    assert reference.at_home(level_P, counts_ME, layout, 2) < 80


def test_by_node_on_one_node_is_level():
    layout, counts_RE = LAYOUTS["uneven"], np.random.default_rng(1).integers(0, 99, (16, 64))
    expected = level_shares(counts_RE.sum(axis=0), layout).tolist()
    for node_size in (layout.ranks, 0):
        assert level_by_node_shares(counts_RE, layout, node_size).tolist() == expected


def test_a_small_case_by_hand():
    layout = Layout(((0, 1), (0, 2), (0, 3)), 4)
    # 30 tokens of expert 0 level ranks that carry 30, 10 and 2: only the last two are under the water, at 21.
    assert level_shares(np.array([30, 30, 10, 2]), layout).tolist() == [0, 30, 11, 10, 19, 2]


def test_of_two_slots_on_a_rank_the_first_takes_all():
    layout = Layout(((0, 0), (0, 1)), 2)
    assert level_shares(np.array([8, 2]), layout).tolist() == [5, 0, 3, 2]


def test_no_tokens_give_no_shares():
    assert not level_shares(np.zeros(64, np.int64), LAYOUTS["even"]).any()


def test_the_kind_of_integer_does_not_matter():
    layout = LAYOUTS["uneven"]
    tokens_E = np.random.default_rng(0).integers(0, 99, 2 * layout.experts)
    expected = level_shares(tokens_E[::2].copy(), layout).tolist()
    for given_E in (
        tokens_E[::2],
        tokens_E[::2].astype(np.int32),
        tokens_E[::2].astype(np.uint8),
        tokens_E[::2].tolist(),
    ):
        assert level_shares(given_E, layout).tolist() == expected


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        ([1, 2, 3], "experts"),
        ([1.5, 2.0], "whole numbers"),
        ([1, -2], "0 or more"),
        ([2**40, 1], "in all at most"),
        ([2**62, 2**62], "in all at most"),
    ],
)
def test_counts_that_cannot_be_are_refused(counts, problem):
    with pytest.raises(ConfigError, match=problem):
        level_shares(np.array(counts), Layout.even(2, 2))


@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(0, 10**4), st.integers(1, 9)), min_size=1, max_size=6),
)
def test_water_filling_levels_the_ranks_that_get_any(amount, ranks):
    loads_C, weight_C = np.array(ranks).T
    shares_C = reference.water_fill(amount, loads_C, weight_C)
    assert shares_C.sum() == amount
    assert shares_C.min() >= 0
    if amount:
        most = ((loads_C + shares_C - 1) / weight_C)[shares_C > 0].max()
        assert most <= ((loads_C + shares_C + 1) / weight_C).min()
