import json

import numpy as np
import pytest

from epbackend.errors import ConfigError
from epbackend.placement import plan
from epbackend.placement.objectives import TOKENS, Objective, activated, parse_objective

TABLE = {"batch": 100, "tokens": [0, 50, 100], "experts": [0, 4], "microseconds": [[5, 9], [6, 10], [9, 20]]}


@pytest.fixture
def table_file(tmp_path):
    def write(**changes):
        path = tmp_path / "table.json"
        path.write_text(json.dumps({**TABLE, **changes}))
        return path

    return write


def test_tokens_are_summed_by_rank():
    assert TOKENS.rank_costs(np.array([1.0, 2, 4]), np.array([0, 0, 1]), 3).tolist() == [3, 4, 0]


def test_activated_is_what_random_batches_touch():
    tokens_P, rank_of_slot_P = np.array([5.0, 1, 1, 3]), np.array([0, 0, 1, 1])
    rng = np.random.default_rng(0)
    batches = rng.multinomial(6, tokens_P / tokens_P.sum(), size=40_000)
    touched_R = [(batches[:, rank_of_slot_P == rank] > 0).sum(axis=1).mean() for rank in (0, 1)]
    assert activated(6).rank_costs(tokens_P, rank_of_slot_P, 2) == pytest.approx(touched_R, abs=0.02)


@pytest.mark.parametrize(
    ("tokens", "experts", "cost"),
    [(0, 0, 5), (50, 4, 10), (25, 2, 7.5), (75, 4, 15), (75, 2, 11.25), (150, 0, 12), (0, 8, 13)],
)
def test_table_is_bilinear_and_goes_on_outside(table_file, tokens, experts, cost):
    assert parse_objective(table_file()).cost(tokens, experts) == pytest.approx(cost)


def test_costs_do_not_depend_on_the_unit_of_a_batch(table_file):
    objective, rank_of_slot_P = parse_objective(table_file()), np.array([0, 1, 1])
    small, large = (
        objective.rank_costs(np.array([3.0, 2, 1]) * scale, rank_of_slot_P, 2) for scale in (1, 1e6)
    )
    assert small == pytest.approx(large)


def test_planner_and_objective_agree_on_a_table(table_file):
    """The compiled table is the one of `Objective.cost`: no swap of two slots may lower the worst rank."""
    objective, ranks = parse_objective(table_file()), 3
    tokens_E = np.random.default_rng(1).lognormal(0, 1, 9)
    layer = plan(tokens_E[None], ranks=ranks, slots=9, objective=objective).layers[0]

    def worst(expert_P):
        return objective.rank_costs(tokens_E[expert_P], layer.rank_of_slot_P, ranks).max()

    planned = layer.slot_to_expert_P
    for a in range(9):
        for b in range(a):
            swapped = planned.copy()
            swapped[[a, b]] = planned[[b, a]]
            assert worst(swapped) >= worst(planned) * (1 - 1e-9)


def test_names_and_paths_are_parsed():
    assert parse_objective("tokens") == parse_objective(TOKENS) == TOKENS
    assert parse_objective("activated") == activated(1024)
    assert parse_objective("activated:32") == activated(32)


def test_plane_is_the_cost_of_a_token_and_an_expert():
    assert TOKENS.plane == (1, 0)
    assert activated(8).plane == (0, 1)
    assert Objective("table", 8, cost_XA=((0, 2), (3, 6))).plane is None


@pytest.mark.parametrize(
    "text",
    [
        "token",
        "activated:",
        "activated:0",
        "activated:-4",
        "activated:x",
        "activated:" + "9" * 5000,
        "nowhere.json",
    ],
)
def test_unknown_objectives_are_refused(text):
    with pytest.raises(ConfigError, match="objective: "):
        parse_objective(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "tokens in .* must be a list of numbers"),
        ({"tokens": [0, 50, "many"]}, "tokens in .* must be a list of numbers"),
        ({"tokens": [0, 100, 50]}, "tokens must be two numbers or more, each above"),
        ({"experts": [4]}, "experts must be two numbers or more"),
        ({"microseconds": 5}, "microseconds in .* must be a list of rows"),
        ({"microseconds": [[1, 2], [3, 4]]}, r"microseconds must have 3 rows \(tokens\) of 2"),
        ({"microseconds": [[1, 2], [3, 4], [5, -6]]}, "finite and 0 or more"),
        ({"tokens": [0, 1, 10**400]}, "tokens in .* too large"),
        ({"batch": 0}, "batch in .* must be a whole number"),
    ],
)
def test_tables_that_cannot_be_are_refused(table_file, changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_objective(table_file(**changes))


def test_files_that_are_no_table_are_refused(tmp_path):
    for name, text in (("list.json", "[1]"), ("broken.json", "{")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=name):
            parse_objective(tmp_path / name)


def test_experts_cannot_count_without_a_batch():
    with pytest.raises(ConfigError, match="batch is 0"):
        Objective("mine", cost_XA=((0, 1), (1, 2)))
