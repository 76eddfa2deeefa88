"""LMDeploy's mp executor with workers that load the plug, cannot outlive their parent, and are missed when they die.

Processes are started by pickling a bound method; being ours, it brings the plug into the worker before any code of
LMDeploy runs there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from lmdeploy.pytorch.engine.executor import mp_executor
from lmdeploy.pytorch.engine.executor.mp_executor import ExecutorProc, MPExecutor, MPWorkerWrapper

from epbackend.engines.lmdeploy import plug
from epbackend.engines.lmdeploy.guard import GRACE_S, guard_process
from epbackend.engines.lmdeploy.load import last_words, record_error
from epbackend.engines.lmdeploy.state import active
from epbackend.engines.lmdeploy.threads import set_threads
from epbackend.errors import WorkerError

logger = logging.getLogger("lmdeploy")


class WatchedExecutor(MPExecutor):
    """The parent's end: fails, naming the rank, as soon as a worker is gone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.failure: WorkerError | None = None
        self._stop_reader, self._stop_writer = Pipe(duplex=False)
        handler = signal.getsignal(signal.SIGUSR1)
        super().__init__(*args, **kwargs)
        # LMDeploy's own would end the whole process without a word; the watch tells what happened.
        signal.signal(signal.SIGUSR1, handler)
        threading.Thread(target=self._watch, name="epbackend-watch", daemon=True).start()

    @classmethod
    def setup_master_addr(cls) -> None:
        """A port of its own for each engine: LMDeploy would go on with the first one's."""
        active().set_environment("MASTER_ADDR", "127.0.0.1")
        active().set_environment("MASTER_PORT", str(mp_executor.find_available_port()))

    def init(self) -> None:
        try:
            super().init()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        if not self._stop_writer.closed:
            self._stop_writer.close()
        super().release()

    def _watch(self) -> None:
        ranks = {each._proc.sentinel: rank for rank, each in enumerate(self.procs)}
        ended = wait([*ranks, self._stop_reader])
        if self._stop_reader in ended:
            return
        # The others fail because of the first, so one that was killed is the one to name.
        rank = min((ranks[sentinel] for sentinel in ended), key=lambda rank: self.procs[rank].exit_code())
        self.failure = _failure(rank, self.procs[rank].exit_code())
        logger.error(str(self.failure))
        for buffer in (self.comm_buf, *self.ret_bufs):
            buffer.notifier.failure = self.failure


class GuardedProc(ExecutorProc):
    """A worker process."""

    def join(self) -> None:
        """Waits until the process has ended; one that does not heed its SIGTERM is killed."""
        if self._proc is None:
            return
        self._proc.join(timeout=2 * GRACE_S)
        if self._proc.is_alive():
            self._proc.kill()
            self._proc.join()

    def exit_code(self) -> int:
        """Of the ended process: negative for the signal that killed it."""
        self._proc.join()
        return self._proc.exitcode

    def _main_loop(self, proc_id: int, *args: Any, **kwargs: Any) -> None:
        guard_process()
        # One machine: its ranks meet on the loopback interface.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        kwargs["comm_notifier"].receiver = proc_id
        with ending_on_error(proc_id):
            plug.enable_worker()
            set_threads()
            super()._main_loop(proc_id, *args, **kwargs)

    async def _main_loop_impl(self, proc_id: int, *args: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGTERM, _leave)
        with ending_on_error(proc_id):
            await super()._main_loop_impl(proc_id, *args, **kwargs)


class FailFastWorker(MPWorkerWrapper):
    """A worker whose background tasks are awaited: LMDeploy would let a failed forward pass go unnoticed."""

    def start(self) -> None:
        super().start()
        self._awaited = asyncio.get_running_loop().create_task(self._await_tasks())

    async def _await_tasks(self) -> None:
        with ending_on_error(self.rank):
            await self.wait_tasks()


def _leave(*_: Any) -> None:
    """Ends this worker: the load of its last steps is written down, the rest the kernel puts in order.

    LMDeploy's own handler trips over its buffers.
    """
    try:
        active().load_writer.close()
    finally:
        os._exit(0)


@contextmanager
def ending_on_error(rank: int) -> Iterator[None]:
    """Ends the process at once on an exception, its text left for the parent.

    At once, because cleaning up would wait for ranks that in turn wait for this one; the closed connections tell them.
    """
    try:
        yield
    except Exception as error:
        logger.exception("rank %d failed", rank)
        record_error(rank, "".join(traceback.format_exception_only(error)).strip())
        os._exit(1)


def _failure(rank: int, exit_code: int) -> WorkerError:
    said = last_words(rank)
    if said:
        how = f"failed: {said}"
    elif exit_code < 0:
        how = f"was killed by {signal.Signals(-exit_code).name}"
    else:
        how = f"ended with exit code {exit_code}"
    remedy = (
        "Where the system ran out of memory, lower engine.cache_gb. " if exit_code == -signal.SIGKILL else ""
    )
    return WorkerError(f"rank {rank} {how}. {remedy}The other ranks were stopped; the log above tells more.")
