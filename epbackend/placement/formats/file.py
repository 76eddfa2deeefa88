"""A file as untrusted input: its size and kind are checked before it is parsed."""

from __future__ import annotations

import json
import pickle
import stat
import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from epbackend.errors import ConfigError

MAX_TEXT_BYTES = 32 << 20
"""Parsed text takes more than ten times its size in memory."""
MAX_BINARY_BYTES = 1 << 30
MAX_VALUES = 1 << 26
"""Numbers in one array: 1000 steps of 256 experts in 256 layers."""

BROKEN = (
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What zipfile, NumPy, pickletools and torch raise for damaged files."""

NPY, ZIP, PICKLE, JSON, TEXT = "npy", "zip", "pickle", "JSON", "text"


@dataclass(frozen=True)
class File:
    """Read on demand, and once. Raises ConfigError for what cannot be read; the caller adds the path in front."""

    path: Path

    @property
    def name(self) -> str:
        """Its name in windows and provenance."""
        return self.path.stem

    @cached_property
    def size(self) -> int:
        """In bytes. A pipe or a device has no size, and is refused."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            raise ConfigError("there is no such file") from None
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}") from None
        except ValueError as error:  # a null character
            raise ConfigError(f"is no path of a file: {error}") from None
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError("is no regular file; give the path of a file")
        return status.st_size

    @cached_property
    def kind(self) -> str:
        """By its first bytes: NPY, ZIP, PICKLE, JSON or TEXT."""
        head = self._bytes(min(self.size, 512))
        if not head.strip():
            raise ConfigError("is empty")
        if head.startswith(b"\x93NUMPY"):
            return NPY
        if head.startswith(b"PK\x03\x04"):
            return ZIP
        if head[:1] == b"\x80" and head[1:2] <= b"\x05":
            return PICKLE
        return JSON if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[") else TEXT

    @cached_property
    def text(self) -> str:
        """All of it as UTF-8."""
        self.check_size(MAX_TEXT_BYTES)
        try:
            return self._bytes(self.size).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ConfigError("is neither text nor a known binary format") from None

    @cached_property
    def json(self) -> Any:
        """The parsed text; None for a file that is no JSON by its first character."""
        if self.kind != JSON:
            return None
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"is truncated or broken JSON: {error}") from None

    @property
    def keys(self) -> frozenset[str]:
        """The keys of a JSON object; none for anything else."""
        return frozenset(self.json) if isinstance(self.json, dict) else frozenset()

    def check_size(self, limit: int) -> None:
        """Raises ConfigError for a file that is larger."""
        if self.size > limit:
            raise ConfigError(
                f"has {self.size >> 20} MiB, more than the {limit >> 20} MiB that are read; record fewer steps, or add "
                "them up"
            )

    def _bytes(self, count: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                return file.read(count)
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}") from None


def first_line(error: Exception) -> str:
    """What a library says of a broken file, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_values(shape: tuple[int, ...]) -> None:
    """Raises ConfigError for an array with more numbers than are read, before it takes any memory."""
    count = 1
    for extent in shape:
        count *= int(extent)  # Python's own integers do not overflow
    if count > MAX_VALUES:
        raise ConfigError(
            f"holds an array of shape {shape}: more than the {MAX_VALUES:,} numbers that are read; add up its steps"
        )


def number_array(data: Any, field: str, form: str, *, dims: tuple[int, ...]) -> np.ndarray:
    """Nested JSON lists as a float64 array of one of the given numbers of dimensions; `form` describes it in errors."""
    shape: list[int] = []
    items = [data]
    while len(shape) <= max(dims) and all(type(item) is list for item in items):
        lengths = {len(item) for item in items}
        if len(lengths) > 1 or lengths == {0}:
            raise ConfigError(f"{field}: must be {form}: all lists of a level equally long, none empty")
        shape.append(lengths.pop())
        items = [part for item in items for part in item]
    if len(shape) not in dims:
        raise ConfigError(f"{field}: must be {form}, but has {len(shape)} levels of lists")
    if odd := [item for item in items if type(item) not in (int, float)]:
        raise ConfigError(f"{field}: must be {form} of numbers, but holds {str(odd[0])[:40]!r}")
    try:
        return np.array(items, dtype=np.float64).reshape(shape)
    except OverflowError:
        raise ConfigError(f"{field}: holds a number too large for any count of tokens") from None


def json_rows(array: np.ndarray) -> str:
    """A two-dimensional array as JSON, one row a line; whole numbers are written as such."""
    whole = array.dtype.kind in "iu" or bool((np.mod(array, 1) == 0).all() and (np.abs(array) < 2**53).all())
    rows = (array.astype(np.int64) if whole else array).tolist()
    return "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]"
