"""The cost model beside numbers worked out by hand, and moves by link."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epbackend.balance.cost import H100, MODELS, CostModel, find_model, moved_experts
from epbackend.errors import ConfigError
from epbackend.placement import Layout, Placement, count_moves
from tests.helpers.placement_strategies import layouts

pytestmark = pytest.mark.cpu
DEEPSEEK = MODELS["deepseek-v3"]


def test_the_size_of_an_expert_is_that_of_the_weights():
    assert DEEPSEEK.expert_bytes == 3 * 7168 * 2048 + 3 * 56 * 16 * 4
    assert DEEPSEEK.row_bytes == 7168 + 56 * 4 + 2 * 7168


@pytest.mark.parametrize("tokens", [128, 4096])
def test_a_layer_takes_as_long_as_its_busiest_rank(tokens):
    layout = Layout.even(256, 32, 256)
    even_E = np.ones(256)
    skewed_E = np.where(np.arange(256) < 8, 3.0, 1.0)  # rank 0 gets three times the tokens
    cost = CostModel(DEEPSEEK, H100, ranks=32, node_size=8, tokens=tokens)
    even, skewed = cost.layer(layout, even_E), cost.layer(layout, skewed_E)
    choices = tokens * 8  # of each rank
    assert even.exchange == pytest.approx(choices * DEEPSEEK.row_bytes * 24 / 32 / 48e9)
    assert skewed.imbalance == pytest.approx(3 * 256 / 272)
    assert skewed.exchange == pytest.approx(even.exchange * skewed.imbalance)
    weights, operations = 8 * DEEPSEEK.expert_bytes / 3.0e12, choices * DEEPSEEK.flops / 650e12
    assert even.compute == pytest.approx(max(weights, operations), rel=1e-3)
    if operations > weights:
        assert skewed.compute == pytest.approx(even.compute * skewed.imbalance, rel=1e-3)
    else:
        assert even.compute <= skewed.compute < even.compute * skewed.imbalance


def test_moves_in_the_node_and_between_nodes_are_told_apart():
    before = Layout(((0, 1), (2, 3), (4, 5), (6, 0)), 7)
    near = Layout(((0, 2), (1, 3), (4, 0), (6, 5)), 7)
    moved = moved_experts(before, near, node_size=2)
    assert moved.within_R.tolist() == [1, 1, 1, 1]
    assert moved.across_R.tolist() == [0, 0, 0, 0]
    far = Layout(((0, 5), (2, 3), (4, 1), (6, 0)), 7)
    moved = moved_experts(before, far, node_size=2)
    assert moved.within_R.tolist() == [0, 0, 0, 0]
    assert moved.across_R.tolist() == [1, 0, 1, 0]
    cost = CostModel(DEEPSEEK, H100, ranks=4, node_size=2, tokens=1)
    assert cost.moving_s(*moved) == pytest.approx(DEEPSEEK.expert_bytes / 48e9)


@given(st.data(), st.sampled_from([1, 2, 4]))
def test_both_links_together_carry_all_moves(data, node_size):
    before, after = data.draw(layouts(5, 4)), data.draw(layouts(5, 4))
    moved = moved_experts(before, after, node_size)
    counted = count_moves(Placement((before,)), Placement((after,))).received_YR[0]
    assert (moved.within_R + moved.across_R).tolist() == counted.tolist()
    if node_size == 4:
        assert not moved.across_R.any()


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="node_size: 8 ranks a node do not divide the 12 ranks"):
        CostModel(DEEPSEEK, H100, ranks=12, node_size=8, tokens=1)
    with pytest.raises(ConfigError, match="did you mean 'kimi-k2'"):
        find_model("kimi")
