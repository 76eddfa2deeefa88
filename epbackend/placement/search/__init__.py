"""Searches for a layer's slots, compiled: numba functions whose machine code is kept on disk.

`layer_search` balances recorded loads, `level_search` prepares a layer for the `level` split, `level_split` is that
split.

numba notices a change in the file of a kept function, but not in the files of functions compiled into it. So no module
here compiles in a function of another one.
Nothing here is imported with `epbackend.placement`: planners and splits import what they need when they are called.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

SECONDS = 20
"""About what all compilations take together."""


@cache
def announce() -> None:
    """Says so, once a process, where the first plan has to wait for the compiler; planners call it first."""
    from epbackend.placement.search.layer_search import improve

    if not any(Path(str(improve.stats.cache_path)).glob("layer_search.improve-*.nbi")):
        log.warning("compiling the planner once, about %d s; `make setup` does it beforehand", SECONDS)
