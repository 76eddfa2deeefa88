"""Replicas, bounds and budgets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epbackend.placement import plan
from epbackend.placement.budget import first_slots, share_out
from epbackend.placement.score import lower_bound
from epbackend.placement.search.layer_search import envelope_falls, optimal_replicas

weights = st.lists(st.integers(0, 100), min_size=1, max_size=8).map(
    lambda weights: np.array(weights, np.float64)
)


@given(weights, st.integers(0, 12), st.integers(1, 6))
@settings(deadline=None)
def test_replicas_minimise_the_heaviest(weight_E, spare, most):
    slots = min(len(weight_E) + spare, len(weight_E) * most)
    replicas_E = optimal_replicas(weight_E, np.argsort(-weight_E, kind="stable"), slots, most)
    assert replicas_E.sum() == slots
    assert 1 <= replicas_E.min() <= replicas_E.max() <= most
    heaviest = (weight_E / replicas_E).max()
    # Every expert below `heaviest` would need so many replicas: more than there are, or than one may have.
    needed_E = np.floor(weight_E / heaviest) + 1 if heaviest else np.full(len(weight_E), np.inf)
    assert needed_E.sum() > slots or needed_E.max() > most


def test_of_equal_experts_the_first_gets_the_replica():
    assert optimal_replicas(np.ones(4), np.arange(4), 6, 6).tolist() == [2, 2, 1, 1]


def test_bound_is_the_mean_or_the_heaviest_replica():
    assert lower_bound(np.array([1, 1, 1, 1]), 4, 2) == 2
    assert lower_bound(np.array([9, 1, 1, 1]), 5, 3) == 4.5


@given(st.lists(st.floats(0, 100), min_size=2, max_size=30))
@settings(deadline=None)
def test_envelope_is_convex_and_below(values):
    curve_X = -np.sort(-np.array(values))
    fall_X = envelope_falls(curve_X)
    envelope_X = curve_X[0] - np.concatenate(([0], np.cumsum(fall_X)))
    assert (np.diff(fall_X) <= 1e-9).all()
    assert (envelope_X <= curve_X + 1e-9).all()
    assert envelope_X[-1] == pytest.approx(curve_X[-1])


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 12), st.integers(0, 40), st.integers(0, 99))
@settings(deadline=None)
def test_budget_is_given_out_and_ranks_share_it(layers, ranks, experts, budget, seed):
    weight_YE = np.random.default_rng(seed).lognormal(0, 1.5, (layers, experts))
    base = max(experts, ranks)
    slots_Y = share_out(weight_YE, ranks, base, budget)
    assert slots_Y.min() >= base
    assert slots_Y.max() <= max(base, experts * ranks)
    assert slots_Y.sum() == base * layers + min(budget, layers * max(experts * ranks - base, 0))
    slots_YR = np.diff(first_slots(slots_Y, ranks), axis=1)
    assert slots_YR.sum(axis=1).tolist() == slots_Y.tolist()
    assert np.ptp(slots_YR, axis=1).max() <= 1
    assert np.ptp(slots_YR.sum(axis=0)) <= 1


def test_layers_with_a_heavy_replica_get_the_budget():
    even, skewed, empty = np.ones(8), np.array([40.0, 30, 1, 1, 1, 1, 1, 1]), np.zeros(8)
    slots_Y = share_out(np.array([even, skewed, empty]), 8, 8, 4)
    assert slots_Y.tolist() == [8, 12, 8]


def test_slots_that_help_no_layer_are_spread_evenly():
    one_expert_needs_more = np.array([[8.0, 1, 1, 1]] * 3)
    assert share_out(one_expert_needs_more, 2, 4, 9).tolist() == [7, 7, 7]


def test_plan_with_a_budget_is_better_than_the_same_slots_everywhere():
    rng = np.random.default_rng(0)
    loads = np.stack([rng.lognormal(0, sigma, 64) for sigma in (0.3, 0.5, 1, 1.5, 2, 2.5)])

    def imbalances(placement):
        for layer, tokens_E in zip(placement.layers, loads, strict=True):
            tokens_P = (tokens_E / layer.replicas_E)[layer.slot_to_expert_P]
            load_R = np.bincount(layer.rank_of_slot_P, weights=tokens_P)
            yield load_R.max() / load_R.mean()

    budgeted = plan(loads, ranks=16, budget=6 * 16)
    assert sum(layer.slots for layer in budgeted.layers) == 6 * 80
    assert np.ptp(sum(layer.slots_R for layer in budgeted.layers)) <= 1
    assert budgeted.duplicates_on_rank == 0
    assert sum(imbalances(budgeted)) < sum(imbalances(plan(loads, ranks=16, slots=80)))
