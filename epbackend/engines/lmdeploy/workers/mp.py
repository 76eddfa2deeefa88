"""Processes that LMDeploy starts: its mp executor and workers, the API server's engine, its checks of the machine.

A process is started by pickling a class, a function or a bound method by reference. Ours stand in LMDeploy's place, so
that unpickling them brings the plug into the process before any code of LMDeploy runs there.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import wait
from queue import SimpleQueue
from types import SimpleNamespace, TracebackType
from typing import Any

from lmdeploy.pytorch.engine.engine_checker import EngineChecker
from lmdeploy.pytorch.engine.executor import mp_executor
from lmdeploy.pytorch.engine.executor.mp_executor import (
    ExecutorProc,
    MPExecutor,
    MPWorkerWrapper,
    SharedBuffer,
)
from lmdeploy.pytorch.engine.mp_engine import zmq_engine

from epbackend.dispatch.running_time import RunningTime
from epbackend.engines.lmdeploy import plug
from epbackend.engines.lmdeploy.load.report import (
    record_error,
    remove_segment,
    take_room,
)
from epbackend.engines.lmdeploy.plug import set_threads
from epbackend.engines.lmdeploy.processes import check_starts
from epbackend.engines.lmdeploy.state import active
from epbackend.engines.lmdeploy.workers.process_guard import (
    ENDING,
    GRACE_S,
    end_at_once,
    ended_by_us,
    guard_process,
)
from epbackend.engines.lmdeploy.workers.rank_watch import LOOK_S, judge, look_at
from epbackend.engines.lmdeploy.workers.ring import off_loop
from epbackend.errors import ENGINE_FAILED, UnavailableError, WorkerError

logger = logging.getLogger("lmdeploy")

ALL_RANKS = 0xFFFFFFFF
"""A mask of receivers. LMDeploy's own stops at rank 7."""


class StepOutput:
    """What a step gave, told apart from the replies to other calls, which come through the same buffer."""

    def __init__(self, value: Any) -> None:
        self.value = value


@contextmanager
def _no_handler() -> Iterator[None]:
    """LMDeploy's executor sets no handler for SIGUSR1 meanwhile.

    It would end the whole process without a message, where the watch reports what happened; and outside the main thread
    none can be set.
    """
    mp_executor.signal = SimpleNamespace(SIGUSR1=signal.SIGUSR1, signal=lambda number, handler: None)
    try:
        yield
    finally:
        mp_executor.signal = signal


class AllocatedBuffer(SharedBuffer):
    """What the parent and a rank tell each other goes through it; it has its memory before anything is told."""

    is_closed: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_create:
            take_room(self.shm, "one of the buffers through which the ranks' processes are told what to do")

    def close(self) -> None:
        """As LMDeploy's, also where the segment has been removed by somebody else."""
        if self.is_closed:
            return
        if self.is_create:
            remove_segment(self.shm)
        else:
            self.shm.close()
        self.notifier.close()
        self.is_closed = True


class WatchedExecutor(MPExecutor):
    """The parent's end: fails, naming the rank, as soon as a worker has ended or does not move on.

    LMDeploy's own lets every caller read the reply of rank 0 by itself: one that waits for the output of the next step
    then takes the reply to a wake-up, and both wait without end. Here one thread reads, and sorts what comes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_starts(active().config)
        self._stop_reader, self._stop_writer = Pipe(duplex=False)
        self._replies: SimpleQueue[Any] | None = None
        # From here on, as LMDeploy makes them while it starts the ranks one by one.
        self.procs: list[GuardedProc] = []
        self.ret_bufs: list[AllocatedBuffer] = []
        try:
            with _no_handler():
                super().__init__(*args, **kwargs)
        except UnavailableError:
            for each in self.procs:
                each.kill()
            if hasattr(self, "comm_buf"):
                self.release()
            raise
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

    def start(self, forward_event: asyncio.Event) -> None:
        self.collective_rpc("start")
        self.remote_outs: asyncio.Queue = asyncio.Queue()
        self._replies = SimpleQueue()
        loop = asyncio.get_running_loop()
        # What LMDeploy waits for: it ends by our failure, or is cancelled.
        self._prefetch_task = loop.create_future()
        threading.Thread(
            target=self._sort_replies, args=(loop,), name="epbackend-replies", daemon=True
        ).start()
        self._ask_for_output()

    async def sleep(self, level: int = 1) -> None:
        """Returns when every rank sleeps; LMDeploy's own does not wait, and a wake-up may come before.

        A step that was sent ahead is dropped by the engine, so its output, here already, must not be the next one's.
        """
        await self.collective_rpc_async("sleep", (level,))
        while not self.remote_outs.empty():
            self.remote_outs.get_nowait()

    def wakeup(self, tags: list[str] | None = None) -> None:
        self.collective_rpc("wakeup", (tags,))

    def collective_rpc(
        self,
        method: str,
        args: Any = (),
        kwargs: Any = None,
        receiver_mask: int = ALL_RANKS,
        return_mask: int = ALL_RANKS,
    ) -> list[Any] | None:
        asked = self._call(method, args, kwargs, receiver_mask, return_mask)
        replies: list[Any] = [None] * self.world_size
        for rank in asked:
            replies[rank] = self._reply(rank)
        return replies if asked else None

    async def collective_rpc_async(
        self,
        method: str,
        args: Any = (),
        kwargs: Any = None,
        receiver_mask: int = ALL_RANKS,
        return_mask: int = ALL_RANKS,
    ) -> list[Any] | None:
        asked = self._call(method, args, kwargs, receiver_mask, return_mask)
        replies: list[Any] = [None] * self.world_size
        for rank in asked:
            replies[rank] = await off_loop(functools.partial(self._reply, rank))
        return replies if asked else None

    def release(self) -> None:
        if not self._stop_writer.closed:
            self._stop_writer.close()
        super().release()

    def _call(self, method: str, args: Any, kwargs: Any, receivers: int, returns: int) -> list[int]:
        """Sends a call to the ranks of one mask; the ranks of both masks will reply."""
        returns &= receivers
        call = {"method": method, "args": args or (), "kwargs": kwargs or {}, "return_mask": returns}
        self.comm_buf.send(call, receiver_mask=receivers)
        return [rank for rank in range(self.world_size) if returns >> rank & 1]

    def _reply(self, rank: int) -> Any:
        if rank or self._replies is None:
            return self.ret_bufs[rank].receive()
        reply = self._replies.get()
        if isinstance(reply, WorkerError):
            raise reply
        return reply

    def _sort_replies(self, loop: asyncio.AbstractEventLoop) -> None:
        """Reads all that rank 0 sends, until the engine is closed or fails; then whoever waits gets that error."""
        assert self._replies is not None
        while True:
            message: Any
            try:
                message = self.ret_bufs[0].receive()
            except WorkerError as error:
                message = error
            if not isinstance(message, StepOutput):
                self._replies.put(message)
            if isinstance(message, (StepOutput, WorkerError)):
                with contextlib.suppress(RuntimeError):  # the loop may have been closed meanwhile
                    loop.call_soon_threadsafe(self._take_output, message)
            if isinstance(message, WorkerError):
                return

    def _take_output(self, output: StepOutput | WorkerError) -> None:
        if self._prefetch_task.done():
            return
        if isinstance(output, WorkerError):
            self._prefetch_task.set_exception(output)
        else:
            self.remote_outs.put_nowait(output.value)
            self._ask_for_output()

    def _ask_for_output(self) -> None:
        self._call("get_outputs", (), None, receivers=1, returns=1)

    def _watch(self) -> None:
        timeout_s = active().config.timeout_s
        sentinels = [each._proc.sentinel for each in self.procs]
        running, text = RunningTime(), None
        while text is None:
            ready = wait([*sentinels, self._stop_reader], timeout=LOOK_S)
            if self._stop_reader in ready:
                return
            running.look()
            text = judge(
                [look_at(rank, running, exit_code=each.exit_code) for rank, each in enumerate(self.procs)],
                timeout_s,
            )
        failure = WorkerError(f"{text}. The other ranks were stopped; the log above tells more.")
        logger.error(str(failure))
        for buffer in (self.comm_buf, *self.ret_bufs):
            buffer.notifier.failure = failure
        for each in self.procs:
            each.kill()
        active().engine_failed(failure)


class GuardedProc(ExecutorProc):
    """A worker process."""

    def start(self, **kwargs: Any) -> None:
        super().start(**kwargs)
        ended_by_us(self._proc)

    def join(self) -> None:
        """Waits until the process has ended; one that does not heed `close` is killed."""
        if self._proc is None:
            return
        self._proc.join(timeout=2 * GRACE_S)
        if self._proc.is_alive():
            self._proc.kill()
            self._proc.join()

    def kill(self) -> None:
        """Ends the process at once, also where it is stopped."""
        self._proc.kill()

    def exit_code(self) -> int | None:
        """Of the ended process, negative for the signal that killed it; None while it runs."""
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
        signal.signal(ENDING, _leave)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # LMDeploy's handler would end it
        with ending_on_error(proc_id):
            await super()._main_loop_impl(proc_id, *args, **kwargs)


class FailFastWorker(MPWorkerWrapper):
    """A worker that ends when a background task fails: LMDeploy would not notice a failed forward pass."""

    def start(self) -> None:
        active().pulse.start(self.rank)
        super().start()
        self._awaited = asyncio.get_running_loop().create_task(self._await_tasks())

    async def get_outputs(self) -> StepOutput:
        return StepOutput(await super().get_outputs())

    async def _await_tasks(self) -> None:
        with ending_on_error(self.rank):
            await self.wait_tasks()


def _leave(*_: Any) -> None:
    """Ends this worker: the load of its last steps is written down, the kernel frees the rest."""
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


def run_engine(shared_dict: Any, condition: Any, *args: Any, **kwargs: Any) -> None:
    """Stands for `ZMQMPEngine._mp_proc`: loads the plug, then runs the original, and leaves an error's text."""
    guard_process()
    # It ends by the signals that it names, and would by Ctrl-C at the terminal.
    zmq_engine.signal = SimpleNamespace(SIGINT=ENDING, SIGTERM=ENDING)
    try:
        plug.enable_worker()
        active().on_failure = _end_engine
        active().patches.original("zmq-process")(shared_dict, _ServerCondition(condition), *args, **kwargs)
    except Exception as error:
        record_error(0, f"{type(error).__name__}: {error}")
        raise
    # At its end Python collects garbage among all that is left, and the server would wait for it.
    gc.freeze()


def _end_engine(failure: WorkerError) -> None:
    """Ends the server's engine process, whose ranks are of no use any more: the server sees it and knows why."""
    end_at_once(ENGINE_FAILED)


class _ServerCondition:
    """The condition by which the engine process reports its port, without an error where the server has closed it.

    The server ends the condition's own process as soon as it has read the port, perhaps before that process has
    confirmed the release. Where that process has gone before, the server ends.
    """

    def __init__(self, condition: Any) -> None:
        self._condition = condition

    def __enter__(self) -> None:
        try:
            self._condition.__enter__()
        except (EOFError, OSError):
            os._exit(0)

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
