"""Engines of this process whose ranks are forks of one process that has loaded LMDeploy, as those of `ranks` are.

A user's ranks are started by `spawn`, and each imports torch, transformers and LMDeploy: 4 s of a core. What a rank
does is the same either way; how it is started, and how it ends, is for tests of whole processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import SimpleNamespace
from typing import Any

from lmdeploy.pytorch.engine.executor import mp_executor

from tests.helpers.ranks import forking


class _Rank(ForkServerProcess):
    """A forked process in the environment that a spawned one has: its starter's, of the moment it is started."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._environment = dict(os.environ)

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class _Context(ForkServerContext):
    Process = _Rank


def forked_context() -> ForkServerContext:
    """Starts such processes."""
    forking()  # what is to be loaded, should this be the first process that is started
    return _Context()


@contextmanager
def forked_engines() -> Iterator[None]:
    """LMDeploy's executor starts its ranks as forks meanwhile."""
    context, real = forked_context(), mp_executor.mp
    mp_executor.mp = SimpleNamespace(get_context=lambda method: context)
    yield
    mp_executor.mp = real
