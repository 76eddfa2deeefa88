"""The planner's process: it plans, is replaced when it ends, and is small."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event, Timer

import numpy as np
import psutil
import pytest

from epbackend.balance.decision import Policy
from epbackend.balance.planner import Planner
from epbackend.errors import EPError
from epbackend.placement.placement import Placement

pytestmark = pytest.mark.cpu
START = Placement.even(2, 8, 2, 10)
SKEWED_YE = np.array([[100, 90, 90, 80, 10, 10, 10, 10]] * 2) * 10


def started(timeout_s):
    planner = Planner(START, timeout_s, stop=Event())
    planner.policy = Policy(0.0, None, None, expert_bytes=1)
    return planner


def test_a_planner_that_is_killed_is_replaced_and_goes_on_from_the_placement_in_use():
    """It has nothing of torch, though this program may, and it ends with its connection."""
    planner = started(timeout_s=60.0)
    try:
        first = planner.propose(SKEWED_YE)
        assert first.imbalance_after < first.imbalance_before
        assert "libtorch" not in Path(f"/proc/{planner.pid}/maps").read_text()
        planner.accept(first.placement)
        os.kill(planner.pid, signal.SIGKILL)
        with pytest.raises(EPError, match="started anew: it ended"):
            planner.propose(SKEWED_YE)
        assert planner.restarts == 1
        assert planner.propose(SKEWED_YE) is None  # level already
        with pytest.raises(EPError, match="the planner failed: ConfigError"):
            planner.propose(SKEWED_YE[:1])
        with pytest.raises(EPError, match=r"the planner failed: ConfigError: .*other slots than before"):
            planner.accept(Placement.even(2, 8, 2, 12))
    finally:
        planner.close()
    assert not psutil.pid_exists(planner.pid)


def test_a_planner_that_is_stopped_is_replaced_while_its_answer_is_awaited(monkeypatch):
    """However long it might take to answer; a stopped parent does not count the time in which it is stopped too."""
    monkeypatch.setattr("epbackend.balance.planner.STOPPED_S", 0.5)
    planner = started(timeout_s=3600.0)
    try:
        stopped = planner.pid
        os.kill(stopped, signal.SIGSTOP)
        with pytest.raises(EPError, match="started anew: it was stopped"):
            planner.propose(SKEWED_YE)
        assert (planner.restarts, psutil.pid_exists(stopped)) == (1, False)
    finally:
        planner.close()


@pytest.mark.slow
def test_a_planner_that_waits_for_a_core_is_not_replaced(monkeypatch):
    """It shares one with a process that leaves it next to nothing, for longer than it may take."""
    monkeypatch.setattr("epbackend.balance.planner.START_S", 15.0)
    core = {min(os.sched_getaffinity(0))}
    hog = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    planner = started(timeout_s=1.0)
    try:
        for process in (hog, planner):
            os.sched_setaffinity(process.pid, core)
        os.sched_setscheduler(planner.pid, os.SCHED_IDLE, os.sched_param(0))
        Timer(20.0, hog.kill).start()
        assert planner.propose(SKEWED_YE) is not None
        assert hog.poll() is not None, "it was not kept from its core"
        assert planner.restarts == 0
    finally:
        planner.close()
        hog.kill()
        hog.wait()


def test_a_planner_that_hangs_has_the_time_to_compile_only_once(monkeypatch):
    monkeypatch.setattr("epbackend.balance.planner.START_S", 3600.0)
    planner = started(timeout_s=0.5)
    try:
        assert planner.propose(SKEWED_YE) is not None
        os.kill(planner.pid, signal.SIGSTOP)  # the shorter of the two limits
        with pytest.raises(EPError, match=r"started anew: it did not answer within 0\.5 s"):
            planner.propose(SKEWED_YE)
    finally:
        planner.close()
