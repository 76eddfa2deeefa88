"""The load report: what workers write is what the parent reads; the segment is the parent's and goes with it."""

from __future__ import annotations

import os
import signal
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from epbackend.engines.lmdeploy.load import report as load_report
from epbackend.engines.lmdeploy.load import stats_writer
from epbackend.engines.lmdeploy.load.report import (
    MAX_EXPERTS,
    MAX_LAYERS,
    STATS_VARIABLE,
    STEPS,
    SharedStats,
    rank_row,
)
from epbackend.engines.lmdeploy.load.stats_writer import Counters, StatsWriter
from epbackend.engines.load_report import LoadReport
from epbackend.errors import EPError
from epbackend.moe import LayerStats
from tests.helpers.forked_engines import forked_context
from tests.helpers.patience import PATIENCE_S

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Decision:
    name: str
    reason: str


class Layer:
    """What the writer reads of an ExpertParallelMoE, with one slot an expert unless told otherwise."""

    def __init__(self, tokens_L, passes=1, rounds=1, experts=None) -> None:
        local = experts if experts is not None else tuple(range(len(tokens_L)))
        self.load = LayerStats(local, len(tokens_L))
        self.slot_map = SimpleNamespace(experts=len(tokens_L))
        self.dispatchers, self.top_k = {"decode": Decision("alltoall", "it suits")}, 2
        self.call(tokens_L, passes, rounds)

    def call(self, tokens_L, passes=1, rounds=1, phase="prefill") -> None:
        self.load.rows_on(torch.device("cpu"), phase).add_(torch.tensor(tokens_L, dtype=torch.int64))
        self.load.add_call(passes, rounds)


@pytest.fixture
def watching():
    """Makes the writer of a rank with such layers."""
    writers = []

    def watching(rank: int, layers: dict[int, Layer]) -> StatsWriter:
        writers.append(writer := StatsWriter())
        for number, layer in layers.items():
            writer.watch(rank, number, layer, CPU)
        return writer

    yield watching
    for writer in writers:
        writer.close()


@pytest.fixture
def stats(monkeypatch, watching):
    stats = SharedStats(2)
    monkeypatch.setenv(STATS_VARIABLE, stats.variable)
    yield stats
    if stats._memory.buf is not None:
        stats.remove()


def test_report_has_the_counters_of_each_rank_and_layer(stats, watching):
    for rank in (0, 1):
        layers = {index: Layer([rank, index, 5], rank + 1, index) for index in (1, 3)}
        writer = watching(rank, layers)
        for _ in range(7):
            writer.step()
    report = stats.report()
    assert report.layers == (1, 3)
    assert report.tokens_RYE.tolist() == [[[0, 1, 5], [0, 3, 5]], [[1, 1, 5], [1, 3, 5]]]
    assert report.tokens_per_rank == [14, 16]
    assert (report.calls, report.passes, report.rounds) == (7, 2, 3)
    assert report.dispatchers == {"decode": {"name": "alltoall", "reason": "it suits"}}


def test_each_phase_is_counted_by_itself_also_where_experts_move(stats, watching):
    """Layers of unequal sizes, so that one takes several lines."""
    layers = {0: Layer([1, 2]), 1: Layer([0, 1, 2, 3, 4])}
    writer = watching(0, layers)
    layers[0].call([5, 0], phase="decode")
    layers[1].call([0, 10, 20, 30, 40], phase="decode")
    writer.step()
    with writer.moving(0, layers[0]):
        layers[0].load.replace_experts((1, 0))
    layers[0].call([100, 0], phase="decode")
    layers[1].call([1, 0, 0, 0, 0])
    writer.step()
    prefill_YE, decode_YE = stats.report().tokens_2RYE[:, 0]
    assert prefill_YE.tolist() == [[1, 2, 0, 0, 0], [1, 1, 2, 3, 4]]
    assert decode_YE.tolist() == [[5, 100, 0, 0, 0], [0, 10, 20, 30, 40]]
    assert [load.tolist() for load in layers[0].load.tokens_2E] == [[1, 2], [5, 100]]


def test_since_subtracts_and_a_report_does_not_change(stats, watching):
    layer = Layer([1, 2])
    writer = watching(0, {0: layer})
    nothing = stats.report()
    writer.step()
    first = stats.report()
    layer.call([4, 3])
    for _ in range(3):
        writer.step()
    second = stats.report()
    assert first.tokens_RYE[0].tolist() == [[1, 2]]
    assert second.since(first).tokens_RYE[0].tolist() == [[4, 3]]
    assert second.since(first).calls == 3
    assert np.array_equal(first.since(nothing).tokens_RYE, first.tokens_RYE)


def test_a_model_that_replaces_another_starts_at_zero(stats, watching):
    first = Layer([6, 6])
    writer = watching(0, {0: first})
    writer.step()
    second = Layer([1, 2])
    writer.watch(0, 0, second, CPU)
    writer.step()
    report = stats.report()
    assert (report.tokens_RYE[0].tolist(), report.calls) == ([[1, 2]], 1)


def test_a_layer_is_not_kept_alive(stats, watching):
    layer = Layer([1])
    writer, gone = watching(0, {0: layer}), weakref.ref(layer)
    writer.step()
    del layer
    writer.step()
    assert gone() is None
    assert stats.report().calls == 1


def test_layers_with_other_numbers_of_experts(stats, watching):
    """More slots than the first layer has, fewer, none; of slots with the same expert, the tokens are added up."""
    layers = {0: Layer([1, 2]), 2: Layer([1, 2, 3, 4, 5]), 3: Layer([7]), 5: Layer([]), 6: Layer([1, 1])}
    layers[4] = Layer([1, 2, 4], experts=(2, 0, 2))
    writer = watching(1, layers)
    for _ in range(2):
        layers[2].call([0, 0, 0, 0, 9])
        writer.step()
    report = stats.report()
    assert report.layers == (0, 2, 3, 4, 5, 6)
    assert report.tokens_RYE[1].tolist() == [
        [1, 2, 0, 0, 0],
        [1, 2, 3, 4, 23],
        [7, 0, 0, 0, 0],
        [2, 0, 5, 0, 0],
        [0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
    ]


def test_a_layer_that_comes_late_joins_the_others(stats, watching):
    """A draft model may be loaded after the first step; one that has a number of the model's takes its place."""
    layers = {0: Layer([1, 2]), 1: Layer([3, 4])}
    writer = watching(0, layers)
    instead, late = Layer([5, 5]), Layer([7, 0])
    writer.watch(0, 1, instead, CPU)
    writer.step()
    writer.watch(0, 2, late, CPU)
    layers[0].call([1, 0])
    writer.step()
    report = stats.report()
    assert (report.layers, report.calls) == ((0, 1, 2), 2)
    assert report.tokens_RYE[0].tolist() == [[2, 2], [5, 5], [7, 0]]


def test_more_layers_than_there_are_lines(stats, watching):
    """Models that are built one after the other, and never run, take no more room than one."""
    writer = watching(0, {})
    layers = [Layer([1]) for _ in range(2 * MAX_LAYERS)]
    for layer in layers:
        writer.watch(0, 3, layer, CPU)
    writer.step()
    assert stats.report().tokens_RYE.sum() == 1


def test_a_report_has_every_step_that_has_ended(stats, watching):
    """However soon after it one asks."""
    layer = Layer([0])
    writer = watching(0, {0: layer})
    for step in range(1, 6):
        layer.call([step])
        writer.step()
        report = stats.report()
        assert (report.calls, report.tokens_RYE.sum()) == (step, step * (step + 1) // 2)


def test_what_nobody_asks_for_is_written_down_too(stats, watching, monkeypatch):
    """A worker may be killed, and its load is wanted nevertheless."""
    monkeypatch.setattr(stats_writer, "EVERY_S", 0.01)
    layer = Layer([3])
    writer = watching(0, {0: layer})
    writer.step()
    deadline = time.monotonic() + PATIENCE_S
    while not stats._ranks["tokens"].any() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stats._ranks["tokens"].sum() == 3


def test_a_worker_that_is_gone_is_not_waited_for(stats, caplog):
    process = forked_context().Process(target=step_and_die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert stats._ranks["writer"][0] == process.pid
    assert stats.report().tokens_RYE[0].tolist() == [[4, 2]]
    assert not caplog.messages


def step_and_die() -> None:
    layer, writer = Layer([4, 2]), StatsWriter()
    writer.watch(0, 0, layer, CPU)
    writer.step()
    while not rank_row(0)["steps"]:  # written last
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_does_not_answer_is_told_of(stats, monkeypatch, caplog):
    monkeypatch.setattr(load_report, "PATIENCE_S", 0.05)
    stats._ranks["writer"][1] = os.getpid()
    assert stats.report().calls == 0
    (line,) = caplog.messages
    assert line.startswith("rank 1 is busy: its part of the load report is older")


def test_a_closed_writer_has_written_all_and_counts_no_more(stats, watching):
    layer = Layer([1])
    writer = watching(0, {0: layer})
    writer.step()
    writer.close()
    assert stats.report().tokens_RYE.sum() == 1
    layer.call([1])
    writer.step()
    assert stats.report().tokens_RYE.sum() == 1


@pytest.mark.parametrize("served", [0, 3], ids=["at the start", "after a sleep"])
def test_what_a_warm_up_counts_is_no_load_and_what_was_counted_before_stays(stats, watching, served):
    layers = {0: Layer([0, 0]), 2: Layer([0, 0])}
    writer = watching(0, layers)
    for _ in range(served):
        layers[0].call([1, 0])
        writer.step()
    before = stats.report()
    with writer.forgetting():
        layers[0].call([7, 0], passes=3, rounds=2)
        layers[2].call([1, 1])
        writer.step()
    if served:
        assert (stats.report().calls, stats.report().tokens_RYE.tolist()) == (3, before.tokens_RYE.tolist())
    layers[0].call([0, 2])
    writer.step()
    report = stats.report()
    assert report.layers == (0, 2)
    assert report.tokens_RYE[0].tolist() == [[served, 2], [0, 0]]
    assert (report.calls, report.passes, report.rounds) == (served + 1, 1, 1)


def test_a_step_is_three_operations_whatever_the_layers(stats, watching):
    """What it costs the serving thread, which no test can time."""

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    for count in (1, 58):
        layers = {number: Layer([1] * 256) for number in range(count)}
        writer = watching(0, layers)
        writer.step()
        seen: list[str] = []
        with (
            Log(),
            mock.patch.object(LayerStats, "rows_on", side_effect=AssertionError("Python for a layer")),
        ):
            writer.step()
        assert seen == ["sum", "copy_", "copy_"]


def test_copies_that_are_half_there_are_not_taken():
    """A device copies while the host looks on: what it shows is a whole step, or nothing."""
    counters = Counters(CPU, 2)
    allocated = [counters.allocate(2)[1] for _ in range(2)]
    for step in range(1, 4):
        for rows_2L in allocated:
            rows_2L += step
        counters.step()
    assert counters.arrived().step == 3
    counters.steps += 1  # asked for, and nothing of it has come
    assert counters.arrived().step == 3
    counters._host_sums_SN[4, :4] = 20  # its sums
    assert counters.arrived().step == 3
    counters._host_rows_NW[:3] = 10  # three lines of four
    assert counters.arrived() is None
    counters._host_rows_NW[3] = 10
    assert counters.arrived().step == 4


def test_steps_without_tokens():
    counters = Counters(CPU, 1)
    counters.allocate(1)
    assert counters.arrived().step == 0
    for _ in range(2 * STEPS):
        counters.step()
    shown = counters.arrived()
    assert (shown.step, shown.oldest) == (2 * STEPS, STEPS + 1)


def report(tokens_RYE, layers):
    tokens_2RYE = np.array([tokens_RYE, np.zeros_like(tokens_RYE)])
    return LoadReport(layers, tokens_2RYE, 1, 1, 1, {}, np.ones(len(layers)), top_k=2)


def test_imbalance_is_the_busiest_rank_over_the_mean():
    two = report([[[3, 0], [0, 0], [2, 0]], [[0, 1], [0, 0], [0, 2]]], (1, 2, 3))
    assert two.imbalance_Y.tolist() == [1.5, 1.0, 1.0]
    assert report(np.zeros((2, 0, 0), dtype=np.int64), ()).imbalance_Y.size == 0


def test_step_imbalance_is_taken_step_by_step(stats, watching):
    """Two ranks that are busy in turn are level over the run, and twice as busy as need be in each step."""
    layers = [Layer([0]), Layer([0])]
    writers = [watching(rank, {0: layer}) for rank, layer in enumerate(layers)]
    for step in range(2 * STEPS):
        for rank, (layer, writer) in enumerate(zip(layers, writers, strict=True)):
            layer.call([3 * ((step + rank) % 2)])
            writer.step()
    report = stats.report()
    assert report.imbalance_Y == pytest.approx([1.0], abs=0.01)
    assert report.step_imbalance_Y == pytest.approx([2.0])


def test_steps_of_a_rank_that_is_behind_are_left_out(stats, watching):
    layers = [Layer([2]), Layer([1])]
    first, second = (watching(rank, {0: layer}) for rank, layer in enumerate(layers))
    first.step()
    assert stats.report().step_imbalance_Y.tolist() == [1.0]
    second.step()
    layers[0].call([7])
    first.step()
    assert stats.report().step_imbalance_Y == pytest.approx([2 / 1.5])


def test_loads_add_up_replicas_and_count_shards_once():
    """Replicas of an expert add up, layers without experts are there, and shards of an expert count once."""
    both = report([[[3, 0], [1, 1]], [[4, 1], [0, 2]]], (1, 3))
    assert both.loads_YE(4, ep_size=2).tolist() == [[0, 0], [7, 1], [0, 0], [1, 3]]
    assert both.loads_YE(4, ep_size=1).tolist() == [[0, 0], [3, 0], [0, 0], [1, 1]]


def test_the_error_of_a_worker_is_read_by_its_parent(stats):
    process = forked_context().Process(target=load_report.record_error, args=(1, "no such weight: ö"))
    process.start()
    process.join()
    assert load_report.last_error(1) == "no such weight: ö"
    assert load_report.last_error(0) is None
    # The worker's end has not taken the segment along.
    assert (Path("/dev/shm") / stats._memory.name).exists()


def test_removed_stats_leave_no_shared_memory(stats):
    path = Path("/dev/shm") / stats._memory.name
    assert path.exists()
    stats.remove()
    assert not path.exists()


def test_stats_that_systemd_removed_end_like_any_others(stats):
    (Path("/dev/shm") / stats._memory.name).unlink()
    assert stats.report().calls == 0  # what is mapped stays
    stats.remove()


def test_without_stats_nothing_is_written(monkeypatch, watching):
    monkeypatch.delenv(STATS_VARIABLE, raising=False)
    layer = Layer([1])
    watching(0, {0: layer}).step()
    assert load_report.last_error(0) is None
    assert STATS_VARIABLE not in os.environ


@pytest.mark.parametrize(("index", "experts"), [(MAX_LAYERS, 8), (0, MAX_EXPERTS + 1)])
def test_layers_and_experts_beyond_the_segment_are_refused(index, experts):
    with pytest.raises(EPError, match=f"{MAX_LAYERS} layers of {MAX_EXPERTS} experts"):
        load_report.check_room(index, experts)
