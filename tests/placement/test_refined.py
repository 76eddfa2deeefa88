from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epbackend.errors import ConfigError
from epbackend.placement import plan
from epbackend.placement.loads import Loads
from epbackend.placement.objectives import TOKENS, activated
from epbackend.placement.placement import Layout
from epbackend.placement.score import lower_bound


def busiest(layout, tokens_E, objective=TOKENS):
    """Cost of the worst rank where replicas share their expert evenly."""
    tokens_P = (np.asarray(tokens_E) / layout.replicas_E)[layout.slot_to_expert_P]
    return objective.rank_costs(tokens_P, layout.rank_of_slot_P, layout.ranks).max()


@st.composite
def questions(draw):
    """Loads of every kind for small layers: (tokens [E], ranks, slots), from one expert to a replica on every rank."""
    experts, ranks = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    least = -(-max(experts, ranks) // ranks)
    slots = ranks * draw(st.integers(least, experts))
    tokens = draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts).filter(any))
    return np.array(tokens, dtype=float), ranks, slots


def test_toy_needs_counts_and_packing_at_once():
    loads = np.array([[600.0, 560, 120, 120, 20, 10, 10, 10]])
    layer = plan(loads, ranks=8, slots=16).layers[0]
    assert busiest(layer, loads[0]) == pytest.approx(590 / 3)


@given(questions())
@settings(max_examples=150, deadline=None)
def test_layers_are_valid_and_never_worse_than_in_order(question):
    tokens_E, ranks, slots = question
    layer = plan(tokens_E[None], ranks=ranks, slots=slots).layers[0]
    assert layer.slots_R.tolist() == [slots // ranks] * ranks
    assert layer.duplicates_on_rank == 0
    in_order = Layout.even(len(tokens_E), ranks, slots)
    assert busiest(layer, tokens_E) <= busiest(in_order, tokens_E) * (1 + 1e-9)
    if tokens_E.any():
        assert busiest(layer, tokens_E) >= lower_bound(tokens_E, slots, ranks) * (1 - 1e-9)
    else:
        assert layer == in_order


def least_possible(tokens_E, ranks, each):
    """Over all layouts without two replicas on a rank, tried one by one."""
    experts = range(len(tokens_E))
    layouts = product(combinations(experts, each), repeat=ranks)
    return min(
        busiest(Layout(held, len(tokens_E)), tokens_E)
        for held in layouts
        if set().union(*held) == set(experts)
    )


@given(
    st.lists(st.integers(1, 50), min_size=4, max_size=4), st.sampled_from([(2, 2), (2, 3), (3, 2), (4, 1)])
)
@settings(max_examples=40, deadline=None)
def test_tiny_layers_are_optimal(tokens, shape):
    ranks, each = shape
    layer = plan(np.array([tokens], float), ranks=ranks, slots=ranks * each, kicks=300).layers[0]
    assert busiest(layer, tokens) == pytest.approx(least_possible(tokens, ranks, each))


SKEWED = {
    "zipf": lambda rng, experts: rng.permutation(1e6 / np.arange(1, experts + 1)),
    "lognormal": lambda rng, experts: rng.lognormal(0, 1.5, experts),
    "dirichlet": lambda rng, experts: rng.dirichlet(np.full(experts, 0.3)) * 1e6,
    "equal": lambda rng, experts: np.full(experts, 7.0),
    "one hot": lambda rng, experts: np.where(np.arange(experts) == 3, 1e6, 1.0),
}


@pytest.mark.parametrize("kind", SKEWED)
@pytest.mark.parametrize(
    ("experts", "ranks", "slots"), [(8, 4, 8), (64, 16, 80), (60, 7, 70), (256, 32, 288), (512, 144, 576)]
)
def test_skewed_layers_are_near_their_bound(kind, experts, ranks, slots):
    tokens_E = SKEWED[kind](np.random.default_rng(experts), experts)
    layer = plan(tokens_E[None], ranks=ranks, slots=slots).layers[0]
    assert layer.duplicates_on_rank == 0
    # With four slots a rank and more, what is left above the bound is the heaviest replica's company, which is light.
    slack = 1.02 if slots // ranks > 4 else 1.6
    assert busiest(layer, tokens_E) <= slack * lower_bound(tokens_E, slots, ranks)


def test_the_same_task_gives_the_same_answer():
    loads = np.random.default_rng(0).lognormal(0, 1, (3, 40))
    first, again, other = (plan(loads, ranks=8, slots=48, kicks=50, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert other.layers != first.layers


def test_search_time_improves_and_zero_layers_stay_even():
    loads = np.random.default_rng(1).lognormal(0, 0.7, (3, 256))
    loads[0] = 0
    quick = plan(loads, ranks=64, slots=320)
    searched = plan(loads, ranks=64, slots=320, search_ms=30)
    assert quick.layers[0] == searched.layers[0] == Layout.even(256, 64, 320)
    for layer in (1, 2):
        assert busiest(searched.layers[layer], loads[layer]) < busiest(quick.layers[layer], loads[layer])


def test_progress_counts_loaded_layers():
    seen = []
    loads = np.zeros((5, 8))
    loads[2:] = 1.0
    plan(loads, ranks=2, progress=lambda done, total: seen.append((done, total)))
    assert seen[:3] == [(1, 3), (2, 3), (3, 3)]


def test_the_worst_window_is_balanced():
    rng = np.random.default_rng(2)
    windows = rng.lognormal(0, 1, (3, 1, 64))
    windows[1] *= 100  # a window's number of tokens must not matter
    loads = Loads.of(list(windows))

    def worst(**options):
        layer = plan(loads, ranks=16, slots=80, **options).layers[0]
        return max(busiest(layer, window[0]) / window[0].sum() * 16 for window in windows)

    assert worst(windows="worst", kicks=100) < worst(kicks=100)


def test_node_penalty_spreads_replicas_over_nodes():
    tokens_E = np.random.default_rng(3).lognormal(0, 1.5, 48)

    def crowded_and_busiest(**options):
        layer = plan(tokens_E[None], ranks=16, slots=64, node_size=4, **options).layers[0]
        nodes = [
            set((layer.rank_of_slot_P[layer.slot_to_expert_P == expert] // 4).tolist())
            for expert in range(48)
        ]
        crowds = sum(
            replicas - len(on)
            for replicas, on in zip(layer.replicas_E.tolist(), nodes, strict=True)
            if len(on) < 4
        )
        return crowds, busiest(layer, tokens_E) / tokens_E.sum() * 16

    plain, spread = crowded_and_busiest(), crowded_and_busiest(node_penalty=0.01)
    assert spread[0] < plain[0]
    assert spread[1] <= plain[1] + 0.01 * (plain[0] - spread[0])


@pytest.mark.parametrize("objective", [activated(64), activated(4096)])
def test_activated_experts_are_balanced(objective):
    tokens_E = np.random.default_rng(4).lognormal(0, 1.5, 64)
    by_tokens, by_experts = (
        plan(tokens_E[None], ranks=8, slots=80, objective=wanted).layers[0] for wanted in (TOKENS, objective)
    )
    assert busiest(by_experts, tokens_E, objective) < busiest(by_tokens, tokens_E, objective)
    assert by_experts.duplicates_on_rank == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": "best"}, "windows: must be mixture or worst"),
        ({"node_penalty": -1}, "node_penalty"),
        ({"node_penalty": 0.1}, "give node_size"),
        ({"kicks": 1.5}, "kicks"),
        ({"kick": 1}, "kick: is no option of refined"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        plan(np.ones((1, 4)), ranks=2, **options)
