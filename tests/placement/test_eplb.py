"""EPLB: slot for slot what DeepSeek published, as LMDeploy's copy of it (the hierarchical part) computes it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epbackend.errors import ConfigError
from epbackend.placement import Layout, plan
from epbackend.placement.planners.eplb import descending_order, rebalance
from tests.helpers.placement_strategies import skewed

torch = pytest.importorskip("torch")

README_LOADS = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
README_SLOTS = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def published(weight_YE: np.ndarray, slots: int, ranks: int, groups: int = 1, nodes: int = 1) -> np.ndarray:
    published_eplb = pytest.importorskip("lmdeploy.pytorch.nn.eplb")
    if groups % nodes:
        groups = nodes = 1
    weight = torch.tensor(weight_YE, dtype=torch.float32)
    return published_eplb.rebalance_experts_hierarchical(weight, slots, groups, nodes, ranks)[0].numpy()


def slots_of(placement) -> list[list[int]]:
    return [layer.slot_to_expert_P.tolist() for layer in placement.layers]


def test_the_example_of_its_readme_slot_for_slot():
    placement = plan(README_LOADS, ranks=8, slots=16, algorithm="eplb", node_size=4, groups=4)
    assert slots_of(placement) == README_SLOTS


@pytest.mark.parametrize(
    ("ranks", "slots", "groups", "nodes"),
    [
        (16, 272, 1, 1),
        (32, 288, 1, 1),
        (64, 320, 8, 3),
        (144, 288, 1, 1),
        (16, 272, 8, 2),
        (32, 288, 8, 4),
        (64, 320, 8, 8),
        (256, 256, 1, 1),
    ],
)
@pytest.mark.parametrize("most", [5, 200, 10**6])
def test_equals_the_published_code_at_full_size(ranks, slots, groups, nodes, most):
    # Few distinct loads: the order of ties decides nearly every slot.
    weight_YE = np.random.default_rng(most).integers(0, most, (4, 256)).astype(float)
    assert np.array_equal(
        rebalance(weight_YE, slots, ranks, groups, nodes), published(weight_YE, slots, ranks, groups, nodes)
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_the_published_code(data):
    nodes, ranks_a_node, experts_a_group = (data.draw(st.integers(1, 4)) for _ in range(3))
    groups = nodes * data.draw(st.integers(1, 4))
    experts, ranks = groups * experts_a_group, nodes * ranks_a_node
    least = -(-experts // ranks)
    slots = ranks * data.draw(st.integers(least, 2 * least + 1))
    weights = st.lists(st.integers(0, 40) | st.integers(0, 10**6), min_size=experts, max_size=experts)
    weight_YE = np.array([data.draw(weights), data.draw(weights)], dtype=float)
    assert np.array_equal(
        rebalance(weight_YE, slots, ranks, groups, nodes), published(weight_YE, slots, ranks, groups, nodes)
    )


@pytest.mark.parametrize("size", [1, 2, 16, 17, 31, 64, 288, 1000])
@pytest.mark.parametrize("distinct", [1, 2, 3, 40, 10**6])
def test_ties_are_in_the_order_that_torch_leaves_them(size, distinct):
    random = np.random.default_rng(size)
    rows = [random.integers(0, distinct, size) for _ in range(20)]
    rows += [
        np.sort(rows[0]),
        np.sort(rows[1])[::-1],
        np.minimum(rows[2], np.arange(size)),
        np.arange(size) // 3,
    ]
    values_BI = np.array(rows, dtype=np.float32)
    order_BI = torch.tensor(values_BI).sort(-1, descending=True).indices.numpy()
    assert np.array_equal(descending_order(values_BI), order_BI)


def test_global_without_groups_that_the_nodes_divide():
    weight_YE = skewed(2, 12)
    everywhere = slots_of(plan(weight_YE, ranks=8, slots=16, algorithm="eplb"))
    assert everywhere == published(weight_YE, 16, 8).tolist()
    assert everywhere == slots_of(plan(weight_YE, ranks=8, slots=16, algorithm="eplb", node_size=4))
    assert everywhere == slots_of(plan(weight_YE, ranks=8, slots=16, algorithm="eplb", groups=3, node_size=4))


def test_groups_stay_whole_on_a_node():
    placement = plan(skewed(3, 24), ranks=8, slots=32, algorithm="eplb", node_size=2, groups=8)
    for layer in placement.layers:
        nodes_of_group = [set() for _ in range(8)]
        for rank, held in enumerate(layer.experts_of_rank):
            for expert in held:
                nodes_of_group[expert // 3].add(rank // 2)
        assert all(len(nodes) == 1 for nodes in nodes_of_group)


def test_layers_without_load_are_even_and_change_nothing_else():
    loads_YE = skewed(3, 16)
    loads_YE[1] = 0
    layers = plan(loads_YE, ranks=4, slots=20, algorithm="eplb").layers
    assert layers[1] == Layout.even(16, 4, 20)
    alone = plan(loads_YE[[0, 2]], ranks=4, slots=20, algorithm="eplb").layers
    assert (layers[0], layers[2]) == alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 5}, "groups: 5 do not divide the 16 experts"),
        ({"groups": 0}, "groups: must be a whole number of 1 or more"),
        ({"group": 4}, "group: is no option of eplb, did you mean 'groups'"),
        ({"objective": "activated"}, "objective: eplb balances tokens and nothing else"),
        ({"budget": 8}, "budget: eplb cannot share slots out"),
    ],
)
def test_options_that_it_cannot_serve_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        plan(skewed(1, 16), ranks=4, algorithm="eplb", **options)
