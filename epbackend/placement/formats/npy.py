"""NumPy's own files: [layers, experts], or [windows, layers, experts]."""

from __future__ import annotations

import io
import math
from typing import IO

import numpy as np

from epbackend.errors import ConfigError
from epbackend.placement.formats.base import LoadsFormat
from epbackend.placement.formats.file import BROKEN, MAX_BINARY_BYTES, NPY, File, check_values, first_line
from epbackend.placement.loads import Loads

NUMBERS, TEXT = "iufb", "U"
"""Kinds of NumPy's types."""


def read_array(file: File) -> np.ndarray:
    """The array, numbers only. Its header is checked first: shape and type against the size of the file."""
    file.check_size(MAX_BINARY_BYTES)
    try:
        with file.path.open("rb") as opened:
            return array_in(opened, file.size)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None


def array_in(opened: IO[bytes], size: int, kinds: str = NUMBERS) -> np.ndarray:
    """The array in an open npy file, or a member of an archive, of so many bytes; checked as `read_array` says.

    `kinds` are those of the types that it may have, as NumPy calls them.
    """
    try:
        version = np.lib.format.read_magic(opened)
        if version > (2, 0):  # 3.0 differs only in the names of record fields, which are not numbers
            raise ConfigError(f"is npy of version {version}; save a plain array of numbers")
        header = (
            np.lib.format.read_array_header_1_0 if version < (2, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = header(opened)
        start = opened.tell()
    except BROKEN as error:
        raise ConfigError(f"has a broken npy header: {first_line(error)}") from None
    if dtype.kind not in kinds:
        raise ConfigError(
            f"holds {dtype}, not {'a text' if kinds == TEXT else 'numbers'}; pickled objects are never loaded"
        )
    check_values(shape)
    if min(shape, default=0) < 0 or size != start + math.prod(shape) * dtype.itemsize:
        raise ConfigError(f"is truncated: a {dtype} array of shape {shape} does not fit its {size:,} bytes")
    try:
        opened.seek(0)
        return np.lib.format.read_array(opened, allow_pickle=False)
    except BROKEN as error:
        raise ConfigError(f"is a broken npy: {first_line(error)}") from None


def array_bytes(array: np.ndarray) -> bytes:
    """The content of a npy file; the same array always gives the same bytes."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _read(file: File) -> Loads:
    tokens = read_array(file)
    if tokens.ndim not in (2, 3):
        raise ConfigError(
            f"shape: {tokens.shape} is neither [layers, experts] nor [windows, layers, experts]; reshape the array"
        )
    if tokens.ndim == 2 or len(tokens) == 1:
        return Loads.of(tokens.reshape(tokens.shape[-2:]), [file.name])
    return Loads(tokens, tuple(f"{file.name} {window}" for window in range(len(tokens))))


def _write(loads: Loads) -> bytes:
    return array_bytes(loads.tokens_WYE[0] if loads.windows == 1 else loads.tokens_WYE)


LOADS = LoadsFormat("npy", lambda file: file.kind == NPY, _read, _write)
