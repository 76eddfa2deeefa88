"""Who owns what the layers on a process group share: watchdog threads, communicators, buffers, peers' memory.

One `GroupContext` for all layers of an engine: they share one communicator and one set of buffers, and closing the
context leaves nothing of them.

    with GroupContext() as context:
        layers = [ExpertParallelMoE(..., context=context) for ...]
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist

from epbackend.dispatch.watchdog import Watchdog
from epbackend.errors import EPError

Made = TypeVar("Made")


@runtime_checkable
class Resource(Protocol):
    """What a context closes: something that holds memory, a thread or a connection."""

    def close(self) -> None:
        """Let go of it. Makes no collective: the other ranks may be gone."""


class GroupContext:
    """What the layers that share it have made on their process groups, each thing once.

    It ends with `close`, or when no layer refers to it any more. Close it before its process groups are destroyed.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[Hashable, ...], Any] = {}
        self._marked_as_one = False
        self._finalizer = weakref.finalize(self, _close, self._made)
        # At the end of the process its memory and threads end anyway, and CUDA may be gone before.
        self._finalizer.atexit = False

    def get(self, make: Callable[..., Made], *args: Hashable) -> Made:
        """`make(*args)`, made by the first call with these arguments and kept until `close`.

        Where `make` holds a collective all ranks of its group make that first call together.

        Raises:
            EPError: the context is closed.
        """
        if self.closed:
            raise EPError("the layer, or the engine that it belongs to, is closed: make another one")
        key = make, *args
        if key not in self._made:
            self._made[key] = make(*args)
        return self._made[key]

    def watch(self, what: str, group: dist.ProcessGroup | None, timeout_s: float) -> None:
        """Mark this place in the current CUDA stream, where `what` ends.

        If the GPU does not pass it within `timeout_s` seconds, a thread reports `what` and the ranks that do not
        answer, and ends the process. Does nothing while a graph is captured: whoever replays a graph that holds
        collectives calls this after each replay. It does nothing inside `one_mark` either, and without a group, where
        there is no rank to wait for.
        """
        if group is None or self._marked_as_one or torch.cuda.is_current_stream_capturing():
            return
        passed = torch.cuda.Event()
        passed.record()
        self.get(Watchdog.of, group).add(what, passed.query, timeout_s)

    @contextmanager
    def one_mark(self) -> Iterator[None]:
        """Layers inside set no mark of their own, since the caller marks what comes after them all.

        Meanwhile the host must not wait for the device, except inside `waiting`.
        """
        before, self._marked_as_one = self._marked_as_one, True
        try:
            yield
        finally:
            self._marked_as_one = before

    @contextmanager
    def waiting(self, what: str, group: dist.ProcessGroup, timeout_s: float) -> Iterator[None]:
        """Watch the host itself, which waits inside for values of the device: no mark in a stream follows it."""
        done: list[bool] = []
        self.get(Watchdog.of, group).add(what, lambda: bool(done), timeout_s)
        try:
            yield
        finally:
            done.append(True)

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    def close(self) -> None:
        """Close everything in it, the last made first; closing again does nothing."""
        self._finalizer()

    def __enter__(self) -> GroupContext:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(made: dict[tuple[Hashable, ...], Any]) -> None:
    with ExitStack() as stack:  # closes the rest too when one of them raises
        for each in made.values():
            if isinstance(each, Resource):
                stack.callback(each.close)
        made.clear()
