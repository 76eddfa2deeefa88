"""The compiled part of placement: numba functions whose machine code is kept on disk.

Nothing here is imported with `epbackend.placement`: planners and splits import what they need when they are called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

SECONDS = 20
"""About what all compilations take together."""


def _forget_stale(folder: Path) -> None:
    """Deletes kept machine code that is older than any source here.

    numba checks the file of the function itself, but not those of the functions that were compiled into it. Where the
    package is not ours to write, its sources do not change under us either.
    """
    newest = max(source.stat().st_mtime for source in folder.glob("*.py"))
    for index in (folder / "__pycache__").glob("*.nbi"):
        with suppress(OSError):
            if index.stat().st_mtime < newest:
                index.unlink()


_forget_stale(Path(__file__).parent)


@cache
def announce() -> None:
    """Says so, once a process, where the first plan has to wait for the compiler; planners call it first."""
    from epbackend.placement.compiled.search import improve

    if not any(Path(str(improve.stats.cache_path)).glob("search.improve-*.nbi")):
        log.warning("compiling the planner once, about %d s; `make setup` does it beforehand", SECONDS)


def warm_up(say: Callable[[str], None] = lambda text: None) -> None:
    """Compiles everything that the planners and splits usually need, and keeps it, so that no first call waits."""
    import numpy as np

    from epbackend.placement.loads import Loads
    from epbackend.placement.objectives import TOKENS
    from epbackend.placement.placement import Placement
    from epbackend.placement.planners.base import Task
    from epbackend.placement.planners.incremental import plan_layers as incremental
    from epbackend.placement.planners.refined import plan_layers as refined
    from epbackend.placement.split import level_shares, own_quota

    say("compiling the planner and the splits")
    loads = Loads.of(np.array([[5.0, 2.0, 1.0, 1.0]]))
    refined(Task(loads, ranks=2, slots=4, objective=TOKENS, budget=2, options={"split": "level"}))
    current = Placement.even(layers=1, experts=4, ranks=2, slots=6)
    incremental(Task(loads, ranks=2, slots=6, objective=TOKENS, current=current, options={"target": 1}))
    layout, counts_RE = current.layers[0], np.ones((2, 4), np.int64)
    own_quota(counts_RE, level_shares(counts_RE.sum(axis=0), layout), layout, source_rank=0)
