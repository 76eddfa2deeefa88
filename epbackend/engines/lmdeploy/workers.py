"""LMDeploy's mp executor with workers that load the plug, cannot outlive their parent, and are missed when they die.

Processes are started by pickling a bound method; being ours, it brings the plug into the worker before any code of
LMDeploy runs there.
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
from typing import Any

from lmdeploy.pytorch.engine.executor import mp_executor
from lmdeploy.pytorch.engine.executor.mp_executor import ExecutorProc, MPExecutor, MPWorkerWrapper, Notifier

from epbackend.engines.lmdeploy import plug
from epbackend.engines.lmdeploy.guard import GRACE_S, guard_process
from epbackend.engines.lmdeploy.load import last_words, record_error
from epbackend.engines.lmdeploy.threads import set_threads
from epbackend.errors import WorkerError

logger = logging.getLogger("lmdeploy")


class WatchedNotifier(Notifier):
    """A notifier whose waits end when the worker at the other end does, and that never blocks the event loop.

    LMDeploy waits for the barrier of every 32nd message in the event loop. Gloo's collectives block that loop too (on
    a GPU they are only queued), so that one rank can sit in the barrier while another waits for it in an all-reduce.
    """

    failure: WorkerError | None = None

    def fail(self, failure: WorkerError) -> None:
        """Lets everybody who waits here raise `failure`."""
        self.failure = failure
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "failure"}

    def set(self) -> None:
        with self._failing():
            super().set()

    async def set_async(self) -> None:
        if self._event_id < mp_executor.NUM_SHARED_BLOCK - 1:
            self.set()
        else:
            await _off_loop(self.set)

    @contextmanager
    def wait(self) -> Iterator[None]:
        with self._failing():
            self.events[self._event_id].wait()
        yield
        with self._failing():
            self._turn_over()

    @asynccontextmanager
    async def wait_async(self) -> AsyncIterator[None]:
        with self._failing():
            await _off_loop(self.events[self._event_id].wait)
        yield
        with self._failing():
            if self._event_id < mp_executor.NUM_SHARED_BLOCK - 1:
                self._turn_over()
            else:
                await _off_loop(self._turn_over)

    def _turn_over(self) -> None:
        """After the last event of the ring, waits until its sender has cleared them all."""
        if self._event_id == mp_executor.NUM_SHARED_BLOCK - 1:
            self.bar.wait()
            self.bar.wait()
        self._update_event_id()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except threading.BrokenBarrierError:
            if self.failure is None:
                raise
        if self.failure is not None:
            raise self.failure


class WatchedExecutor(MPExecutor):
    """The parent's end: fails, naming the rank, as soon as a worker is gone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.failure: WorkerError | None = None
        self._stop_reader, self._stop_writer = Pipe(duplex=False)
        super().__init__(*args, **kwargs)
        # LMDeploy's handler would end the whole process without a word; the watch tells what happened.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        threading.Thread(target=self._watch, name="epbackend-watch", daemon=True).start()

    @classmethod
    def setup_master_addr(cls) -> None:
        """A port of its own for each engine: LMDeploy would go on with the first one's."""
        mp_executor.setup_master_addr("127.0.0.1", mp_executor.find_available_port())

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
        rank = ranks[ended[0]]
        self.failure = _failure(rank, self.procs[rank]._proc)
        logger.error(str(self.failure))
        for buffer in (self.comm_buf, *self.ret_bufs):
            buffer.notifier.fail(self.failure)


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

    def _main_loop(self, proc_id: int, *args: Any, **kwargs: Any) -> None:
        guard_process()
        # One machine: its ranks meet on the loopback interface.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        with ending_on_error(proc_id):
            plug.enable_worker()
            set_threads()
            super()._main_loop(proc_id, *args, **kwargs)


    async def _main_loop_impl(self, *args: Any, **kwargs: Any) -> None:
        # There is nothing to put in order that the kernel would not; LMDeploy's handler trips over its own buffers.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        await super()._main_loop_impl(*args, **kwargs)


class FailingWorker(MPWorkerWrapper):
    """A worker whose background tasks are awaited: LMDeploy would let a failed forward pass go unnoticed."""

    def start(self) -> None:
        super().start()
        self._awaited = asyncio.get_running_loop().create_task(self._await_tasks())

    async def _await_tasks(self) -> None:
        with ending_on_error(self.rank):
            await self.wait_tasks()


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


async def _off_loop(function: Callable[[], Any]) -> None:
    """Awaits a blocking call in a daemon thread.

    The event loop's own threads are joined when Python ends, and that would be never with an engine nobody closed.
    """
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def finish(error: BaseException | None) -> None:
        if not done.done():
            done.set_exception(error) if error else done.set_result(None)

    def call() -> None:
        try:
            function()
            error = None
        except BaseException as caught:
            error = caught
        # A loop that was closed meanwhile has nobody left to tell.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(finish, error)

    threading.Thread(target=call, daemon=True).start()
    await done


def _failure(rank: int, process: Any) -> WorkerError:
    process.join()
    code = process.exitcode
    said = last_words(rank)
    how = f"failed: {said}" if said else (
        f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    )
    return WorkerError(
        f"the worker process of rank {rank} {how}. The other ranks were stopped. "
        "Its log is above; start again, and where it was killed for memory lower engine.cache_gb or ep more ranks."
    )
