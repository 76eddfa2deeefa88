"""The board: what workers write is what the parent reads; the segment is the parent's and goes with it."""

from __future__ import annotations

import multiprocessing
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

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
)
from epbackend.engines.lmdeploy.load_writer import LoadWriter
from epbackend.errors import EPError
from epbackend.moe import Load
from epbackend.replica_split import SlotMap


@dataclass(frozen=True)
class Decision:
    name: str
    reason: str


class Layer:
    """What the writer reads of an ExpertParallelMoE with one slot an expert."""

    def __init__(self, tokens_E, passes=1, rounds=1) -> None:
        self.load = Load(tuple(range(len(tokens_E))), len(tokens_E))
        self.slot_map = SlotMap.uniform(len(tokens_E), 1)
        self.dispatchers = {"decode": Decision("alltoall", "it suits")}
        self.call(tokens_E, passes, rounds)

    def call(self, tokens_E, passes=1, rounds=1) -> None:
        self.load.add_rows(torch.tensor(tokens_E))
        self.load.add_call(passes, rounds)


def watching(rank: int, layers: dict[int, Layer]) -> LoadWriter:
    writer = LoadWriter()
    for number, layer in layers.items():
        writer.watch(rank, number, layer)
    return writer


@pytest.fixture
def board(monkeypatch):
    board = LoadBoard(2)
    monkeypatch.setenv(BOARD_VARIABLE, board.variable)
    yield board
    if board._memory.buf is not None:
        board.remove()


def test_report_has_the_counters_of_each_rank_and_layer(board):
    for rank in (0, 1):
        layers = {index: Layer([rank, index, 5], rank + 1, index) for index in (1, 3)}
        writer = watching(rank, layers)
        for _ in range(7):
            writer.step()
    report = board.report()
    assert report.layers == (1, 3)
    assert report.tokens_RLE.tolist() == [[[0, 1, 5], [0, 3, 5]], [[1, 1, 5], [1, 3, 5]]]
    assert report.tokens_per_rank == [14, 16]
    assert (report.calls, report.passes, report.rounds) == (7, 2, 3)
    assert report.dispatchers == {"decode": {"name": "alltoall", "reason": "it suits"}}


def test_since_subtracts_and_a_report_does_not_change(board):
    layer = Layer([1, 2])
    writer = watching(0, {0: layer})
    nothing = board.report()
    writer.step()
    first = board.report()
    layer.call([4, 3])
    for _ in range(3):
        writer.step()
    second = board.report()
    assert first.tokens_RLE[0].tolist() == [[1, 2]]
    assert second.since(first).tokens_RLE[0].tolist() == [[4, 3]]
    assert second.since(first).calls == 3
    assert np.array_equal(first.since(nothing).tokens_RLE, first.tokens_RLE)


def test_a_model_that_replaces_another_starts_at_zero(board):
    first = Layer([6, 6])
    writer = watching(0, {0: first})
    writer.step()
    second = Layer([1, 2])
    writer.watch(0, 0, second)
    writer.step()
    report = board.report()
    assert (report.tokens_RLE[0].tolist(), report.calls) == ([[1, 2]], 1)


def test_a_layer_is_not_kept_alive(board):
    layer = Layer([1])
    writer, gone = watching(0, {0: layer}), weakref.ref(layer)
    writer.step()
    del layer
    writer.step()
    assert gone() is None
    assert board.report().calls == 1


def report(tokens_RLE, layers):
    return LoadReport(layers, np.array(tokens_RLE), 1, 1, 1, {}, np.ones(len(layers)))


def test_imbalance_is_the_busiest_rank_over_the_mean():
    two = report([[[3, 0], [0, 0], [2, 0]], [[0, 1], [0, 0], [0, 2]]], (1, 2, 3))
    assert two.imbalance_L.tolist() == [1.5, 1.0, 1.0]
    assert report(np.zeros((2, 0, 0), dtype=np.int64), ()).imbalance_L.size == 0


def test_step_imbalance_is_taken_step_by_step(board):
    """Two ranks that are busy in turn are level over the run, and twice as busy as need be in each step."""
    layers = [Layer([0]), Layer([0])]
    writers = [watching(rank, {0: layer}) for rank, layer in enumerate(layers)]
    for step in range(2 * load.STEPS):
        for rank, (layer, writer) in enumerate(zip(layers, writers, strict=True)):
            layer.call([3 * ((step + rank) % 2)])
            writer.step()
    report = board.report()
    assert report.imbalance_L == pytest.approx([1.0], abs=0.01)
    assert report.step_imbalance_L == pytest.approx([2.0])


def test_steps_of_a_rank_that_is_behind_are_left_out(board):
    layers = [Layer([2]), Layer([1])]
    first, second = (watching(rank, {0: layer}) for rank, layer in enumerate(layers))
    first.step()
    assert board.report().step_imbalance_L.tolist() == [1.0]
    second.step()
    layers[0].call([7])
    first.step()
    assert board.report().step_imbalance_L == pytest.approx([2 / 1.5])


def test_loads_add_up_replicas_and_count_shards_once():
    """Replicas of an expert add up, layers without experts are there, and shards of an expert count once."""
    both = report([[[3, 0], [1, 1]], [[4, 1], [0, 2]]], (1, 3))
    assert both.loads_LE(4, ep_size=2).tolist() == [[0, 0], [7, 1], [0, 0], [1, 3]]
    assert both.loads_LE(4, ep_size=1).tolist() == [[0, 0], [3, 0], [0, 0], [1, 1]]


def test_the_error_of_a_worker_is_read_by_its_parent(board):
    process = multiprocessing.get_context("spawn").Process(
        target=load.record_error, args=(1, "no such weight: ö")
    )
    process.start()
    process.join()
    assert load.last_words(1) == "no such weight: ö"
    assert load.last_words(0) is None
    # The worker's end has not taken the segment along.
    assert (Path("/dev/shm") / board._memory.name).exists()


def test_a_removed_board_leaves_no_shared_memory(board):
    path = Path("/dev/shm") / board._memory.name
    assert path.exists()
    board.remove()
    assert not path.exists()


def test_without_a_board_nothing_is_written(monkeypatch):
    monkeypatch.delenv(BOARD_VARIABLE, raising=False)
    layer = Layer([1])
    watching(0, {0: layer}).step()
    assert load.last_words(0) is None
    assert BOARD_VARIABLE not in os.environ


@pytest.mark.parametrize(("index", "experts"), [(MAX_LAYERS, 8), (0, MAX_EXPERTS + 1)])
def test_layers_and_experts_beyond_the_board_are_refused(index, experts):
    with pytest.raises(EPError, match=f"{MAX_LAYERS} layers of {MAX_EXPERTS} experts"):
        load.check_room(index, experts)
