"""What a GPU never ends is reported with layer and rank, and ends the process.

There is no GPU here: the marks are those of a gloo collective that is not waited for, as NCCL's is not.
"""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from epbackend.dispatch import running_time, watchdog
from epbackend.dispatch.context import GroupContext
from epbackend.dispatch.running_time import RunningTime
from epbackend.dispatch.watchdog import Watchdog, unresponsive_ranks
from tests.helpers.patience import PATIENCE_S
from tests.helpers.ranks import forking, free_port

SIZE, VICTIM, TIMEOUT_S = 3, 1, 2.0


def wait_for(condition) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.fixture
def watch_with():
    """Makes watchdogs that look often, and ends their threads."""
    made = []

    def make(who, end) -> Watchdog:
        made.append(Watchdog(who, end))
        return made[-1]

    with mock.patch.object(watchdog, "POLL_S", 0.01):
        yield make
        for each in made:
            each.close()


def test_the_oldest_overdue_mark_is_reported(caplog, watch_with):
    ended = []
    dog = watch_with(lambda: "rank 3 does not answer", lambda: ended.append(True))
    dog.add("layer 1", lambda: True, 0.05)
    dog.add("layer 2", lambda: False, 0.05)
    dog.add("layer 3", lambda: False, 0.05)
    wait_for(lambda: ended)
    (line,) = caplog.messages
    assert line.startswith("layer 2 did not end within timeout_s 0.05: rank 3 does not answer")


def test_marks_that_were_passed_are_asked_once_and_forgotten(monkeypatch, watch_with):
    now = 0.0
    clock = SimpleNamespace(monotonic=lambda: now, sleep=time.sleep)
    for module in (watchdog, running_time):
        monkeypatch.setattr(module, "time", clock)
    ended, asked, passing = [], [], []
    dog = watch_with(lambda: "", lambda: ended.append(True))
    for layer in range(5):
        if layer == 4:  # the GPU was slow, and then passes all of them
            asked.clear()
            passing.append(True)
        dog.add(f"layer {layer}", lambda layer=layer: bool(asked.append(layer) or passing), 0.1)
    now = 1.0  # the last one is overdue
    wait_for(lambda: not dog._marks)
    time.sleep(0.1)
    assert (asked, ended) == ([0, 1, 2, 3, 4], [])


def test_time_in_which_the_watch_itself_was_stopped_makes_nothing_older(monkeypatch):
    moments = iter((0.0, 1.0, 2.0, 62.0, 63.0))
    monkeypatch.setattr(running_time, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    running = RunningTime()
    for _ in range(4):
        running.look()
    pause = 60.0 - running_time.LOOK_MOST_S
    ages = {since: running.age_s(since) for since in (0.0, 2.0, 61.0, 62.5)}
    assert ages == {0.0: 63.0 - pause, 2.0: 61.0 - pause, 61.0: 1.0, 62.5: 0.5}


def test_a_gpu_that_failed_is_not_waited_for(watch_with):
    ended = []

    def failed() -> bool:
        raise RuntimeError("CUDA error: unspecified launch failure")

    dog = watch_with(lambda: "", lambda: ended.append(True))
    dog.add("layer 1", failed, 0.05)
    wait_for(lambda: not dog._marks)
    assert not ended


def test_a_host_that_waits_is_watched(caplog, monkeypatch, watch_with):
    """What it waits for may never come, and no mark can follow it."""
    ended = []
    dog = watch_with(lambda: "rank 3 does not answer", lambda: ended.append(True))
    monkeypatch.setattr(Watchdog, "of", lambda group: dog)
    with GroupContext() as context:
        with context.waiting("sizes of MoE layer 1", None, 60):
            pass
        with context.waiting("sizes of MoE layer 2", None, 0.05):
            wait_for(lambda: ended)
    (line,) = caplog.messages
    assert line.startswith("sizes of MoE layer 2 did not end within timeout_s 0.05: rank 3 does not answer")


def test_many_layers_leave_one_mark(monkeypatch):
    added = []
    dog = SimpleNamespace(add=lambda *mark: added.append(mark), close=lambda: None)
    monkeypatch.setattr(Watchdog, "of", lambda group: dog)
    event = SimpleNamespace(record=lambda: None, query=lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with GroupContext() as context:
        with context.one_mark():
            for layer in range(58):
                context.watch(f"decode of MoE layer {layer}", dist.group, 1.0)
        context.watch("a step of the engine", dist.group, 1.0)
    assert added == [("a step of the engine", event.query, 1.0)]


def serve(rank: int, port: int, lines) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=SIZE)
    dist.barrier()
    if rank == VICTIM:
        os.kill(os.getpid(), signal.SIGSTOP)
    rows, answer = torch.ones(SIZE), torch.empty(SIZE)
    work = dist.all_to_all_single(answer, rows, async_op=True)

    def who() -> str:
        found = unresponsive_ranks(dist.group.WORLD, 15.0)
        lines.put((rank, found))
        return found

    dog = Watchdog(who, lambda: os.kill(os.getpid(), signal.SIGABRT))
    dog.add("decode of MoE layer 7", work.is_completed, TIMEOUT_S)
    time.sleep(PATIENCE_S)  # as a host does that waits for its GPU


def test_a_stopped_rank_is_named_and_the_others_end():
    context = forking()
    lines, port = context.SimpleQueue(), free_port()  # its `put` returns when the line is sent
    ranks = [context.Process(target=serve, args=(rank, port, lines), daemon=True) for rank in range(SIZE)]
    for process in ranks:
        process.start()
    try:
        alive = {0, 1, 2} - {VICTIM}
        for rank in alive:
            ranks[rank].join(PATIENCE_S)
            assert ranks[rank].exitcode == -signal.SIGABRT
        heard = dict(lines.get() for _ in alive)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert heard == dict.fromkeys(alive, f"rank {VICTIM} does not answer")
