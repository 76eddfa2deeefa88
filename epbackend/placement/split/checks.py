"""What every split refuses."""

from __future__ import annotations

import numpy as np

from epbackend.errors import ConfigError
from epbackend.placement.layout import Layout

MOST_TOKENS = 2**40
"""Tokens of a batch, over all experts: more than any has, and few enough that no sum overflows 64 bits."""


def checked_counts(counts_E: np.ndarray, layout: Layout) -> np.ndarray:
    """Counts as int64 [E] (or [R, E]), read-only and contiguous: one type of array, for which kernels compile once.

    Raises ConfigError for another length, and for counts that are negative, fractional or too many.
    """
    counts_E = np.asarray(counts_E)
    if counts_E.shape[-1:] != (layout.experts,):
        raise ConfigError(
            f"counts: the shape is {counts_E.shape}, but the layout has {layout.experts} experts; give a count for each"
        )
    if counts_E.dtype.kind not in "iu":
        raise ConfigError(f"counts: must be whole numbers, not {counts_E.dtype}; round them first")
    # The largest first: only then the sum is sure not to overflow.
    if counts_E.min(initial=0) < 0 or counts_E.max(initial=0) > MOST_TOKENS or counts_E.sum() > MOST_TOKENS:
        raise ConfigError(f"counts: must be 0 or more, and {MOST_TOKENS} in all at most")
    return read_only(counts_E)


def read_only(counts: np.ndarray) -> np.ndarray:
    """A read-only, contiguous int64 view, or a copy where there is none."""
    view = np.ascontiguousarray(counts, dtype=np.int64).view()
    view.flags.writeable = False
    return view
