"""What a `Rebalancer` proposes: only what pays, within its budget, and nothing any more once a load is steady."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epbackend.balance.decision import Policy, Rebalancer
from epbackend.errors import ConfigError
from epbackend.placement import Layout, Placement, count_moves, plan

pytestmark = pytest.mark.cpu
LAYERS, EXPERTS = 4, 16


def loads(seed, spread=1.0):
    """Tokens [layers, experts] of which a few experts have most."""
    return np.floor(1000 * np.random.default_rng(seed).lognormal(0, spread, (LAYERS, EXPERTS)))


def policy(**given):
    return Policy(**{"threshold": 0.02, "max_slots": None, "max_bytes": None, "expert_bytes": 1000, **given})


def planned(tokens_YE, ranks=4, slots=20):
    return plan(tokens_YE, ranks=ranks, slots=slots)


def imbalance(layout, tokens_E):
    tokens_P = (tokens_E / layout.replicas_E)[layout.slot_to_expert_P]
    load_R = np.bincount(layout.rank_of_slot_P, weights=tokens_P, minlength=layout.ranks)
    return load_R.max() / load_R.mean()


@given(
    st.integers(0, 1000),
    st.sampled_from([(2, 16), (4, 20), (8, 24), (16, 16), (16, 32)]),
    st.sampled_from([None, 1, 2, 5, 40]),
    st.sampled_from([None, 1000, 3999, 100_000]),
    st.floats(0, 0.2),
    st.sampled_from([1.0, 1e-3]),
)
@settings(max_examples=60, deadline=None)
def test_a_proposal_pays_keeps_to_the_budget_and_to_the_slots(seed, shape, slots, size, threshold, horizon_s):
    ranks, all_slots = shape
    given = policy(
        threshold=threshold, max_slots=slots, max_bytes=size, horizon_s=horizon_s, link_bytes_s=1e8
    )
    start = planned(loads(seed), ranks, all_slots).with_options(numbering="renumbered")
    rebalancer = Rebalancer(start, given)
    price = 1000 / 1e8 * LAYERS / horizon_s
    for window in range(3):  # so few that each is predicted by the one before, and judged by it
        tokens_YE = loads(seed + window // 2)
        rebalancer.observe(tokens_YE)
        before, proposal = rebalancer.placement, rebalancer.propose()
        if proposal is None:
            continue
        after = proposal.placement
        assert after.numbering == start.numbering
        moves = count_moves(before, after)
        assert proposal.moved_slots == moves.total <= min(slots or 10**6, (size or 10**9) // 1000)
        assert {layer for layer in range(LAYERS) if before.layers[layer] != after.layers[layer]} == set(
            proposal.layers
        )
        assert proposal.imbalance_after < proposal.imbalance_before
        for layer in proposal.layers:
            old, new = before.layers[layer], after.layers[layer]
            assert new.slots_R.tolist() == old.slots_R.tolist()
            assert new.replicas_E.min() >= 1
            gain = 1 - imbalance(new, tokens_YE[layer]) / imbalance(old, tokens_YE[layer])
            net = gain - price * moves.received_YR[layer].sum()
            assert net > -1e-9
            if slots is size is None:
                assert net >= threshold - 1e-9
        rebalancer.accept(after)


@given(st.integers(0, 1000), st.sampled_from([None, 1, 3]))
@settings(max_examples=8, deadline=None)
def test_a_steady_load_is_balanced_in_a_few_cycles_and_then_left_alone(seed, slots):
    rebalancer = Rebalancer(planned(loads(seed)), policy(max_slots=slots))
    moved = []
    for _ in range(60):
        rebalancer.observe(loads(seed + 1))
        proposal = rebalancer.propose()
        moved.append(proposal.moved_slots if proposal else 0)
        if proposal:
            rebalancer.accept(proposal.placement)
    assert moved[-1] == 0
    assert sum(moved) <= LAYERS * 20  # no slot moves more often than once, on average
    assert not any(moved[moved.index(0) :])


def test_noise_of_a_steady_load_is_not_followed():
    share_YE = loads(1) / loads(1).sum(axis=1, keepdims=True)
    windows = [np.random.default_rng(seed).multinomial(3000, share_YE) for seed in range(30)]
    rebalancer = Rebalancer(planned(loads(1)), policy())
    moved = []
    for tokens_YE in windows:
        rebalancer.observe(tokens_YE)
        proposal = rebalancer.propose()
        moved.append(proposal.moved_slots if proposal else 0)
        if proposal:
            rebalancer.accept(proposal.placement)
    assert sum(moved[10:]) <= 0.02 * 20 * LAYERS * 20  # of all slots, a cycle


def test_a_small_budget_goes_where_it_brings_most_and_gets_there_in_time():
    whole = Rebalancer(planned(loads(1)), policy())
    whole.observe(loads(2))
    best = whole.propose()
    rebalancer = Rebalancer(planned(loads(1)), policy(max_slots=2))
    reached = []
    for _ in range(best.moved_slots):
        rebalancer.observe(loads(2))
        proposal = rebalancer.propose()
        if proposal is None:
            break
        assert proposal.moved_slots <= 2
        if not reached:
            assert "wait for the next cycle's budget" in proposal.reason
        reached.append(proposal.imbalance_after)
        rebalancer.accept(proposal.placement)
    assert reached == sorted(reached, reverse=True)
    assert reached[-1] < best.imbalance_after + 0.03


def test_what_costs_more_to_move_than_it_brings_stays():
    for dear in ({"horizon_s": 1e-8}, {"link_bytes_s": 1.0}, {"expert_bytes": 10**12}):
        rebalancer = Rebalancer(planned(loads(1)), policy(**dear))
        rebalancer.observe(loads(2))
        assert rebalancer.propose() is None


def test_without_a_token_nothing_is_proposed_and_layers_without_one_stay():
    rebalancer = Rebalancer(planned(loads(1)), policy())
    assert rebalancer.propose() is None
    rebalancer.observe(np.zeros((LAYERS, EXPERTS)))
    assert rebalancer.propose() is None
    half = loads(2)
    half[::2] = 0
    rebalancer.observe(half)
    assert set(rebalancer.propose().layers) == {1, 3}


def test_where_batches_are_split_level_less_has_to_move():
    moved = {}
    for split in ("even", "level"):
        rebalancer = Rebalancer(planned(loads(1), slots=32), policy(split=split))
        rebalancer.observe(loads(2, 0.7))
        proposal = rebalancer.propose()
        moved[split] = proposal.moved_slots if proposal else 0
    assert moved["level"] < moved["even"]


def test_other_objectives_and_uneven_ranks():
    uneven = Layout(((0, 1, 2, 0), (3, 4), (5, 6, 7)), 8)
    rebalancer = Rebalancer(Placement((uneven,) * 2), policy(objective="activated:64"))
    rebalancer.observe(np.array([[90.0, 1, 1, 50, 60, 1, 1, 1], [1.0] * 8]))
    proposal = rebalancer.propose()
    assert proposal.placement.layers[0].slots_R.tolist() == [4, 2, 3]
    assert proposal.placement.layers[0].duplicates_on_rank == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"threshold": 1.0}, "threshold: must be a number from 0 to below 1"),
        ({"max_slots": 0}, "max_slots: must be a whole number of 1 or more"),
        ({"max_bytes": 999}, "max_bytes: 999 are less than the 1000 of one expert"),
        ({"split": "levle"}, "split: 'levle' is unknown, did you mean 'level'"),
        ({"objective": "speed"}, "objective: 'speed' is unknown"),
        ({"horizon_s": 0}, "horizon_s: must be above 0"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        policy(**given)


def test_what_does_not_fit_the_placement_is_refused():
    with pytest.raises(ConfigError, match="one rank holds all experts"):
        Rebalancer(Placement.even(1, 4, 1), policy())
    rebalancer = Rebalancer(planned(loads(1)), policy())
    with pytest.raises(ConfigError, match="use loads of the same model"):
        rebalancer.observe(np.ones((LAYERS, EXPERTS + 1)))
    with pytest.raises(ConfigError, match="is negative"):
        rebalancer.observe(-np.ones((LAYERS, EXPERTS)))
    with pytest.raises(ConfigError, match="other slots than before in layer 0"):
        rebalancer.accept(Placement.even(LAYERS, EXPERTS, 4, 24))
    with pytest.raises(ConfigError, match="layers: one placement has 4, the other 2"):
        rebalancer.accept(Placement(planned(loads(1)).layers[:2]))
