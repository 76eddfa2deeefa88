"""A worker never outlives its parent, and always heeds SIGTERM.

A rank that waits in a collective runs no Python signal handler, so that a plain worker would ignore both. The guard is
a thread: collectives release the interpreter lock.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from multiprocessing.connection import wait

GRACE_S = 2.0
"""Time that a worker has for heeding SIGTERM by itself."""


def guard_process() -> None:
    """Watches over the calling process, started by multiprocessing, until it ends.

    It ends at once where its parent does, and within GRACE_S after SIGTERM. It ignores SIGINT: Ctrl-C reaches every
    process of the terminal, and the parent decides what follows. Call it in the main thread.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    # The interpreter writes each signal's number here from its C handler, whatever the main thread is doing.
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_guard, args=(reader, writer), name="epbackend-guard", daemon=True).start()


def _guard(signals: socket.socket, _keep_open: socket.socket) -> None:
    parent = multiprocessing.parent_process()
    watched: list[socket.socket | int] = [signals]
    if parent is not None:
        watched.append(parent.sentinel)
    while True:
        ready = wait(watched)
        if ready != [signals]:
            os._exit(1)
        if signal.SIGTERM in signals.recv(64):
            time.sleep(GRACE_S)
            os._exit(0)
