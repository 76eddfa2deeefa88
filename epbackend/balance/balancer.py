"""The parent's part: a thread that watches the loads, asks the planner, and has the ranks move experts.

It serves no request: the loads are those that the load report keeps anyway, planning is another process's work, and the
ranks stage in threads of their own. What goes wrong is logged and reported, and serving goes on with the placement that
is in use.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from epbackend.balance.board import Board
from epbackend.balance.decision import Policy, Proposal
from epbackend.balance.moves import Migration, changes, parts, route, with_layer
from epbackend.balance.planner import Planner
from epbackend.balance.recording import WindowsFile, of_phases
from epbackend.balance.speed import SpeedWatch
from epbackend.errors import EPError
from epbackend.names import BOTH
from epbackend.placement.placement import Layout, Placement, with_speeds

POLL_S = 0.02
START_POLL_S = 0.5
GRACE_S = 2.0
"""Ranks that wait for one another fail on their own after a migration's timeout; this much later they are asked to."""

logger = logging.getLogger("epbackend")


@dataclass(frozen=True)
class Options:
    """How often, how much, how carefully."""

    window_steps: int
    interval_s: float
    policy: Callable[[int], Policy]
    """By the bytes of one expert, which the ranks tell once they have it."""
    staging_bytes: int
    checksums: str
    """See `Migration.checksums`."""
    timeout_s: float
    speed_margin: float | None = None
    """By how much measured speeds of ranks must leave those in use; None: they are not measured."""
    levels: bool = False
    """Whether a phase splits by `level`, which heeds speeds where no expert moves too."""
    phases: str = BOTH
    """Whose loads are planned for: one of PHASES, or BOTH."""


@dataclass(frozen=True)
class Reading:
    """What has been counted since the start."""

    steps: int
    tokens_2RYE: np.ndarray
    """Of every layer of the model in each of PHASES, int64."""


@dataclass(frozen=True)
class BalanceReport:
    """What balancing has done so far."""

    windows: int = 0
    """Windows of loads that were looked at."""
    plans: int = 0
    """New placements that the planner found worth it."""
    migrations: int = 0
    """Changes of one layer that flipped between two steps."""
    failed: int = 0
    """Migrations that changed nothing."""
    slots_moved: int = 0
    bytes_moved: int = 0
    """Between ranks."""
    longest_flip_ms: float = 0.0
    """The most that any migration has held a rank up between two steps."""
    number: int = 0
    """Of the last migration."""
    moving: bool = False
    """Whether one is under way."""
    imbalance_before: float | None = None
    """Of the last plan, as its planner expected it."""
    imbalance_after: float | None = None
    planner_age_s: float = 0.0
    """Since its process was started."""
    planner_restarts: int = 0
    rank_speed: tuple[float, ...] = ()
    """Speeds in use, as parts of the fastest rank's; empty: all alike."""
    last_error: str | None = None


class Balancer:
    """Runs from its making until `close`."""

    def __init__(
        self,
        board: Board,
        read: Callable[[], Reading],
        options: Options,
        placement: Placement,
        tell: Callable[[BalanceReport], None] = lambda report: None,
        record: WindowsFile | None = None,
    ) -> None:
        """`placement`: where the experts live at the start. `tell` gets each report that differs from the last, and
        `record` each window that was looked at.
        """
        self._board, self._read, self._options, self._tell = board, read, options, tell
        self._placement, self._record = placement, record
        self._report = BalanceReport(rank_speed=placement.rank_speed)
        self._number = self._connection = self._expert_bytes = 0
        self._planner: Planner | None = None
        self._stop = threading.Event()
        self._looks = _Looks()
        self._thread = threading.Thread(target=self._run, name="epbackend balance", daemon=True)
        self._thread.start()

    def report(self) -> BalanceReport:
        planner = self._planner
        if planner is None:
            return self._report
        return replace(self._report, planner_age_s=planner.age_s, planner_restarts=planner.restarts)

    @property
    def placement(self) -> Placement:
        """Where the experts live now."""
        return self._placement

    @property
    def planner_pid(self) -> int | None:
        return self._planner.pid if self._planner else None

    def rebalance(self, timeout_s: float) -> bool:
        """Looks at once, whatever the interval and the window are; the threshold and the budgets hold.

        Returns whether that look, and what it moved, was over within `timeout_s`.

        Raises:
            EPError: balancing has ended.
        """
        return self._looks.ask(timeout_s)

    def close(self) -> None:
        """Returns when the thread has ended; a migration that is under way is left to the ranks."""
        self._stop.set()
        self._looks.end()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._board.close()

    def _run(self) -> None:
        options = self._options
        try:
            # Before the ranks serve: what it takes to start it would be taken from them.
            self._planner = Planner(self._placement, options.timeout_s, self._stop)
            self._note()
            try:
                while not (length := self._board.expert_bytes):
                    if self._stop.wait(min(options.interval_s, START_POLL_S)):
                        return
                self._expert_bytes, self._planner.policy = length, options.policy(length)
                self._watch(self._planner)
            finally:
                self._planner.close()
        except Exception as error:
            if not self._stop.is_set():
                logger.exception("balancing has ended; the engine goes on as it is")
                self._fails(error)
        finally:
            self._looks.end()
            if self._record is not None:
                self._record.save()

    def _watch(self, planner: Planner) -> None:
        last, speeds = self._read(), self._speeds()
        while True:
            asked = self._looks.wait(self._options.interval_s)
            if self._stop.is_set():
                self._record_up_to(self._read())
                return
            now = self._read()
            if now.steps - last.steps < (1 if asked else self._options.window_steps):
                continue
            self._record_up_to(now)
            window_2RYE, last = now.tokens_2RYE - last.tokens_2RYE, now
            window_RYE, planned_RYE = window_2RYE.sum(axis=0), of_phases(window_2RYE, self._options.phases)
            if not planned_RYE.any():
                continue
            self._note(windows=self._report.windows + 1)
            try:
                if speeds is not None and speeds.observe(self._board.work_R44):
                    self._placement = with_speeds(self._placement, speeds.rank_speed)
                    planner.accept(self._placement)
                    self._tell_speeds(window_RYE.sum(axis=2))
                proposal = planner.propose(planned_RYE.sum(axis=0))
                if proposal is None:
                    continue
                self._follow(proposal, window_RYE.sum(axis=2))
                planner.accept(self._placement)
            except EPError as error:
                logger.warning("balance: %s", error)
                self._fails(error)
            last = self._read()  # what was counted on the way belongs to no placement

    def _record_up_to(self, now: Reading) -> None:
        if self._record is not None:
            self._record.add(now.tokens_2RYE.sum(axis=1))

    def _speeds(self) -> SpeedWatch | None:
        margin = self._options.speed_margin
        if margin is None:
            return None
        return SpeedWatch(self._board.work_R44, margin, self._placement.rank_speed)

    def _tell_speeds(self, tokens_RY: np.ndarray) -> None:
        """Other speeds are in use from now on. Ranks that level by them learn it layer by layer, without any move."""
        speeds = self._placement.rank_speed
        self._note(rank_speed=speeds)
        logger.info("balance: the ranks' speeds are now %s", ", ".join(map(str, speeds)) or "alike")
        if self._options.levels:
            for layer in np.flatnonzero(tokens_RY.any(axis=0)).tolist():
                self._change(layer, self._placement.layers[layer], tokens_RY)

    def _follow(self, proposal: Proposal, tokens_RY: np.ndarray) -> None:
        """Layer by layer. The placement that is then in use is in whole or in part that of the proposal."""
        self._note(
            plans=self._report.plans + 1,
            imbalance_before=proposal.imbalance_before,
            imbalance_after=proposal.imbalance_after,
        )
        logger.info(
            "balance: plan %d moves %d slots of %d layers (busiest rank %.2f, then %.2f): %s",
            self._report.plans,
            proposal.moved_slots,
            len(proposal.layers),
            proposal.imbalance_before,
            proposal.imbalance_after,
            proposal.reason,
        )
        for layer in proposal.layers:
            self._change(layer, proposal.placement.layers[layer], tokens_RY)

    def _change(self, layer: int, after: Layout, tokens_RY: np.ndarray) -> None:
        """In as many migrations as it takes, one where nothing moves; none once the balancer is closed."""
        most = self._options.staging_bytes // self._expert_bytes
        try:
            for layout in parts(self._placement.layers[layer], after, most) or [after]:
                self._migrate(layer, layout, tokens_RY[:, layer])
        except EPError as error:
            if self._stop.is_set():
                return
            logger.warning("balance: layer %d stays as it is: %s", layer, error)
            self._note(failed=self._report.failed + 1)
            self._fails(error)
            self._connection += 1

    def _migrate(self, layer: int, after: Layout, tokens_R: np.ndarray) -> None:
        """Raises EPError where the layer has stayed as it was."""
        began, before, options = time.monotonic(), self._placement.layers[layer], self._options
        moves = route(before, after, tokens_R, self._placement.node_size)
        self._number += 1
        migration = Migration(
            self._number,
            layer,
            before,
            after,
            moves,
            self._connection,
            options.checksums,
            options.timeout_s,
            self._placement.rank_speed,
        )
        self._board.publish(migration)
        self._note(moving=True)
        try:
            self._await_end(migration)
        finally:
            self._note(moving=False)
        if not self._board.flipped(migration.number):
            raise EPError("; ".join(self._board.errors()) or "it was given up")
        self._placement = with_layer(self._placement, layer, after)
        travelled = sum(move.source != move.target for move in moves) * self._expert_bytes
        report = self._report
        self._note(
            migrations=report.migrations + 1,
            slots_moved=report.slots_moved + len(changes(before, after)),
            bytes_moved=report.bytes_moved + travelled,
            longest_flip_ms=self._board.longest_flip_ms,
            number=migration.number,
        )
        logger.info(
            "balance: migration %d, %d slots of layer %d, %.1f MB between ranks, %.0f ms",
            migration.number,
            len(moves),
            layer,
            travelled / 1e6,
            1e3 * (time.monotonic() - began),
        )

    def _await_end(self, migration: Migration) -> None:
        """Until it has flipped on all ranks, or on none; without steps that takes as long as there are none.

        Raises:
            EPError: the balancer is closed.
        """
        number, deadline = migration.number, time.monotonic() + migration.timeout_s + GRACE_S
        cancelled = False
        while not self._board.ended(number):
            if self._stop.wait(POLL_S):
                raise EPError("the engine was closed")
            if not cancelled and time.monotonic() > deadline and not self._board.staged(number):
                silent = ", ".join(map(str, self._board.silent(number)))
                error = EPError(
                    f"migration {number}: no answer from rank {silent} in {migration.timeout_s:g} s"
                )
                logger.warning("balance: %s", error)
                self._fails(error)
                self._board.cancel(number)
                cancelled = True

    def _fails(self, error: Exception) -> None:
        self._note(last_error=str(error))

    def _note(self, **changes: Any) -> None:
        self._report = replace(self._report, **changes)
        self._tell(self.report())


class _Looks:
    """Who asks for a look, and the thread that looks; every wait for it ends with the thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked = self._begun = self._done = 0
        self._ended = False

    def ask(self, timeout_s: float) -> bool:
        """Whether a look that began after the call is over within that time. Raises EPError where there is none."""
        with self._changed:
            self._asked += 1
            number = self._asked
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or self._done >= number, timeout_s)
            if self._ended and self._done < number:
                raise EPError("balancing has ended")
            return self._done >= number

    def wait(self, timeout_s: float) -> bool:
        """The look before is over. Returns when the next begins: whether it was asked for."""
        with self._changed:
            self._done = self._begun
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or self._asked > self._done, timeout_s)
            self._begun = self._asked
            return self._begun > self._done

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
