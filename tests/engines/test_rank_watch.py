"""Which rank is named when an engine stalls, and that a rank which is stuck ends by itself."""

from __future__ import annotations

import re
import threading

import pytest

from epbackend.engines.lmdeploy.workers.pulse import Pulse
from epbackend.engines.lmdeploy.workers.rank_watch import WAITS, RankState, judge
from tests.helpers.patience import PATIENCE_S

TIMEOUT_S = 6.0
DECODE = "a decode step, at MoE layer 1"
WAITING = RankState(0, still_s=8, where=DECODE, place=f"{WAITS}all_reduce (default/linear.py:57)", progress=1)
TIMED_OUT = RankState(0, ended=True, exit_code=1, said="RuntimeError: Timed out waiting 6000ms for recv")


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([RankState(0), RankState(1)], None),
        ([RankState(0, still_s=5), RankState(1, silent_s=5)], None),
        (
            [WAITING, RankState(1, still_s=8, silent_s=8, stopped=True, where=DECODE)],
            "rank 1 is stopped .* decode",
        ),
        ([RankState(0), RankState(1, silent_s=8, stopped=True)], "rank 1 is stopped .* in no step"),
        ([WAITING, RankState(1, silent_s=8)], "rank 1 gives no sign of life"),
        (
            [WAITING, RankState(1, still_s=8, where=DECODE, place="stands in sleep (a.py:3)", progress=2)],
            r"rank 1 hangs: a decode step, at MoE layer 1 .* stands in sleep \(a.py:3\)",
        ),
        ([WAITING], "rank 0 waits without end: a decode step.* all_reduce"),
        # The others fail of it: with gloo at the end of their own time, or at once.
        ([TIMED_OUT, RankState(1, silent_s=6, stopped=True)], "rank 1 is stopped"),
        (
            [TIMED_OUT, RankState(1, ended=True, exit_code=-9, where=DECODE)],
            "rank 1 was killed by SIGKILL, in a decode",
        ),
        (
            [RankState(0), RankState(1, ended=True, exit_code=-40)],
            "rank 1 was killed by signal 40, in no step",
        ),
        ([TIMED_OUT, RankState(1, ended=True)], "rank 1 ended without a word"),
        # An import that fails, or a program that starts ranks where a rank imports it.
        (
            [RankState(0, ended=True, exit_code=1)],
            "rank 0 ended with exit code 1 before it started: .* if __name__",
        ),
        ([RankState(0, 7, ended=True, exit_code=1)], "rank 0 ended with exit code 1$"),
        ([TIMED_OUT, RankState(1)], "rank 0 failed: RuntimeError: Timed out"),
        # With dp > 1 the other engines' ranks end when they are closed, and that is no failure of this one.
        ([RankState(0), RankState(1, own=False, ended=True)], None),
        ([WAITING, RankState(1, own=False, silent_s=8, stopped=True)], "rank 1 is stopped"),
    ],
)
def test_the_rank_at_fault_is_named(ranks, said):
    text = judge(ranks, TIMEOUT_S)
    assert text is None if said is None else re.search(said, text or ""), text


def test_a_rank_that_is_stuck_tells_where_it_stands_and_ends(monkeypatch, caplog):
    ended = threading.Event()
    monkeypatch.setattr("epbackend.engines.lmdeploy.workers.pulse.LAST_RESORT_S", 0.1)
    pulse = Pulse(timeout_s=0.1, end=ended.set)
    pulse.start(3)
    with pulse.step("prefill", asleep=lambda: False):
        pulse.at_layer(2)
        assert _hang(ended)
    pulse.close()
    assert "rank 3 is stuck: a prefill step, at MoE layer 2 has not moved on" in caplog.text
    assert "_hang (engines/test_rank_watch.py" in caplog.text or "wait (" in caplog.text


def test_a_rank_that_sleeps_inside_a_step_is_left_alone():
    looks, slept = iter(range(4)), threading.Event()

    def asleep() -> bool:
        if next(looks, None) is None:
            slept.set()
        return True

    pulse = Pulse(timeout_s=0.01, end=lambda: pytest.fail("it sleeps"))
    pulse.start(0)
    with pulse.step("decode", asleep):
        assert slept.wait(PATIENCE_S)
    pulse.close()


def _hang(until: threading.Event) -> bool:
    return until.wait(PATIENCE_S)
