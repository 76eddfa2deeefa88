import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epbackend.errors import ConfigError
from epbackend.placement import plan
from epbackend.placement.placement import Layout, Placement


def imbalance(layout, tokens_E):
    tokens_P = (tokens_E / layout.replicas_E)[layout.slot_to_expert_P]
    load_R = np.bincount(layout.rank_of_slot_P, weights=tokens_P, minlength=layout.ranks)
    return load_R.max() / load_R.mean()


def fetched(before, after):
    """Slots whose expert their rank did not hold before."""
    return sum(
        len(set(now) - set(then))
        for then, now in zip(before.experts_of_rank, after.experts_of_rank, strict=True)
    )


def drifted(drift, seed=0, layers=4, experts=64):
    """Loads of two windows, the later one off by a lognormal factor."""
    rng = np.random.default_rng(seed)
    before = rng.lognormal(0, 1, (layers, experts))
    return before, before * rng.lognormal(0, drift, (layers, experts))


def test_reaches_the_target_with_few_changes():
    before, after = drifted(0.15)
    current = plan(before, ranks=8, slots=72)
    replanned = plan(after, ranks=8, slots=72)
    kept = plan(after, ranks=8, algorithm="incremental", current=current)
    for layer in range(4):
        assert imbalance(kept.layers[layer], after[layer]) <= 1.02
        assert kept.layers[layer].duplicates_on_rank == 0
    changes = [sum(map(fetched, current.layers, new.layers)) for new in (kept, replanned)]
    assert changes[0] < 0.2 * changes[1]


@given(
    st.integers(0, 1000), st.floats(0.05, 1), st.sampled_from([(3, 12), (4, 16), (6, 18)]), st.floats(1, 1.2)
)
@settings(max_examples=60, deadline=None)
def test_never_worse_and_slots_that_stay_keep_their_place(seed, drift, shape, target):
    ranks, slots = shape
    before, after = drifted(drift, seed, layers=1, experts=12)
    current = plan(before, ranks=ranks, slots=slots)
    new = plan(after, ranks=ranks, algorithm="incremental", current=current, target=target)
    (old_layer,), (new_layer,) = current.layers, new.layers
    assert imbalance(new_layer, after[0]) <= imbalance(old_layer, after[0]) * (1 + 1e-9)
    moved_slots = (old_layer.slot_to_expert_P != new_layer.slot_to_expert_P).sum()
    assert moved_slots == fetched(old_layer, new_layer)
    assert new_layer.duplicates_on_rank == 0
    if imbalance(old_layer, after[0]) <= target:
        assert new_layer == old_layer


def test_a_tighter_target_moves_more():
    before, after = drifted(0.3)
    current = plan(before, ranks=8, slots=72)
    changes = [
        sum(
            map(
                fetched,
                current.layers,
                plan(after, ranks=8, algorithm="incremental", current=current, target=target).layers,
            )
        )
        for target in (1.2, 1.05, 1.01)
    ]
    assert changes[0] < changes[1] < changes[2]


def test_replicas_that_share_a_rank_are_taken_apart():
    current = Placement((Layout(((0, 0, 1), (2, 3, 4)), 5),))
    new = plan(np.array([[8.0, 2, 4, 3, 3]]), ranks=2, algorithm="incremental", current=current)
    assert new.duplicates_on_rank == 0


def test_uneven_ranks_and_layers_without_load_stay():
    uneven = Layout(((0, 1, 2), (3, 0)), 4)
    current = Placement((uneven, uneven))
    new = plan(np.array([[0.0] * 4, [9.0, 1, 1, 5]]), ranks=2, algorithm="incremental", current=current)
    assert new.layers[0] == uneven
    assert new.layers[1].slots_R.tolist() == [3, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"current": None}, "current: is missing"),
        ({"slots": 6}, "slots: the placement in use has 4"),
        ({"budget": 2}, "budget: incremental keeps the slots"),
        ({"target": 0.9}, "target: 0.9 is below 1"),
        ({"node_penalty": 1}, "node_penalty: is no option of incremental"),
    ],
)
def test_what_it_cannot_start_from_is_refused(options, message):
    given = {"current": Placement.even(1, 4, 2), **options}
    with pytest.raises(ConfigError, match=message):
        plan(np.ones((1, 4)), ranks=2, algorithm="incremental", **given)
