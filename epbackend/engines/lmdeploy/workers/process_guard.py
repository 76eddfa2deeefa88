"""Ends a process of an engine with its parent or on the parent's order, together with what it started.

Ctrl-C, a terminal that is closed, systemd's KillMode=control-group and `kill -- -PGID` send a signal to every process
at once. Only the first process decides what follows: a server lets requests finish, for which it needs its ranks. So
those behind it ignore such signals, and have one of their own for the order.

A rank that waits in a collective runs no Python signal handler, so a plain worker would outlive its parent and ignore
the order. The guard is a thread: collectives release the interpreter lock. Without this, Ray's agents would stay for a
minute after their engine.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

GRACE_S = 2.0
"""Time for a process to end by itself after ENDING."""
ENDING = signal.SIGUSR2
"""By which a parent ends a process, see `ended_by_us`."""
TO_ALL = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What may come to every process at once, and ends the first of them."""

STOPPED, ENDED = ("T", "t"), ("Z", "X", "")
"""States of a process, as /proc has them."""

_guarded = False
"""Whether this is a process behind the first."""


def guard_process(in_its_own_time: bool = False) -> None:
    """Watches over the calling process, started by multiprocessing, until it ends.

    It ends at once where its parent does, and within GRACE_S after ENDING unless it is to take its own time. Signals
    that may come to every process at once it ignores. Call it in the main thread.
    """
    # A progress bar would make a lock that processes share, which is left over when this one ends at once.
    tqdm.set_lock(threading.RLock())
    for number in TO_ALL:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(ENDING, lambda *_: sys.exit(0))
    global _guarded
    _guarded = True
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    # The interpreter writes each signal's number here from its C handler, whatever the main thread is doing.
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(
        target=_guard, args=(reader, writer, in_its_own_time), name="epbackend-guard", daemon=True
    ).start()


@contextlib.contextmanager
def started_heed_signals() -> Iterator[None]:
    """Programs that this process starts meanwhile heed SIGTERM; they would inherit that it is ignored."""
    ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL) if ours else None
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)


def ending_signals() -> tuple[signal.Signals, ...]:
    """By which a server in this process ends; a hangup is none under `nohup`."""
    if _guarded:
        return (ENDING,)
    return tuple(each for each in TO_ALL if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN)


def signal_name(number: int) -> str:
    """As SIGKILL; the number alone for a real-time signal, most of which have no name."""
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def ended_by_us(child: Any) -> None:
    """Has `terminate()` of a process of multiprocessing, which runs `guard_process`, send it ENDING.

    So it does at Python's own exit, which asks the object below.
    """
    child._popen.terminate = functools.partial(child._popen._send_signal, ENDING)


def keep_tracker() -> None:
    """Starts Python's resource tracker, which removes the shared memory of killed processes, so that it outlives a
    terminal that is closed.

    It ignores SIGINT and SIGTERM by itself. What is blocked here stays so in what is started here.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGQUIT))
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def process_state(process: int) -> str:
    """The letter in /proc; an empty text where there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def descendants(pid: int) -> list[psutil.Process]:
    """The processes that this one started, and those that they started; none where it has ended."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """Kills those that still run."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def end_at_once(exit_code: int) -> None:
    """Ends this process and all that it started. Shared memory is removed by the tracker, which ends last."""
    tracker = getattr(resource_tracker._resource_tracker, "_pid", None)
    kill_all(each for each in descendants(os.getpid()) if each.pid != tracker)
    os._exit(exit_code)


def kill_at_exit(child: BaseProcess) -> None:
    """Has this process kill a child that it has not ended, and all that this started, where it ends itself.

    Python would wait for the child; what is ended in order is so before.
    """
    Finalize(None, _kill_tree, args=(child,), exitpriority=0)


def _kill_tree(child: BaseProcess) -> None:
    with contextlib.suppress(ValueError):  # it was ended, and closed
        if child.is_alive():
            assert child.pid is not None
            of_child = descendants(child.pid)
            child.kill()
            kill_all(of_child)


def _guard(signals: socket.socket, _keep_open: socket.socket, in_its_own_time: bool) -> None:
    parent = multiprocessing.parent_process()
    watched: list[socket.socket | int] = [signals]
    if parent is not None:
        watched.append(parent.sentinel)
    while True:
        ready = wait(watched)
        if ready != [signals]:
            end_at_once(1)
        if ENDING in signals.recv(64) and not in_its_own_time:
            time.sleep(GRACE_S)
            end_at_once(0)
