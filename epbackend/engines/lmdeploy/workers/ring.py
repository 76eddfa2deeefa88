"""Signals between the engine's process and its ranks about a ring of shared blocks, for LMDeploy's mp executor."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from multiprocessing.context import SpawnContext
from multiprocessing.synchronize import Semaphore
from typing import Any

from lmdeploy.pytorch.engine.executor.mp_executor import NUM_SHARED_BLOCK

from epbackend.errors import WorkerError

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
            await off_loop(lambda: self._acquire(semaphore))


async def off_loop(function: Callable[[], Any]) -> Any:
    """Awaits a blocking call in a daemon thread; returns what it returns.

    The event loop's own threads are joined when Python ends, which would hang with an engine that was not closed.
    """
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def finish(result: Any, error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def call() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as caught:
            error = caught
        # The loop may have been closed meanwhile.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=call, daemon=True).start()
    return await done
