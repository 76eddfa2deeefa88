"""Scores, noisy batches and the table of algorithms."""

from __future__ import annotations

import json

import numpy as np
import pytest

from epbackend.errors import ConfigError
from epbackend.placement.compare import UNPLANNED, mean_imbalance, score_table
from epbackend.placement.loads import Loads
from epbackend.placement.objectives import activated
from epbackend.placement.placement import Layout, Placement
from epbackend.placement.score import rank_costs, score
from epbackend.placement.synthetic import draw_batches, synthetic_loads

# Experts 0 and 1 on rank 0, experts 1 and 2 on rank 1.
SMALL = Placement((Layout(((0, 1), (1, 2)), 3),) * 2)


def test_a_small_case_by_hand():
    found = score(SMALL, np.array([[0.0, 0, 0], [6, 4, 2]]))
    assert found.layers == 1
    assert found.worst_layer == 1
    # Ranks have 6 + 2 and 2 + 2 tokens, their mean is 6; expert 0 fills a rank of its own.
    assert found.imbalance_mean == found.imbalance_worst == pytest.approx(8 / 6)
    assert found.largest_replica == pytest.approx(1.0)
    assert found.lower_bound_mean == pytest.approx(1.0)
    assert (found.duplicates_on_rank, found.moves) == (0, None)
    levelled = score(SMALL, np.array([[0.0, 0, 0], [6, 4, 2]]), split="level")
    assert levelled.imbalance_mean == pytest.approx(1.0, abs=2e-3)
    json.dumps(found.to_dict())


def test_mean_and_worst_are_over_layers_and_windows():
    loads = Loads.of([np.array([[6.0, 4, 2], [1, 0, 1]]), np.array([[3.0, 0, 0], [0, 0, 0]])])
    found = score(SMALL, loads)
    assert found.imbalance_mean == pytest.approx((8 / 6 + 1 + 2) / 3)
    assert (found.imbalance_worst, found.worst_layer) == (2.0, 0)


def test_moves_and_bytes_from_a_baseline():
    baseline = Placement((Layout(((0, 1), (0, 2)), 3),) * 2)
    found = score(SMALL, np.ones((2, 3)), baseline=baseline)
    assert (found.moves, found.moves_share) == (2, 2 / 8)


def test_nearest_needs_the_nodes_of_the_placement():
    layers = (Layout(((0, 0), (1,), (0,), (2,)), 3),)
    # With one node the source on rank 0 keeps its third in slots 0 and 1, rank 2 its own, the others use all replicas.
    one, two = (
        score(Placement(layers, node_size=nodes), np.array([[12.0, 0, 0]]), split="nearest")
        for nodes in (0, 2)
    )
    assert one.imbalance_mean == pytest.approx((3 + 4) / 3)
    assert two.imbalance_mean == pytest.approx(6 / 3)


def test_other_objectives_are_scored_without_a_bound():
    found = score(SMALL, np.array([[6.0, 4, 2]] * 2), objective=activated(1000))
    assert found.objective == "activated:1000"
    assert found.imbalance_mean == pytest.approx(1.0)
    assert found.lower_bound_mean == 1.0


def test_rank_costs_of_uneven_ranks():
    layout = Layout(((0,), (1, 2, 0)), 3)
    assert rank_costs(np.array([[1.0, 2, 3, 4]]), layout).tolist() == [[1, 9]]


@pytest.mark.parametrize(
    ("loads", "problem"),
    [
        (np.ones((3, 3)), "have 3 layers, but the placement has 2"),
        (np.ones((2, 4)), "have 4 experts, but the placement has 3"),
        (np.zeros((2, 3)), "no layer has a token"),
    ],
)
def test_loads_of_another_model_are_refused(loads, problem):
    with pytest.raises(ConfigError, match=problem):
        score(SMALL, loads)


def test_batches_follow_the_loads():
    loads = Loads.of(np.array([[0.0, 0], [3, 1]]))
    plain = draw_batches(loads, [1], choices=4000, batches=200, seed=1)
    assert plain.shape == (1, 200, 2)
    assert (plain.sum(axis=2) == 4000).all()
    assert plain[0].mean(axis=0) == pytest.approx([3000, 1000], rel=0.02)
    dispersed = draw_batches(loads, [1], choices=4000, batches=200, concentration=50.0, seed=1)
    assert dispersed[0].mean(axis=0) == pytest.approx([3000, 1000], rel=0.1)
    # The variance of a Dirichlet-multinomial is (n + c) / (1 + c) times the multinomial's.
    assert dispersed[0, :, 0].var() / plain[0, :, 0].var() == pytest.approx(4050 / 51, rel=0.5)


def test_windows_alternate_and_seeds_repeat():
    loads = Loads.of([np.array([[5.0, 0]]), np.array([[0.0, 5]])])
    batches = draw_batches(loads, [0], choices=10, batches=4)
    assert batches.tolist() == [[[10, 0], [0, 10]] * 2]
    assert draw_batches(loads, [0], seed=3).tolist() == draw_batches(loads, [0], seed=3).tolist()


def test_noise_is_worse_than_the_mean_and_the_level_split_better():
    loads = synthetic_loads(4, 32, seed=2)
    placement = Placement.even(4, 32, 4, 40)
    plain, dispersed = (draw_batches(loads, range(4), concentration=c) for c in (None, 200.0))
    even = mean_imbalance(placement, range(4), dispersed, "even")
    assert even > mean_imbalance(placement, range(4), plain, "even") * 0.99
    assert mean_imbalance(placement, range(4), dispersed, "level") < even


def test_the_table_has_a_row_for_each_algorithm_and_split():
    loads = synthetic_loads(3, 16, windows=2, dense_layers=1)
    calls: list[tuple[int, int]] = []
    table = score_table(
        loads, ranks=4, slots=20, algorithms=(UNPLANNED, "eplb"), progress=lambda *done: calls.append(done)
    )
    rows = [row.to_dict() for row in table.rows]
    assert [(row["algorithm"], row["split"]) for row in rows] == [
        (algorithm, split) for algorithm in (UNPLANNED, "eplb") for split in ("even", "nearest", "level")
    ]
    assert calls[-1] == (6, 6)
    assert table.left_out == ()
    assert all(row["imbalance_mean"] >= 1 - 1e-9 and row["drift"] >= 1 - 1e-9 for row in rows)
    assert rows[5]["noise_over_dispersed"] <= rows[3]["noise_over_dispersed"]
    json.dumps(rows)


def test_drift_is_of_a_placement_that_has_not_seen_the_later_windows():
    loads = synthetic_loads(2, 16, windows=2, drift=0.3)
    (row,) = score_table(loads, ranks=4, slots=20, algorithms=["eplb"], splits=["even"]).rows
    alone = score_table(
        Loads(loads.tokens_WYE[:1], ("a",)), ranks=4, slots=20, algorithms=["eplb"], splits=["even"]
    )
    assert alone.rows[0].drift is None
    assert row.drift > alone.rows[0].score.imbalance_mean


def test_what_cannot_be_done_is_left_out_with_its_reason_unless_it_was_named():
    loads = synthetic_loads(1, 16)
    table = score_table(loads, ranks=4, slots=20, objective="activated", splits=["even"])
    assert "eplb" in dict(table.left_out)
    assert "balances tokens" in dict(table.left_out)["eplb"]
    with pytest.raises(ConfigError, match="balances tokens"):
        score_table(loads, ranks=4, slots=20, objective="activated", algorithms=["eplb"])
