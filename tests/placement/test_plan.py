"""`plan`: what it checks before and after a planner, and planners of third parties."""

from __future__ import annotations

import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epbackend import __version__
from epbackend.errors import ConfigError, UnavailableError
from epbackend.placement import Layout, Loads, Placement, plan, planner_names
from tests.helpers.placement_strategies import skewed

PLANNERS = ("refined", "eplb", "omni", "lplb")
"""Those that need no placement in use."""


def rank_loads(layer: Layout, tokens_E: np.ndarray) -> np.ndarray:
    tokens_P = (tokens_E / layer.replicas_E)[layer.slot_to_expert_P]
    return np.bincount(layer.rank_of_slot_P, weights=tokens_P, minlength=layer.ranks)


@st.composite
def questions(draw):
    """(loads, ranks, slots) that every planner can answer."""
    ranks = draw(st.integers(1, 6))
    each = draw(st.integers(1, 5))
    experts = ranks * each
    more = draw(st.integers(0, min(each, ranks - 1)))
    tokens = st.lists(st.integers(0, 1000), min_size=experts, max_size=experts)
    loads_YE = np.array(draw(st.lists(tokens, min_size=1, max_size=3).filter(np.any)), dtype=float)
    return loads_YE, ranks, experts + more * ranks


@pytest.mark.parametrize("algorithm", PLANNERS)
@settings(max_examples=40, deadline=None)
@given(questions())
def test_every_expert_is_placed_on_even_ranks(algorithm, question):
    loads_YE, ranks, slots = question
    placement = plan(loads_YE, ranks=ranks, slots=slots, algorithm=algorithm)
    assert len(placement.layers) == len(loads_YE)
    for layer in placement.layers:
        assert layer.slots_R.tolist() == [slots // ranks] * ranks
        assert layer.replicas_E.min() >= 1
    assert placement == plan(loads_YE, ranks=ranks, slots=slots, algorithm=algorithm)


@pytest.mark.parametrize("algorithm", ["refined", "omni"])
@settings(max_examples=60, deadline=None)
@given(questions())
def test_never_worse_than_the_even_layout_and_never_twice_on_a_rank(algorithm, question):
    loads_YE, ranks, slots = question
    placement = plan(loads_YE, ranks=ranks, slots=slots, algorithm=algorithm)
    even = Layout.even(loads_YE.shape[1], ranks, slots)
    assert placement.duplicates_on_rank == 0
    for layer, tokens_E in zip(placement.layers, loads_YE, strict=True):
        assert rank_loads(layer, tokens_E).max() <= rank_loads(even, tokens_E).max() * (1 + 1e-12)


@pytest.mark.parametrize("algorithm", PLANNERS)
def test_layers_without_load_are_even(algorithm):
    loads_YE = skewed(3, 8) * [[0], [1], [0]]
    placement = plan(loads_YE, ranks=4, slots=12, algorithm=algorithm)
    assert placement.layers[::2] == (Layout.even(8, 4, 12),) * 2


@pytest.mark.parametrize("algorithm", planner_names())
def test_loads_without_a_token_are_refused(algorithm):
    with pytest.raises(ConfigError, match="loads: no expert has had a token"):
        plan(np.zeros((2, 8)), ranks=4, algorithm=algorithm)


@pytest.mark.parametrize("algorithm", ["eplb", "lplb"])
def test_slots_in_use_that_ranks_do_not_divide_are_refused_by_who_needs_equal_ranks(algorithm):
    in_use = Placement.even(2, 8, 2, 11)
    with pytest.raises(ConfigError, match="slots: 11 cannot be spread evenly over 2 ranks"):
        plan(skewed(2, 8), ranks=2, algorithm=algorithm, current=in_use)
    for other in ("refined", "omni", "incremental"):
        assert plan(skewed(2, 8), ranks=2, algorithm=other, current=in_use).slots == 11


@pytest.mark.parametrize("algorithm", PLANNERS)
def test_numbers_of_numpy_are_numbers(algorithm):
    asked = {"ranks": np.int64(4), "slots": np.int32(12), "seed": np.uint8(3), "node_size": np.int64(2)}
    placement = plan(skewed(1, 8), algorithm=algorithm, **asked)
    assert Placement.from_json(placement.to_json()) == placement


def test_provenance_holds_what_was_asked():
    loads = Loads.of([skewed(2, 12), skewed(2, 12, seed=1)], names=("decode", "prefill"))
    r2o = np.array([[1], [0]])
    provenance = plan(loads, ranks=4, slots=16, algorithm="lplb", r2o=r2o, seed=7).provenance
    assert (provenance.algorithm, provenance.version) == ("lplb", __version__)
    assert provenance.loads == ("decode", "prefill")
    assert provenance.options == (("r2o", [[1], [0]]), ("seed", 7))
    assert plan(loads, ranks=4, search_ms=0.5).provenance.options == (("search_ms", 0.5),)
    assert plan(loads, ranks=4, algorithm="eplb").provenance.options == ()


def test_slots_are_those_in_use_or_one_per_expert_unless_given():
    loads_YE = skewed(2, 12)
    assert plan(loads_YE, ranks=4, algorithm="eplb").slots == 12
    in_use = Placement.even(2, 12, 4, 20)
    assert plan(loads_YE, ranks=4, algorithm="eplb", current=in_use).slots == 20


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"ranks": 0}, "ranks: must be a whole number of 1 or more, not 0"),
        ({"ranks": 4.0}, "ranks: must be a whole number"),
        ({"ranks": True}, "ranks: must be a whole number"),
        ({"slots": 11}, "slots: 11 are fewer than the 12 experts"),
        ({"slots": "16"}, "slots: must be a whole number"),
        (
            {"slots": 18},
            "slots: 18 cannot be spread evenly over 4 ranks; use a multiple of the ranks such as 20",
        ),
        ({"ranks": 5}, "slots: 12 cannot be spread evenly over 5 ranks"),
        ({"ranks": 24, "slots": 12}, "slots: 12 are fewer than the 24 ranks"),
        ({"slots": 52}, "slots: 52 are more than 48"),
        ({"slots": 16, "budget": 8}, "slots: cannot be given beside budget"),
        ({"budget": -1}, "budget: must be a whole number of 0 or more"),
        ({"budget": 1000, "algorithm": "omni"}, "budget: 1000 is more than 72"),
        ({"node_size": 3}, "node_size: 3 ranks a node do not divide the 4 ranks"),
        ({"node_size": -2}, "node_size: must be a whole number of 0 or more"),
        ({"search_ms": -1}, "search_ms: must be a number of 0 or more"),
        ({"search_ms": float("nan")}, "search_ms: must be a number of 0 or more"),
        ({"search_ms": "1"}, "search_ms: must be a number of 0 or more"),
        ({"seed": 0.5}, "seed: must be a whole number"),
        ({"objective": "token"}, "objective: 'token' is unknown"),
        ({"algorithm": "omnii"}, "algorithm: 'omnii' is unknown, did you mean 'omni'.; known are refined, "),
        ({"algorithm": 7}, "algorithm: 7 is unknown"),
        (
            {"current": Placement.even(2, 12, 6)},
            "current: the placement in use has 6 ranks, but 4 are asked for",
        ),
        ({"current": Placement.even(3, 12, 4)}, "current: the placement in use has 3 layers, but 2"),
        ({"current": Placement.even(2, 8, 4)}, "current: the placement in use has 8 experts, but 12"),
        ({"colour": "red"}, "colour: is no option of eplb"),
        ({"search_ms": 1}, "search_ms: eplb does not search"),
        ({"search_ms": 1, "algorithm": "incremental"}, "search_ms: incremental does not search"),
    ],
)
def test_arguments_that_cannot_work_are_refused(asked, message):
    with pytest.raises(ConfigError, match=message):
        plan(skewed(2, 12), **{"ranks": 4, "algorithm": "eplb", **asked})


@pytest.mark.parametrize("loads", [np.ones(4), [[1, 2], [3]], np.array([[np.nan]]), np.array([["x"]])])
def test_loads_that_are_no_counts_are_refused(loads):
    with pytest.raises(ConfigError, match="loads: "):
        plan(loads, ranks=1)


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """An installed package with planners: one that works, and others with a fault each."""
    (tmp_path / "someones_planner.py").write_text(
        textwrap.dedent("""
            from epbackend.placement import Layout

            def backwards(task):
                experts = list(range(task.loads.experts))[::-1]
                return (Layout.of(experts, task.ranks, task.loads.experts),) * task.loads.layers

            def one_layer(task):
                return backwards(task)[:1]

            def other_ranks(task):
                return (Layout.even(task.loads.experts, task.ranks + 1, task.slots),) * task.loads.layers

            def other_slots(task):
                return (Layout.even(task.loads.experts, task.ranks, task.slots * 2),) * task.loads.layers

            def nothing(task):
                return None
        """)
    )
    info = tmp_path / "someones_planner-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: someones-planner\nVersion: 1.0\n")
    names = ("backwards", "one_layer", "other_ranks", "other_slots", "nothing", "missing", "eplb")
    points = "\n".join(f"{name} = someones_planner:{name}" for name in names)
    (info / "entry_points.txt").write_text(f"[epbackend.planners]\n{points}\ngone = no_such_module:plan\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("third_party")
class TestThirdParties:
    def test_a_planner_by_entry_point(self):
        assert planner_names()[:5] == ("refined", "incremental", "eplb", "omni", "lplb")
        assert "backwards" in planner_names()
        placement = plan(skewed(2, 4), ranks=2, algorithm="backwards")
        assert placement.layers == (Layout(((3, 2), (1, 0)), 4),) * 2
        assert placement.provenance.algorithm == "backwards"

    def test_the_names_of_built_in_planners_cannot_be_taken(self):
        assert planner_names().count("eplb") == 1
        assert plan(skewed(1, 4), ranks=2, algorithm="eplb").slots == 4

    @pytest.mark.parametrize(
        ("algorithm", "message"),
        [
            ("one_layer", "'one_layer' planned 1 of 2 layers"),
            (
                "other_ranks",
                "'other_ranks' answered with 3 ranks, 4 experts and 4 slots in layer 0, where 2, 4 and 4",
            ),
            ("other_slots", "'other_slots' answered with 2 ranks, 4 experts and 8 slots in layer 0"),
            ("nothing", "'nothing' answered with None"),
        ],
    )
    def test_an_answer_that_does_not_fit_the_task_is_refused(self, algorithm, message):
        with pytest.raises(ConfigError, match=f"algorithm: {message}.*; report it to its authors"):
            plan(skewed(2, 4), ranks=2, algorithm=algorithm)

    @pytest.mark.parametrize("algorithm", ["missing", "gone"])
    def test_a_package_that_does_not_load_is_unavailable(self, algorithm):
        with pytest.raises(UnavailableError, match=f"algorithm: '{algorithm}' of .* does not load"):
            plan(skewed(2, 4), ranks=2, algorithm=algorithm)


@pytest.mark.parametrize("algorithm", PLANNERS)
def test_progress_ends_with_all_layers(algorithm):
    calls = []
    plan(skewed(3, 12), ranks=4, algorithm=algorithm, progress=lambda *layers: calls.append(layers))
    assert calls[-1] == (3, 3)
    assert calls == sorted(calls)
