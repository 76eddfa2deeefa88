"""What the calls to `torch.cuda` that LMDeploy's engine makes on any device mean on a CPU.

Work is done when a call returns, so streams and events have nothing to wait for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from epbackend.device import get_device


class Stream:
    """A queue that is always empty."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def wait_stream(self, stream: Stream) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event


class Event:
    """A moment that has passed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time_s = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._time_s = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return (end._time_s - self._time_s) * 1e3


_CURRENT = Stream()


@contextmanager
def stream(stream: Stream) -> Iterator[Stream]:
    yield stream


def current_stream(device: Any = None) -> Stream:
    return _CURRENT


def synchronize(device: Any = None) -> None: ...


def empty_cache() -> None: ...


def set_device(device: Any) -> None: ...


def current_device() -> str:
    return "cpu"


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Free and total bytes that this process may use."""
    memory = get_device("cpu").memory()
    return memory.free, memory.total


def get_device_properties(device: Any = None) -> SimpleNamespace:
    """Of compute capability 0: below whatever asks for some. torch's compiler asks for the architecture."""
    return SimpleNamespace(
        name="cpu", gcnArchName="cpu", major=0, minor=0, uuid="cpu", total_memory=mem_get_info()[1]
    )
