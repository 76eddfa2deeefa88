"""Launches that name every argument of a kernel, and cost the host less than a launch of Triton's own.

`JITFunction.run` finds the compiled kernel by a text that it composes anew each time, and checks hooks, settings and
globals. The function made here goes that way once for each kind of arguments. Then it keeps the compiled kernel, by
Triton's own classification of the arguments (dtype, alignment, whole numbers that are part of the program), and hands
them straight to it. Microseconds of the host for one launch of the grouped product (Triton 3.7.1 on CPython 3.11, the
driver a stub, processor time, the least of 60 batches of 200 launches):

                                    by `run`    kept
    by pointers                       16.7       4.9
    with two TMA descriptors          25.5       9.6

`cdiv` and `next_power_of_2` are those of Triton for the host: Triton's own are made for kernels, and take 4 us each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from triton import knobs
from triton._C.libtriton import native_specialize_impl
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

KEPT_BY = ("3.6", "3.7")
"""Versions of Triton whose compiled kernels are launched here; with another one every launch goes through `run`."""

MOST_KEPT = 1024
"""Kinds of arguments of one kernel; arguments that Triton specializes must not change with every call."""


def cdiv(number: int, by: int) -> int:
    """The quotient, rounded up."""
    return -(-number // by)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()


class NamedLaunch:
    """A kernel that is launched by `kernel[grid](name=value, ...)`.

    An argument that is missing, unknown or positional is a TypeError. The compiler's options `num_warps`, and with it
    `num_stages`, go along.
    """

    def __init__(self, kernel: Any, **fixed: Any) -> None:
        if unknown := fixed.keys() - set(kernel.arg_names):
            raise TypeError(f"{kernel.fn.__name__} has no argument {', '.join(sorted(unknown))}")
        self._kernel, self._fixed = kernel, fixed
        names = ", ".join(kernel.arg_names)
        free = "".join(f"{name}, " for name in kernel.arg_names if name not in fixed)
        scope: dict[str, Any] = {"kernel": kernel, **fixed}
        kept = ""
        if isinstance(kernel, JITFunction) and triton.__version__.startswith(KEPT_BY):
            scope |= {
                "kept": {},
                "keep": _keep,
                "hooked": _hooked,
                "driver": driver,
                "kind": native_specialize_impl,
            }
            kept = (
                f"        device = driver.active.get_current_device()\n"
                f"        backend = kernel.device_caches[device][3]\n"
                f"        key = device, num_warps, num_stages, {_kinds(kernel, fixed)}\n"
                f"        found = kept.get(key)\n"
                f"        if found is not None and not hooked():\n"
                f"            run, function, metadata = found\n"
                f"            stream = driver.active.get_current_stream(device)\n"
                f"            run(x, y, z, stream, function, metadata, None, None, None, {names})\n"
                f"            return\n"
            )
        run = f"kernel.run({names}, grid=(x, y, z), warmup=False"
        exec(
            f"def at(x, y=1, z=1):\n"
            f"    def launch(*, {free}num_warps=None, num_stages=None):\n"
            f"{kept}"
            f"        if num_warps is None:\n"
            f"            compiled = {run})\n"
            f"        elif num_stages is None:\n"
            f"            compiled = {run}, num_warps=num_warps)\n"
            f"        else:\n"
            f"            compiled = {run}, num_warps=num_warps, num_stages=num_stages)\n"
            + ("        keep(kept, key, compiled)\n" if kept else "")
            + "    return launch\n",
            scope,
        )
        self._at: Callable[..., Callable[..., None]] = scope["at"]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._at(*grid)

    def bind(self, **fixed: Any) -> NamedLaunch:
        """The same kernel with some arguments fixed, for what a layer knows once and for all its calls."""
        return NamedLaunch(self._kernel, **self._fixed, **fixed)


def named_launch(kernel: Any) -> NamedLaunch:
    """Decorator above `triton.jit` of a kernel that the host launches."""
    return NamedLaunch(kernel)


def _kinds(kernel: JITFunction, fixed: dict[str, Any]) -> str:
    """Source of what tells two compiled kernels apart: constants, and the kind of each other argument."""
    return "".join(
        f"{each.name}, "
        if each.is_constexpr
        else f"kind(backend, {each.name}, {each.is_const}, {not each.do_not_specialize}, "
        f"{not each.do_not_specialize_on_alignment}), "
        for each in kernel.params
        if each.name not in fixed
    )


def _keep(kept: dict[Any, tuple[Any, Any, Any]], key: Any, compiled: Any) -> None:
    """Keep what `run` has compiled and launched; it gives none where it only compiled."""
    if compiled is not None:
        if len(kept) >= MOST_KEPT:
            kept.clear()
        kept[key] = compiled.run, compiled.function, compiled.packed_metadata


def _hooked() -> bool:
    """Whether somebody, such as a profiler, wants to be told of launches; `run` does that."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
