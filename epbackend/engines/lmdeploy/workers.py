"""Processes that LMDeploy starts: its mp executor and workers, the API server's engine, its checks of the machine.

A process is started by pickling a class, a function or a bound method by reference. Ours stand in LMDeploy's place, so
that unpickling them brings the plug into the process before any code of LMDeploy runs there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext
from multiprocessing.synchronize import Semaphore
from types import TracebackType
from typing import Any

from lmdeploy.pytorch.engine.engine_checker import EngineChecker
from lmdeploy.pytorch.engine.executor import mp_executor
from lmdeploy.pytorch.engine.executor.mp_executor import (
    NUM_SHARED_BLOCK,
    ExecutorProc,
    MPExecutor,
    MPWorkerWrapper,
)

from epbackend.engines.lmdeploy import plug
from epbackend.engines.lmdeploy.load_report import last_error, record_error
from epbackend.engines.lmdeploy.plug import set_threads
from epbackend.engines.lmdeploy.process_guard import GRACE_S, guard_process
from epbackend.engines.lmdeploy.state import active
from epbackend.errors import WorkerError

logger = logging.getLogger("lmdeploy")


class WatchedExecutor(MPExecutor):
    """The parent's end: fails, naming the rank, as soon as a worker has ended."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.failure: WorkerError | None = None
        self._stop_reader, self._stop_writer = Pipe(duplex=False)
        handler = signal.getsignal(signal.SIGUSR1)
        super().__init__(*args, **kwargs)
        # LMDeploy's handler would end the whole process without a message; the watch reports what happened.
        signal.signal(signal.SIGUSR1, handler)
        threading.Thread(target=self._watch, name="epbackend-watch", daemon=True).start()

    @classmethod
    def setup_master_addr(cls) -> None:
        """A port of its own for each engine: LMDeploy would use the first engine's again."""
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
    """A worker that ends when a background task fails: LMDeploy would not notice a failed forward pass."""

    def start(self) -> None:
        super().start()
        self._awaited = asyncio.get_running_loop().create_task(self._await_tasks())

    async def _await_tasks(self) -> None:
        with ending_on_error(self.rank):
            await self.wait_tasks()


def _leave(*_: Any) -> None:
    """Ends this worker: the load of its last steps is written down, the kernel frees the rest.

    LMDeploy's own handler fails on its buffers.
    """
    try:
        active().stats_writer.close()
    finally:
        os._exit(0)


@contextmanager
def ending_on_error(rank: int) -> Iterator[None]:
    """Ends the process at once on an exception, its text left for the parent.

    At once, because cleaning up would wait for ranks that wait for this one; they notice the closed connections.
    """
    try:
        yield
    except Exception as error:
        logger.exception("rank %d failed", rank)
        record_error(rank, "".join(traceback.format_exception_only(error)).strip())
        os._exit(1)


def _failure(rank: int, exit_code: int) -> WorkerError:
    said = last_error(rank)
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


POLL_S = 0.25
"""How soon a wait notices that there is nothing left to wait for."""


class RingNotifier:
    """Signals the receivers of a ring of shared blocks what is written, and the sender what is read.

    In place of LMDeploy's `Notifier`, which has an event for each block and a barrier at each turn of the ring. Gloo's
    collectives block the event loop (on a GPU they are only queued), so that there one rank can sit in the barrier
    while another waits for it in an all-reduce; and an event or a barrier whose other end was killed waits without end.
    """

    failure: WorkerError | None = None
    """Raised by every wait here; the parent sets it when a worker dies."""
    receiver = 0
    """Which of the receivers this process is."""

    def __init__(self, num_receiver: int, mp_ctx: SpawnContext) -> None:
        self._written = [mp_ctx.Semaphore(0) for _ in range(num_receiver)]
        # One less than there are blocks: the sender has written a block before it waits for a free one.
        self._free = [mp_ctx.Semaphore(NUM_SHARED_BLOCK - 1) for _ in range(num_receiver)]
        self._closed = False

    def set(self) -> None:
        """The next block is written. Returns when the one after it may be written."""
        for written in self._written:
            written.release()
        for free in self._free:
            self._acquire(free)

    async def set_async(self) -> None:
        """As `set`."""
        for written in self._written:
            written.release()
        for free in self._free:
            await self._acquire_async(free)

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Waits for the next block; within the context it may be read."""
        self._acquire(self._written[self.receiver])
        yield
        self._free[self.receiver].release()

    @asynccontextmanager
    async def wait_async(self) -> AsyncIterator[None]:
        """As `wait`."""
        await self._acquire_async(self._written[self.receiver])
        yield
        self._free[self.receiver].release()

    def close(self) -> None:
        """Ends the waits of this process."""
        self._closed = True

    def _acquire(self, semaphore: Semaphore) -> None:
        while not semaphore.acquire(timeout=POLL_S):
            if self.failure is not None:
                raise self.failure
            if self._closed:
                raise WorkerError("the engine was closed")

    async def _acquire_async(self, semaphore: Semaphore) -> None:
        if not semaphore.acquire(block=False):
            await _off_loop(lambda: self._acquire(semaphore))


async def _off_loop(function: Callable[[], Any]) -> None:
    """Awaits a blocking call in a daemon thread.

    The event loop's own threads are joined when Python ends, which would hang with an engine that was not closed.
    """
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def finish(error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def call() -> None:
        error: BaseException | None = None
        try:
            function()
        except BaseException as caught:
            error = caught
        # The loop may have been closed meanwhile.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(finish, error)

    threading.Thread(target=call, daemon=True).start()
    await done


def run_engine(shared_dict: Any, condition: Any, *args: Any, **kwargs: Any) -> None:
    """Stands for `ZMQMPEngine._mp_proc`: loads the plug, then runs the original, and leaves an error's text."""
    guard_process()
    try:
        plug.enable_worker()
        active().patches.original("zmq-process")(shared_dict, _ServerCondition(condition), *args, **kwargs)
    except Exception as error:
        record_error(0, f"{type(error).__name__}: {error}")
        raise


class _ServerCondition:
    """The condition by which the engine process reports its port, without an error where the server has closed it.

    The server ends the condition's own process as soon as it has read the port, perhaps before that process has
    confirmed the release.
    """

    def __init__(self, condition: Any) -> None:
        self._condition = condition

    def __enter__(self) -> None:
        self._condition.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(EOFError, ConnectionError):
            self._condition.__exit__(kind, error, traceback)

    def notify(self) -> None:
        self._condition.notify()


class PluggedChecker(EngineChecker):
    """All of LMDeploy's checks, in whatever process."""

    def _handle_impl(self) -> None:
        plug.enable_worker()
        super()._handle_impl()
