"""The process of its own in which LMDeploy's API server runs the engine."""

from __future__ import annotations

from typing import Any

from epbackend.engines.lmdeploy import plug
from epbackend.engines.lmdeploy.guard import guard_process


def run_engine(*args: Any, **kwargs: Any) -> None:
    """Stands for `ZMQMPEngine._mp_proc`: loads the plug, then runs the original."""
    guard_process()
    plug.enable_worker()
    plug.active().patches.original("zmq-process")(*args, **kwargs)
