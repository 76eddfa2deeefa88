"""An engine in a process of its own, for commands that set two beside each other: a process has one plug."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from epbackend.config import EPConfig

Result = TypeVar("Result")


class EngineApart:
    """The pipeline of a model, started at once. Use it as a context manager."""

    def __init__(self, model: str, config: EPConfig, environment: dict[str, str] | None = None) -> None:
        """`environment` is set in its process, and with that in its ranks."""
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._started = self._process.submit(_start, model, config.to_json(), environment or {})

    def wait(self) -> None:
        """Until it has started. Raises what the start has raised."""
        self._started.result()

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """What `function(pipe, *arguments)` returns or raises there."""
        self.wait()
        return self._process.submit(_call, function, arguments).result()

    def __enter__(self) -> "EngineApart":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):  # what failed has been raised by `call`
            self.call(_close)
        self._process.shutdown()


_pipe: Any = None
"""That of this process."""


def _start(model: str, config: str, environment: dict[str, str]) -> None:
    global _pipe
    import epbackend
    from epbackend.engines.lmdeploy.workers.process_guard import guard_process

    guard_process()  # it ends with the command, also where that is killed
    os.environ.update(environment)
    _pipe = epbackend.pipeline(model, EPConfig.from_json(config))


def _call(function: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
    return function(_pipe, *arguments)


def _close(pipe: Any) -> None:
    pipe.close()
