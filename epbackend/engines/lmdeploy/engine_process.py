"""The process of its own in which LMDeploy's API server runs the engine."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any

from epbackend.engines.lmdeploy import plug
from epbackend.engines.lmdeploy.guard import guard_process
from epbackend.engines.lmdeploy.load import record_error
from epbackend.engines.lmdeploy.state import active


def run_engine(shared_dict: Any, condition: Any, *args: Any, **kwargs: Any) -> None:
    """Stands for `ZMQMPEngine._mp_proc`: loads the plug, then runs the original, and leaves an error's text."""
    guard_process()
    try:
        plug.enable_worker()
        active().patches.original("zmq-process")(shared_dict, _Farewell(condition), *args, **kwargs)
    except Exception as error:
        record_error(0, f"{type(error).__name__}: {error}")
        raise


class _Farewell:
    """The condition by which the engine tells its port.

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
