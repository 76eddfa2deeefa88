"""Plans for contiguous blocks: balanced where the router lets them, and no group of it is torn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epbackend.errors import ConfigError
from epbackend.placement.contiguous import in_blocks, plan_order
from epbackend.placement.loads import Loads
from epbackend.placement.planners import plan
from epbackend.placement.score import score
from epbackend.placement.synthetic import synthetic_loads

pytestmark = pytest.mark.cpu


@settings(max_examples=15)
@given(
    sizes=st.sampled_from(
        [(4, 1, 1), (8, 2, 1), (4, 1, 4), (2, 1, 4), (8, 1, 4), (8, 2, 4), (16, 8, 4), (2, 2, 4), (1, 1, 4)]
    ),
    seed=st.integers(0, 99),
)
def test_every_plan_is_a_permutation_that_keeps_groups_whole(sizes, seed):
    ranks, nodes, groups = sizes
    tokens_YE = np.random.default_rng(seed).lognormal(3, 1, (3, 16)).round()
    tokens_YE[0] = 0
    order_YE = plan_order(Loads.of(tokens_YE), ranks=ranks, nodes=nodes, groups=groups)
    assert (np.sort(order_YE, axis=1) == np.arange(16)).all()
    assert (order_YE[0] == np.arange(16)).all()
    group_YE = order_YE // (16 // groups)
    assert (group_YE.reshape(3, groups, -1) == group_YE.reshape(3, groups, -1)[:, :, :1]).all()


def test_without_groups_blocks_are_as_good_as_any_placement_without_copies():
    loads = synthetic_loads(8, 128, dense_layers=1)
    even = score(in_blocks(np.tile(np.arange(128), (8, 1)), 16), loads).imbalance_mean
    blocks = score(in_blocks(plan_order(loads, ranks=16), 16), loads).imbalance_mean
    assert blocks == score(plan(loads, ranks=16), loads).imbalance_mean < even - 0.3


def test_nodes_are_balanced_too_and_cost_the_ranks_nothing():
    loads = Loads.of(
        np.tile(np.array([9.0, 7, 1, 1]), (2, 1))
    )  # an expert a rank: nothing can be done for ranks
    order_YE = plan_order(loads, ranks=4, nodes=2)
    per_node = np.take_along_axis(loads.tokens_WYE[0], order_YE, axis=1).reshape(2, 2, 2).sum(axis=2)
    assert (per_node.max(axis=1) == 10).all()


def test_a_slow_rank_gets_the_cold_experts():
    loads, speeds = synthetic_loads(8, 128, dense_layers=1), [1.0] * 3 + [0.25]
    blind, knowing = (
        score(in_blocks(order_YE, 4), loads, rank_speed=speeds).imbalance_mean
        for order_YE in (plan_order(loads, ranks=4), plan_order(loads, ranks=4, rank_speed=speeds))
    )
    assert blind > 3
    assert knowing == score(plan(loads, ranks=4, rank_speed=speeds), loads).imbalance_mean < 0.6 * blind


def test_a_rank_that_is_a_group_cannot_change():
    loads = synthetic_loads(4, 32, dense_layers=1)
    assert (plan_order(loads, ranks=8, groups=8) == np.arange(32)).all()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"ranks": 5}, "ranks: 5 do not divide the 24 experts"),
        ({"ranks": 4, "nodes": 3}, "nodes: 3 do not divide the 4 ranks"),
        ({"ranks": 4, "groups": 5}, "groups: 5 do not divide"),
        ({"ranks": 4, "groups": 6}, "ranks: 4 cut through the 6 groups"),
        ({"ranks": 12, "nodes": 4, "groups": 6}, "nodes: 4 cut through the 6 groups"),
        ({"ranks": 2.0}, "ranks: must be a whole number"),
        ({"ranks": 4, "nodes": 2, "rank_speed": [1, 1, 1, 0.5]}, "rank_speed: with 2 nodes .* leave out"),
        ({"ranks": 4, "groups": 2, "rank_speed": [1, 1, 1, 0.5]}, "rank_speed: with 2 groups .* leave out"),
        ({"ranks": 4, "rank_speed": [1, 1]}, "rank_speed: 2 speeds are given for 4 ranks"),
    ],
)
def test_what_does_not_divide_is_refused(asked, said):
    with pytest.raises(ConfigError, match=said):
        plan_order(Loads.of(np.ones((1, 24))), **asked)
