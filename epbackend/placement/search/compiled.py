"""How the search is compiled: at the first call, and kept on disk where that can be."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit

log = logging.getLogger(__name__)

SECONDS = 20
"""What all compilations take together, roughly."""

# Called from compiled code alone: a wrapper for Python takes longer to compile than most of these functions.
inner = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)  # type: ignore[call-overload]


def entry(function: Callable[..., Any]) -> Any:
    """Decorator of a function that Python calls: kept on disk once it is compiled.

    Where numba finds no place that it may write to, as in a container, each process compiles for itself.
    """
    compiled = njit(error_model="numpy")(function)
    try:
        compiled.enable_caching()
    except RuntimeError:
        _tell_that_nothing_is_kept()
    return compiled


@cache
def announce(example: Any) -> None:
    """Logs, once a process, that the first plan has to wait for the compiler; planners call it before they search.

    `example` is the `entry` by which that is judged.
    """
    kept_in = example.stats.cache_path
    if kept_in and not any(Path(kept_in).glob(f"*.{example.__name__}-*.nbi")):
        log.warning("compiling the planner once, about %d s; `make setup` does it beforehand", SECONDS)


@cache
def _tell_that_nothing_is_kept() -> None:
    log.warning(
        "the planner is compiled in each process, about %d s, as neither the package's folder nor the user's cache can "
        "be written: set NUMBA_CACHE_DIR to a folder that can",
        SECONDS,
    )
