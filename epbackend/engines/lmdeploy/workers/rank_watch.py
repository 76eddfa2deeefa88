"""The engine's side of the watch over its ranks: which one is lost, where it stood, and why.

A rank is lost that has ended, that is stopped or gives no sign of life, or whose step does not move on for `timeout_s`.
All ranks that work with it then stand in a collective, so the one to name is found by looking at all of them.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from epbackend.balance.board import text_in
from epbackend.dispatch.running_time import RunningTime
from epbackend.engines.lmdeploy.load.report import PULSE_PHASES, last_error, rank_row
from epbackend.engines.lmdeploy.processes import GUARD
from epbackend.engines.lmdeploy.workers.process_guard import ENDED, STOPPED, process_state, signal_name

LOOK_S = 0.25
SETTLE_S = 1.0
"""After `timeout_s`, so that the ranks have told where they stand."""
WAITS = "waits for other ranks in "
"""Begins the place of a rank that is inside a collective, or awaits one."""
SILENT_S = 3.0
"""Without a sign of life for so long, a rank is the one to name when others fail."""


@dataclass(frozen=True)
class RankState:
    """What is seen of one rank from outside."""

    rank: int
    process: int = 0
    """0: it has not started, or runs on another machine."""
    own: bool = True
    """Whether it is one of the engine that looks; with dp > 1 there are others."""
    ended: bool = False
    exit_code: int | None = None
    """Of its process, negative for a signal; None where only the process's parent knows it."""
    said: str | None = None
    """The error that it left."""
    stopped: bool = False
    """Its process is in state T: SIGSTOP, or a debugger."""
    silent_s: float = 0.0
    """Since its last sign of life."""
    still_s: float = 0.0
    """Since the step that it is in last moved on; 0: in none."""
    progress: int = 0
    """How far the step has come: the MoE layer."""
    where: str = "no step"
    place: str = ""


def look_at(
    rank: int,
    running: RunningTime,
    *,
    own: bool = True,
    exit_code: Callable[[], int | None] | None = None,
) -> RankState:
    """What a rank's row of the shared statistics, where there is one, and its process show now.

    Args:
        rank: its number.
        running: the time of the thread that looks.
        own: whether it is a rank of the engine that looks.
        exit_code: of a child of this process, None while it runs: /proc calls one ended while some of its threads
            still end. Without it /proc decides.
    """
    row, said = rank_row(rank), last_error(rank)
    process = 0 if row is None else int(row["pid"])
    state = process_state(process) if process else "R"
    code = exit_code() if exit_code else None
    ended = code is not None if exit_code else state in ENDED
    if not process:
        return RankState(rank, own=own, ended=ended, exit_code=code, said=said)
    return RankState(
        rank,
        process,
        own,
        ended,
        code,
        said,
        stopped=state in STOPPED,
        silent_s=running.age_s(float(row["beat"])),
        still_s=running.age_s(float(row["moved"])) if PULSE_PHASES[int(row["phase"])] else 0.0,
        progress=int(row["layer"]),
        where=where(row),
        place=text_in(row["place"]),
    )


def where(row: Any) -> str:
    """The place that a rank's row tells, in words."""
    phase = PULSE_PHASES[int(row["phase"])]
    if not phase:
        return "no step"
    layer = f", at MoE layer {int(row['layer'])}" if row["layer"] >= 0 else ", before its first MoE layer"
    return f"a {phase} step{layer}"


def judge(ranks: Sequence[RankState], timeout_s: float, *, failed: bool = False) -> str | None:
    """Names the rank at fault, its place and the cause; None while no rank of the own engine is in trouble.

    `failed`: the engine is known to have failed, and a rank that has stopped only just now is told as well.

    >>> judge([RankState(0, still_s=9, where="a decode step"), RankState(1, silent_s=9, stopped=True)], 6)
    'rank 1 is stopped (state T: SIGSTOP or a debugger) for 9 s, in no step (timeout_s 6)'
    """
    limit = timeout_s + SETTLE_S
    late = [each for each in ranks if not each.ended and max(each.silent_s, each.still_s) > limit]
    ended = [each for each in ranks if each.ended]
    if not failed and not any(each.own for each in late + ended):
        return None
    if killed := [each for each in ended if not each.said and (each.exit_code is None or each.exit_code < 0)]:
        return _killed(min(killed, key=lambda each: each.exit_code or 0))
    # The others fail of one that does not run, some before its own time is over.
    silent = [each for each in ranks if not each.ended and each.silent_s > min(SILENT_S, timeout_s / 2)]
    if silent:
        worst = max(silent, key=lambda each: (each.stopped, each.silent_s))
        how = "is stopped (state T: SIGSTOP or a debugger)" if worst.stopped else "gives no sign of life"
        return (
            f"rank {worst.rank} {how} for {worst.silent_s:.0f} s, in {worst.where} (timeout_s {timeout_s:g})"
        )
    if told := ended or [each for each in ranks if failed and each.said]:
        return _failed(told[0])
    if not late:
        return None
    busy = [each for each in late if not each.place.startswith(WAITS)]
    worst = min(busy or late, key=lambda each: each.progress)
    return (
        f"rank {worst.rank} {'hangs' if busy else 'waits without end'}: {worst.where} has not moved on for "
        f"{worst.still_s:.0f} s (timeout_s {timeout_s:g}); it {worst.place or 'does not tell where it stands'}"
    )


def _killed(rank: RankState) -> str:
    if rank.exit_code is None:
        how = "ended without a word, as one that was killed does"
    else:
        how = f"was killed by {signal_name(-rank.exit_code)}"
    memory = rank.exit_code in (None, -signal.SIGKILL)
    remedy = "; where the system ran out of memory, lower engine.cache_gb" if memory else ""
    return f"rank {rank.rank} {how}, in {rank.where}{remedy}"


def _failed(rank: RankState) -> str:
    if rank.said:
        return f"rank {rank.rank} failed: {rank.said}"
    how = f"rank {rank.rank} ended with exit code {rank.exit_code}"
    if rank.process:
        return how
    return f"{how} before it started: where the program makes its pipeline outside {GUARD}, put it there"
