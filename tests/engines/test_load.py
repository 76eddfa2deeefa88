"""The board: what workers write is what the parent reads; the segment is the parent's and goes with it."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from epbackend.engines.lmdeploy import load
from epbackend.engines.lmdeploy.load import (
    BOARD_VARIABLE,
    MAX_EXPERTS,
    MAX_LAYERS,
    LoadBoard,
    LoadReport,
    LoadWriter,
)
from epbackend.errors import EPError


@dataclass(frozen=True)
class Choice:
    name: str
    reason: str


def layer(tokens_E, calls=1, passes=1, rounds=1):
    """What the writer reads of an ExpertParallelMoE."""
    counts = SimpleNamespace(
        calls=calls,
        passes=SimpleNamespace(max=passes),
        rounds=SimpleNamespace(max=rounds),
        tokens_E=torch.tensor(tokens_E),
    )
    return SimpleNamespace(load=counts, dispatchers={"decode": Choice("alltoall", "it suits")})


@pytest.fixture
def board(monkeypatch):
    board = LoadBoard(2)
    monkeypatch.setenv(BOARD_VARIABLE, board.variable)
    yield board
    if board._memory.buf is not None:
        board.remove()


def test_counters_of_two_ranks_and_two_layers(board):
    for rank in (0, 1):
        for index in (1, 3):
            LoadWriter.attach(rank, index, 3).record(
                layer([rank, index, 5], calls=7, passes=rank + 1, rounds=index)
            )
    report = board.report()
    assert report.layers == (1, 3)
    assert report.tokens_RLE.tolist() == [[[0, 1, 5], [0, 3, 5]], [[1, 1, 5], [1, 3, 5]]]
    assert report.tokens_per_rank == [14, 16]
    assert (report.calls, report.passes, report.rounds) == (7, 2, 3)
    assert report.dispatchers == {"decode": {"name": "alltoall", "reason": "it suits"}}


def test_since_subtracts_and_a_report_does_not_change(board):
    writer = LoadWriter.attach(0, 0, 2)
    nothing = board.report()
    writer.record(layer([1, 2], calls=1))
    first = board.report()
    writer.record(layer([5, 5], calls=4))
    second = board.report()
    assert first.tokens_RLE[0].tolist() == [[1, 2]]
    assert second.since(first).tokens_RLE[0].tolist() == [[4, 3]]
    assert second.since(first).calls == 3
    assert np.array_equal(first.since(nothing).tokens_RLE, first.tokens_RLE)


def report(tokens_RLE, layers):
    return LoadReport(layers, np.array(tokens_RLE), 1, 1, 1, {}, np.ones(len(layers)))


def test_imbalance_is_the_busiest_rank_over_the_mean():
    two = report([[[3, 0], [0, 0], [2, 0]], [[0, 1], [0, 0], [0, 2]]], (1, 2, 3))
    assert two.imbalance_L.tolist() == [1.5, 1.0, 1.0]
    assert report(np.zeros((2, 0, 0), dtype=np.int64), ()).imbalance_L.size == 0


def test_steps_are_looked_at_one_by_one(board):
    """Two ranks that are busy in turn are level over the run, and twice as busy as need be in each step."""
    writers = [LoadWriter.attach(rank, 0, 1) for rank in (0, 1)]
    for call in range(1, 2 * load.STEPS):
        for rank, writer in enumerate(writers):
            writer.record(layer([3 * ((call + rank) // 2)], calls=call))
    report = board.report()
    assert report.imbalance_L == pytest.approx([1.0], abs=0.01)
    assert report.step_imbalance_L == pytest.approx([2.0])


def test_steps_of_a_rank_that_is_behind_are_left_out(board):
    first, second = (LoadWriter.attach(rank, 0, 1) for rank in (0, 1))
    first.record(layer([2], calls=1))
    assert board.report().step_imbalance_L.tolist() == [1.0]
    second.record(layer([1], calls=1))
    first.record(layer([9], calls=2))
    assert board.report().step_imbalance_L == pytest.approx([2 / 1.5])


def test_loads_are_those_of_the_model():
    """Copies of an expert add up, layers without experts are there, and shards of an expert count once."""
    both = report([[[3, 0], [1, 1]], [[4, 1], [0, 2]]], (1, 3))
    assert both.loads_LE(4, ep_size=2).tolist() == [[0, 0], [7, 1], [0, 0], [1, 3]]
    assert both.loads_LE(4, ep_size=1).tolist() == [[0, 0], [3, 0], [0, 0], [1, 1]]


def test_last_words_cross_processes(board):
    process = multiprocessing.get_context("spawn").Process(
        target=load.record_error, args=(1, "no such weight: ö")
    )
    process.start()
    process.join()
    assert load.last_words(1) == "no such weight: ö"
    assert load.last_words(0) is None
    # The worker's end has not taken the segment along.
    assert (Path("/dev/shm") / board._memory.name).exists()


def test_removed_board_is_gone(board):
    path = Path("/dev/shm") / board._memory.name
    assert path.exists()
    board.remove()
    assert not path.exists()


def test_without_a_board_nothing_is_written(monkeypatch):
    monkeypatch.delenv(BOARD_VARIABLE, raising=False)
    LoadWriter.attach(0, 0, 1).record(layer([1]))
    assert load.last_words(0) is None
    assert BOARD_VARIABLE not in os.environ


@pytest.mark.parametrize(("index", "experts"), [(MAX_LAYERS, 8), (0, MAX_EXPERTS + 1)])
def test_what_the_board_cannot_hold_is_refused(board, index, experts):
    with pytest.raises(EPError, match=f"{MAX_LAYERS} layers of {MAX_EXPERTS} experts"):
        LoadWriter.attach(0, index, experts)
