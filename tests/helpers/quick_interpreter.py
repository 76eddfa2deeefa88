"""Triton's interpreter without what it repeats: whoever imports this has it so in the whole process.

A launch replaces the functions of `triton.language` by interpreted ones, and puts them back when it ends. Each call of
a kernel's helper, `tl.sum` for one, looks through the language again for what is left to replace: two fifths of the
time of these tests. Here a launch replaces all at once, and a helper finds it so. The table of NumPy's types, made for
each value, takes an eighth more: here a type is looked up once.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_replace = interpreter._patch_lang
_numpy_of_scalar = cache(interpreter._get_np_dtype)
_WHOLE_LANGUAGE = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
"""Stands for a kernel that sees both modules: `tl` is what ours name, `core` what Triton's own helpers do."""


def _call(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """A kernel's call of a helper: Triton's own, without the look."""
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def _numpy_of(kind: tl.dtype) -> np.dtype:
    """NumPy's type for the elements of a value, those of a block included; a pointer is its address."""
    return np.dtype(np.uint64) if kind.scalar.is_ptr() else _numpy_of_scalar(kind.scalar)


interpreter._get_np_dtype = _numpy_of
interpreter._patch_lang = lambda kernel: _replace(_WHOLE_LANGUAGE)
interpreter.InterpretedFunction.__call__ = _call
