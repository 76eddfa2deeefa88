"""Pairs, the visits that they predict, and plans for fewer of them within a limit of balance."""

import json
import re
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.affinity import visits_of_routes
from epbackend.errors import ConfigError
from epbackend.placement import plan
from epbackend.placement.affinity import Affinity
from epbackend.placement.formats.pairs import PAIRS, read_pairs, write_pairs
from epbackend.placement.loads import Loads
from epbackend.placement.pairs import Pairs, count_pairs
from epbackend.placement.placement import Layout
from epbackend.placement.score import score
from epbackend.placement.synthetic import synthetic_routes
from epbackend.placement.visits import expected_visits, placement_visits


def loads_of(topk_ids_TK, experts):
    return Loads.of(np.bincount(topk_ids_TK.reshape(-1), minlength=experts)[None].astype(float))


def pairs_of(topk_ids_TK, experts):
    return Pairs.of_routes([topk_ids_TK], experts)


def visits(placement, pairs):
    found = placement_visits(placement, pairs)
    return found.other_nodes, found.ranks


@st.composite
def questions(draw):
    """Routes and ranks of every small kind: (topk_ids [T, K], experts, ranks, slots, node size)."""
    nodes, size = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    ranks, topk = nodes * size, draw(st.integers(1, 4))
    experts = draw(st.integers(max(topk, 2), 12))
    slots = ranks * draw(st.integers(-(-experts // ranks), experts))
    routes = synthetic_routes(
        draw(st.integers(1, 60)), experts, topk, topics=3, seed=draw(st.integers(0, 99))
    )
    return routes, experts, ranks, slots, size


def test_pairs_are_tokens_that_chose_both():
    routes = synthetic_routes(40, 7, 3, seed=1)
    pairs = pairs_of(routes, 7)
    for expert, other in product(range(7), repeat=2):
        both = sum(expert in ids and other in ids for ids in routes.tolist())
        assert pairs.tokens_YEE[0, expert, other] == both
    assert pairs.topk == 3


@given(questions())
@settings(max_examples=100, deadline=None)
def test_the_estimate_is_exact_for_two_experts_without_replicas(question):
    routes, experts, ranks, _, size = question
    routes = routes[:, :2]
    if routes.shape[1] < 2 or experts < ranks:
        return
    layout = Layout.even(experts, ranks)
    # Tokens of every rank alike, as the estimate supposes.
    routes = np.repeat(routes, ranks, axis=0)
    exact, guessed = (
        visits_of_routes(routes, layout, size),
        expected_visits(count_pairs(routes, experts), 2, layout, size),
    )
    assert guessed.ranks == pytest.approx(exact.ranks, abs=1e-6)
    np.testing.assert_allclose(guessed.nodes_MM, exact.nodes_MM, atol=1e-6)
    np.testing.assert_allclose(guessed.ranks_MM, exact.ranks_MM, atol=1e-6)


def test_a_copy_on_its_own_node_spares_a_token_the_link():
    routes = np.array([[0, 1]] * 8)
    apart = Layout(((0, 2), (1, 3)), 4)
    copied = Layout(((0, 1, 2), (0, 1, 3)), 4)
    assert visits_of_routes(routes, apart, 1).other_nodes == 1
    assert visits_of_routes(routes, copied, 1).other_nodes == 0
    assert expected_visits(count_pairs(routes, 4), 2, copied, 1).nodes == pytest.approx(1)


def test_an_expert_on_every_rank_is_visited_nowhere_else():
    routes = synthetic_routes(60, 4, 2, seed=1)
    everywhere = Layout(((0, 1, 2, 3),) * 4, 4)
    assert visits_of_routes(routes, everywhere).ranks == 1
    assert expected_visits(count_pairs(routes, 4), 2, everywhere).ranks == pytest.approx(1)


@pytest.mark.parametrize(("slots", "node_size"), [(48, 0), (64, 0), (64, 4)])
def test_ranks_are_estimated_within_some_percent_where_copies_are_on_one_node(slots, node_size):
    routes = synthetic_routes(4000, 32, 4, strength=0, seed=2)
    placement = plan(loads_of(routes, 32), ranks=8, slots=slots, node_size=node_size)
    exact = visits_of_routes(routes, placement.layers[0], node_size)
    guessed = placement_visits(placement, pairs_of(routes, 32))
    assert guessed.ranks == pytest.approx(exact.ranks, rel=0.02)
    assert guessed.nodes == pytest.approx(exact.nodes, rel=0.02)


@given(questions(), st.sampled_from((1.0, 1.02, 1.3)), st.sampled_from((None, 0.3, 0.5)))
@settings(max_examples=60, deadline=None)
def test_never_more_visits_and_never_worse_than_the_limit(question, limit, slow):
    """Of tokens; or of times, where the first rank is slow."""
    routes, experts, ranks, slots, size = question
    loads, pairs = loads_of(routes, experts), pairs_of(routes, experts)
    asked = {"ranks": ranks, "slots": slots, "node_size": size}
    if slow is not None:
        asked["rank_speed"] = [slow] + [1.0] * (ranks - 1)
    balanced = plan(loads, **asked)
    gathered = plan(loads, **asked, affinity=Affinity(pairs, limit))
    was, now = balanced.layers[0], gathered.layers[0]
    assert now.slots_R.tolist() == was.slots_R.tolist()
    assert now.replicas_E.tolist() == was.replicas_E.tolist()
    assert now.duplicates_on_rank == 0
    assert all(
        after <= before + 1e-9
        for before, after in zip(visits(balanced, pairs), visits(gathered, pairs), strict=True)
    )
    imbalance, allowed = (score(each, loads, split="nearest").imbalance_mean for each in (gathered, balanced))
    assert imbalance <= max(limit, allowed) * (1 + 1e-9)


def test_topics_that_share_no_expert_get_a_node_each():
    random = np.random.default_rng(0)
    experts_XL = random.permutation(32).reshape(4, 8)
    rows = [random.permutation(experts_XL[topic])[:4] for topic in random.integers(4, size=4000)]
    routes = np.array(rows)
    pairs, asked = pairs_of(routes, 32), {"ranks": 8, "node_size": 2}
    balanced = plan(loads_of(routes, 32), **asked)
    gathered = plan(loads_of(routes, 32), **asked, affinity=Affinity(pairs, 1.1))
    assert visits_of_routes(routes, balanced.layers[0], 2).nodes > 2
    assert visits_of_routes(routes, gathered.layers[0], 2).nodes == 1


def test_on_ranks_of_unequal_speed_and_memory_tokens_visit_less_too():
    seen, unseen = (synthetic_routes(8000, 64, 6, topics=6, sample=sample) for sample in (0, 1))
    asked = {"ranks": 16, "node_size": 4, "rank_slots": [5] * 8 + [6] * 8, "rank_speed": [0.5] * 8 + [1] * 8}
    loads = loads_of(seen, 64)
    balanced = plan(loads, **asked)
    gathered = plan(loads, **asked, affinity=Affinity(pairs_of(seen, 64), 1.05))
    assert gathered.rank_speed == balanced.rank_speed
    was, now = (visits_of_routes(unseen, each.layers[0], 4) for each in (balanced, gathered))
    assert now.ranks < 0.97 * was.ranks
    assert now.other_nodes < 0.97 * was.other_nodes
    imbalance, allowed = (score(each, loads, split="nearest").imbalance_mean for each in (gathered, balanced))
    assert imbalance <= max(1.05, allowed) * (1 + 1e-9)


@pytest.mark.parametrize("node_size", [0, 4])
def test_tokens_that_the_plan_has_not_seen_visit_less(node_size):
    seen, unseen = (synthetic_routes(8000, 64, 6, topics=6, sample=sample) for sample in (0, 1))
    asked = {"ranks": 16, "slots": 80, "node_size": node_size}
    balanced = plan(loads_of(seen, 64), **asked)
    gathered = plan(loads_of(seen, 64), **asked, affinity=Affinity(pairs_of(seen, 64)))
    was, now = (visits_of_routes(unseen, each.layers[0], node_size) for each in (balanced, gathered))
    assert now.ranks < 0.95 * was.ranks
    assert not node_size or now.other_nodes < 0.92 * was.other_nodes


def test_counts_of_independent_choices_differ_by_noise_alone():
    routes = synthetic_routes(3000, 32, 4, strength=0, seed=2)
    both_EE = pairs_of(routes, 32).beyond_noise(0)
    many_EE = count_pairs(synthetic_routes(100_000, 32, 4, strength=0, seed=2), 32) / 100_000
    raw_EE = count_pairs(routes, 32) / 3000
    off = ~np.eye(32, dtype=bool)
    assert np.abs(both_EE - many_EE)[off].mean() < 0.6 * np.abs(raw_EE - many_EE)[off].mean()


def test_provenance_names_pairs_and_limit(tmp_path):
    routes = synthetic_routes(200, 8, 2)
    pairs = pairs_of(routes, 8)
    options = dict(
        plan(loads_of(routes, 8), ranks=4, node_size=2, affinity=Affinity(pairs, 1.05)).provenance.options
    )
    assert options == {"affinity": 1.05, "pairs": f"routes {pairs.digest}"}


@pytest.mark.parametrize("name", ["pairs.json", "pairs.npz"])
def test_files_keep_everything(tmp_path, name):
    pairs = Pairs(pairs_of(synthetic_routes(50, 6, 2), 6).tokens_YEE, "pairs", "original")
    write_pairs(pairs, tmp_path / name)
    first = (tmp_path / name).read_bytes()
    found = read_pairs(tmp_path / name)
    np.testing.assert_array_equal(found.tokens_YEE, pairs.tokens_YEE)
    assert (found.name, found.numbering, found.digest) == ("pairs", "original", pairs.digest)
    write_pairs(found, tmp_path / name)
    assert (tmp_path / name).read_bytes() == first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "holds none.*record --pairs"),
        (json.dumps({PAIRS: [[1, 0], [0, 1]]}), r"must be \[layers\]\[experts\]\[experts\]"),
        (json.dumps({PAIRS: [[[1, 0]]]}), r"must be \[layers, experts, experts\]"),
        (json.dumps({PAIRS: [[[2, 1], [0, 2]]]}), "experts 0 and 1 in layer 0 differs .*record them again"),
        (json.dumps({PAIRS: [[[1, 2], [2, 3]]]}), "experts 0 and 1 in layer 0 is more than"),
        (json.dumps({PAIRS: [[[-1]]]}), "is no count"),
        (json.dumps({PAIRS: [[[1]]], "numbering": 3}), "numbering: must be a text"),
        (b"PK\x03\x04 broken", "is a broken npz"),
    ],
)
def test_bad_files_are_refused_in_a_line(tmp_path, content, message):
    path = tmp_path / "pairs"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        read_pairs(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_what_does_not_go_together_is_refused():
    routes = synthetic_routes(50, 8, 2)
    loads, pairs = loads_of(routes, 8), pairs_of(routes, 8)
    other = pairs_of(routes, 9)
    renumbered = Pairs(pairs.tokens_YEE, numbering="changed"), Loads(loads.tokens_WYE, ("a",), "original")
    for asked, message in (
        ({"affinity": Affinity(other)}, "pairs: routes has 9 experts, but the loads 8; use pairs recorded"),
        ({"affinity": Affinity(pairs), "node_size": 3}, "node_size: 3 .* do not divide the 4 ranks"),
        ({"affinity": Affinity(pairs), "objective": "activated:64"}, "affinity: its limit is of tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan(loads, ranks=4, **asked)
    with pytest.raises(ConfigError, match="numbers of changed, but the loads by those of original"):
        plan(renumbered[1], ranks=4, affinity=Affinity(renumbered[0]))
    for limit in (0.9, float("nan"), True, "much"):
        with pytest.raises(ConfigError, match=re.escape(f"affinity: the limit {limit!r} must be")):
            Affinity(pairs, limit)
    with pytest.raises(ConfigError, match="routes: they name expert 7"):
        count_pairs(routes, 7)
