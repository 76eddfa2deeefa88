"""What is printed of the experts' load: facts for programs, a table for people."""

import numpy as np
import pytest

from epbackend.cli import loads
from epbackend.cli.output import console
from epbackend.config import EPConfig
from epbackend.engines.lmdeploy import LoadReport


def report(tokens_RYE, layers, **phases):
    """A load report; `phases` name the dispatcher of each phase."""
    dispatchers = {
        phase: {"name": name, "reason": "it suits", "passed_over": [("other", "it does not")]}
        for phase, name in phases.items()
    }
    tokens_2RYE = np.array([tokens_RYE, np.zeros_like(tokens_RYE)])
    return LoadReport(
        layers,
        tokens_2RYE,
        1,
        1,
        1,
        dispatchers,
        np.full(len(layers), 2.5),
        top_k=2,
    )


TWO_RANKS = report([[[1, 2], [0, 0]], [[0, 0], [3, 9]]], (1, 2), prefill="alltoall", decode="replicated")
DENSE = report(np.zeros((1, 0, 0), dtype=np.int64), ())


def test_table_shows_shares_and_the_busiest_expert_of_each_rank():
    with console.capture() as captured:
        loads.print_load(TWO_RANKS)
    text = captured.get()
    assert "20.0%" in text
    assert "1 of layer 1 (2)" in text
    assert "80.0%" in text
    assert "1 of layer 2 (9)" in text
    assert "dispatcher (decode): replicated: it suits" in text
    assert "not other: it does not" in text


@pytest.mark.parametrize(
    ("load", "dispatcher", "tokens"),
    [
        (TWO_RANKS, {"prefill": "alltoall", "decode": "replicated"}, [3, 12]),
        (report([[[4]]], (0,), prefill="alltoall", decode="alltoall"), "alltoall", [4]),
        (DENSE, None, [0]),
    ],
    ids=["one a phase", "the same", "dense"],
)
def test_facts_name_dispatchers_and_tokens_of_each_rank(load, dispatcher, tokens):
    facts = loads.facts(EPConfig(device="cpu"), load)
    assert facts["dispatcher"] == dispatcher
    assert facts["expert_tokens_per_rank"] == tokens
    assert facts["device"] == "cpu"


def test_table_of_a_dense_model_has_no_experts():
    with console.capture() as captured:
        loads.print_load(DENSE)
    assert "none" in captured.get()


@pytest.mark.parametrize(("load", "run", "step"), [(TWO_RANKS, 2.0, 2.5), (DENSE, 1.0, 1.0)])
def test_imbalance_of_run_and_step_is_one_without_experts(load, run, step):
    found = loads.imbalance(load)
    assert (found["imbalance_mean"], found["imbalance_worst"]) == (run, run)
    assert (found["step_imbalance_mean"], found["step_imbalance_worst"]) == (step, step)
