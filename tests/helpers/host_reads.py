"""Finds where code waits for a device to read something back, on a machine that has none."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

READS = {"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__"}
TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class HostReads:
    """`with HostReads() as reads:` collects the names of methods and operators that need a value on the host.

    Methods such as `tolist` read by themselves; an operator whose output depends on values in its shape (`nonzero`,
    `tensor[mask]`) reads the shape.
    """

    def __enter__(self) -> list[str]:
        self._found: list[str] = []
        self._modes = _Methods(self._found), _Operators(self._found)
        for mode in self._modes:
            mode.__enter__()
        return self._found

    def __exit__(self, *error) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class Unwatched:
    """Something whose methods are not looked at: kernels that may read on a CPU, where it costs nothing."""

    def __init__(self, inner) -> None:
        self._inner = inner

    def __getattr__(self, name: str):
        method = getattr(self._inner, name)

        def call(*args, **options):
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return method(*args, **options)

        return call if callable(method) else method


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READS:
            self._found.append(name)
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if TAGS & set(func.tags):
            self._found.append(str(func))
        return func(*args, **(kwargs or {}))
