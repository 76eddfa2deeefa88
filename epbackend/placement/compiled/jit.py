"""How placement is compiled: `entry` for what Python calls, kept on disk; `inner` for what only compiled code calls."""

from __future__ import annotations

from numba import njit

entry = njit(cache=True, error_model="numpy")

inner = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)  # type: ignore[call-overload]
"""No wrapper for Python, which takes longer to compile than most of these functions."""
