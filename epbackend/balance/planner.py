"""The planner in a process of its own: planning takes a core for a while, and no rank or scheduler gives it one.

A planner that ends, is stopped, or does not answer in time, is replaced; the new one starts from the placement in use.
It is not made by `multiprocessing`, which would have it import the user's program, and with that torch and LMDeploy.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Event
from typing import Any

import numpy as np
import psutil

from epbackend.balance.decision import Policy, Proposal, Rebalancer
from epbackend.errors import EPError
from epbackend.placement.placement import Placement

logger = logging.getLogger("epbackend")

START_S = 60.0
"""A new process imports and compiles before its first proposal."""
STOPPED_S = 5.0
"""For so long its process may be stopped (SIGSTOP, a debugger) while an answer is awaited."""
NICE = 10
"""Beside ranks that use every core its process gets a tenth of one."""
POLL_S = 0.1


class Planner:
    """The parent's end of the process. One caller at a time."""

    policy: Policy
    """By which it plans: to be set before the first question. Its process needs time to start, so make it before."""

    def __init__(self, placement: Placement, timeout_s: float, stop: Event) -> None:
        """`timeout_s` for an answer, the first ones START_S more, not counting waits for a core; `stop` ends a wait."""
        self._placement, self._timeout_s, self._stop = placement, timeout_s, stop
        self.restarts = 0
        self.pid: int | None = None
        # What its process has had: the placement, and the time to compile.
        self._told, self._compiled = False, False
        self._start()

    @property
    def age_s(self) -> float:
        """Seconds since its process was started."""
        return time.monotonic() - self._started_at

    def propose(self, tokens_YE: np.ndarray) -> Proposal | None:
        """A placement that pays by the windows seen so far and this one.

        Raises:
            EPError: the process ended, stuck or refused; it has been replaced where it had to be.
        """
        answer = self._ask("propose", tokens_YE)
        self._compiled = self._compiled or answer is not None
        return answer

    def accept(self, placement: Placement) -> None:
        """The placement in use from now on.

        Raises:
            EPError: as for `propose`.
        """
        self._placement = placement
        self._ask("accept", placement)

    def close(self) -> None:
        self._connection.close()
        self._process.kill()  # it holds nothing that would have to be saved, and may be starting or planning
        self._process.wait()

    def _ask(self, what: str, value: Any) -> Any:
        answer = self._answer(what, value)
        if isinstance(answer, str):
            raise EPError(f"the planner failed: {answer}")
        return answer

    def _answer(self, what: str, value: Any) -> Any:
        try:
            if not self._told:
                self._connection.send((self._placement, self.policy))
                self._told = True
            self._connection.send((what, value))
            self._await_answer()
            return self._connection.recv()
        except (OSError, EOFError, EPError) as error:
            if self._stop.is_set():
                raise EPError("the engine was closed") from error
            self.close()
            reason = str(error) if isinstance(error, EPError) else "it ended"
            self._start()
            self.restarts += 1
            raise EPError(f"the planner was started anew: {reason}") from error

    def _await_answer(self) -> None:
        """Raises EPError where there is none in time."""
        patience_s = self._timeout_s + (0 if self._compiled else START_S)
        spent_s, stopped_s = 0.0, 0.0
        status, computed_s = self._look()
        while not self._connection.poll(POLL_S):
            if self._stop.is_set():
                raise EPError("the engine was closed")
            before_s = computed_s
            status, computed_s = self._look()
            # One that waits for a core is not stuck: beside ranks that use every core a new one would fare no better.
            # Looks are counted, because this process may have been stopped as well, as by Ctrl-Z.
            spent_s += computed_s - before_s if status == psutil.STATUS_RUNNING else POLL_S
            if spent_s > patience_s:
                raise EPError(f"it did not answer within {patience_s:g} s")
            stopped = status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
            stopped_s = stopped_s + POLL_S if stopped else 0.0
            if stopped_s > STOPPED_S:
                raise EPError("it was stopped (SIGSTOP or a debugger)")

    def _look(self) -> tuple[str, float]:
        """(status, processor time in seconds) of its process."""
        with contextlib.suppress(psutil.NoSuchProcess):
            times = self._seen.cpu_times()
            return self._seen.status(), times.user + times.system
        return psutil.STATUS_DEAD, 0.0

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; from epbackend.balance.planner import main; "
            f"main({theirs.fileno()})"
        )
        self._process = subprocess.Popen([sys.executable, "-c", program], pass_fds=[theirs.fileno()])
        theirs.close()
        self._told, self._compiled = False, False
        self.pid, self._started_at = self._process.pid, time.monotonic()
        self._seen = psutil.Process(self.pid)


def main(file: int) -> None:
    """The process: answers at the other end of the connection until the parent closes it, or ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they may come to all: the parent decides
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICE)
    connection = Connection(file)
    _plan_once()
    with contextlib.suppress(EOFError, OSError):
        rebalancer = Rebalancer(*connection.recv())
        while True:
            what, value = connection.recv()
            answer: Any = None
            try:
                if what == "accept":
                    rebalancer.accept(value)
                else:
                    rebalancer.observe(value)
                    answer = rebalancer.propose()
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            connection.send(answer)


def _plan_once() -> None:
    """Imports and compiles what planning needs: a second of processor time, a quarter of a minute the first time."""
    rebalancer = Rebalancer(Placement.even(1, 4, 2, 6), Policy(0.0, None, None, expert_bytes=1))
    rebalancer.observe(np.array([[5, 2, 1, 1]]))
    rebalancer.propose()
