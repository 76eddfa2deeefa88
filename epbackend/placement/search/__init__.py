"""The compiled part of placement: numba functions whose machine code is kept on disk.

| module         | what it does                             | called by                                   |
|----------------|------------------------------------------|---------------------------------------------|
| `layer_search` | balances recorded loads, layer by layer  | `planners.refined`, `planners.incremental`  |
| `level_search` | prepares a layer for the `level` split   | `planners.level`                            |
| `level_split`  | is the `level` split, batch by batch     | `replica_split`                             |

numba notices a change in the file of a kept function, but not in the files of functions compiled into it. So no module
here compiles in a function of another one, and a few lines are written twice.

Nothing here is imported with `epbackend.placement`: planners and splits import what they need when they are called.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

SECONDS = 20
"""What all compilations take together, roughly."""


@cache
def announce() -> None:
    """Logs, once a process, that the first plan has to wait for the compiler; planners call it before they search."""
    from epbackend.placement.search.layer_search import improve

    if not any(Path(str(improve.stats.cache_path)).glob("layer_search.improve-*.nbi")):
        log.warning("compiling the planner once, about %d s; `make setup` does it beforehand", SECONDS)
