"""Ends a process of an engine with its parent or on SIGTERM, together with what it started.

A rank that waits in a collective runs no Python signal handler, so a plain worker would outlive its parent and ignore
SIGTERM. The guard is a thread: collectives release the interpreter lock. Ray's agents would stay for a minute after
their engine.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize

import psutil
from tqdm import tqdm

GRACE_S = 2.0
"""Time for a process to end by itself after SIGTERM."""


def guard_process(heed_sigterm: bool = True) -> None:
    """Watches over the calling process, started by multiprocessing, until it ends.

    It ends at once where its parent does, and within GRACE_S after SIGTERM if `heed_sigterm`. It ignores SIGINT: Ctrl-C
    reaches every process of the terminal, and the parent decides what follows. Call it in the main thread.
    """
    # A progress bar would make a lock that processes share, which is left over when this one ends at once.
    tqdm.set_lock(threading.RLock())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    # The interpreter writes each signal's number here from its C handler, whatever the main thread is doing.
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(
        target=_guard, args=(reader, writer, heed_sigterm), name="epbackend-guard", daemon=True
    ).start()


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


def _guard(signals: socket.socket, _keep_open: socket.socket, heed_sigterm: bool) -> None:
    parent = multiprocessing.parent_process()
    watched: list[socket.socket | int] = [signals]
    if parent is not None:
        watched.append(parent.sentinel)
    while True:
        ready = wait(watched)
        if ready != [signals]:
            _end(1)
        if signal.SIGTERM in signals.recv(64) and heed_sigterm:
            time.sleep(GRACE_S)
            _end(0)


def _end(exit_code: int) -> None:
    kill_all(descendants(os.getpid()))
    os._exit(exit_code)
