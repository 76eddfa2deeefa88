"""A CUDA graph's part where there is no GPU: what a call did is done again on the same memory, without its Python.

Recorded are the launches of kernels in Triton's interpreter and the operators of torch, collectives among them, each
with the very tensors and numbers that it was given. What Python decided once stays decided, as in a captured graph:
whoever wants a replay to do something else has to write it into memory that was there before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from epbackend.kernels.id_check import ExpertIdCheck

READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


@dataclass(frozen=True)
class Given:
    """A tensor among a launch's arguments."""

    address: int | None
    """None: it was made after the recording began, as the memory of a graph's own pool."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class RecordedGraph(TorchDispatchMode):
    """`with RecordedGraph() as graph: out = call()`, then `graph.replay()` fills `out` again."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []
        """Kernel, grid and arguments of each launch."""
        self._again: list[Callable[[], None]] = []
        self._made: list[Tensor] = []
        self._patches = [
            mock.patch.object(InterpretedFunction, "run", self._launch()),
            mock.patch.object(ExpertIdCheck, "report"),  # a look at the host's own memory
        ]

    def __enter__(self) -> RecordedGraph:
        for each in self._patches:
            each.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for each in self._patches:
            each.stop()

    def replay(self) -> None:
        for each in self._again:
            each()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not READS & set(func.tags), f"{func} reads a value back, which no captured graph can"
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        old = {_memory(each) for each in _tensors((args, kwargs))}
        new = [each for each in _tensors(out) if _memory(each) not in old]
        self._made += new

        def again() -> None:
            found = func(*args, **kwargs)
            for each in tree_leaves(found):
                if isinstance(each, torch.ScriptObject) and hasattr(each, "wait"):  # of a collective
                    each.wait()
            for result, place in zip(_tensors(found), _tensors(out), strict=True):
                if any(place is each for each in new):
                    place.copy_(result)

        self._again.append(again)
        return out

    def _launch(self) -> Callable[..., None]:
        run, graph = InterpretedFunction.run, self

        def launch(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
            def again() -> None:
                run(kernel, *args, grid=grid, warmup=warmup, **options)

            made = {_memory(each) for each in graph._made}
            given = tuple(_given(each, made) for each in args)
            graph.launches.append((kernel.fn.__name__, grid, given))
            graph._again.append(again)
            with _disable_current_modes():
                again()

        return launch


def _given(value: Any, made: set[int]) -> Any:
    base = getattr(value, "base", value)  # of a descriptor, whose other parts are its tensor's and constants
    if not isinstance(base, Tensor):
        return value
    address = None if _memory(base) in made else base.data_ptr()
    given = Given(address, tuple(base.shape), base.stride(), base.dtype)
    return given if base is value else (given, *value.shape, *value.strides, *value.block_shape)


def _tensors(values: Any) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
