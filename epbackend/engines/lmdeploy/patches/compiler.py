"""LMDeploy's small helpers run as they are on a CPU, not compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from epbackend.engines.lmdeploy.patching import patch


@patch(
    "torch:compile",
    why="compiling LMDeploy's rotary embedding and norm takes 4 to 28 s of a first start, the compiler's import 2 s",
    when="cpu",
)
def lmdeploy_uncompiled(original: Callable) -> Callable:
    def compile_others(model: Any = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(compile_others, **options)
        if not getattr(model, "__module__", "").startswith("lmdeploy."):
            return original(model, **options)
        return _compiled_later(model, lambda: original(model, **options))

    return compile_others


def _compiled_later(function: Callable, compiled: Callable[[], Callable]) -> Callable:
    """Runs the function as it is while this patch is applied, and compiles it at the first call without it."""
    once = functools.cache(compiled)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        patched = torch.compile.__module__ == __name__
        return function(*args, **kwargs) if patched else once()(*args, **kwargs)

    return run
