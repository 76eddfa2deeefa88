"""Writes a checkpoint whose experts have other numbers: file by file, byte by byte, and whole or not at all.

No weight is ever in memory: the kernel copies from file to file. An expert stored by itself stays where it is and only
its tensors' names change; rows change places.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from epbackend.checkpoint import Header
from epbackend.errors import ConfigError

PIECE = 1 << 26
"""Bytes that are copied at once, at most."""
ALIGNMENT = 8
"""Of the header of a safetensors file."""
OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
"""Files that may hold weights; those that are not renumbered are left out, since their experts have old numbers."""
NOT_COPIED = {".git", ".cache"}
LAST = "config.json"
"""Written last: a folder without it is no model to anyone."""

_KEY = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:\s*\{)?')
_ENTRY = re.compile(r'"((?:[^"\\]|\\.)*)"(?:(\s*:\s*)"((?:[^"\\]|\\.)*)")?')

Advance = Callable[[int], None]
"""Called with the bytes that were written."""


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end; after an error nothing is left of it.

    Raises:
        ConfigError: `out` exists, or it cannot be written: no space, no permission.
    """
    if os.path.lexists(out):
        raise ConfigError(f"out: {out} exists; name a folder that does not")
    if not out.parent.is_dir():
        raise ConfigError(f"out: there is no folder {out.parent}; make it")
    unfinished = out.parent / f".{out.name}.unfinished-{os.getpid()}"
    try:
        unfinished.mkdir()
        yield unfinished
        if os.path.lexists(out):
            raise ConfigError(f"out: {out} was made by someone else meanwhile; name another folder")
        unfinished.rename(out)
    except OSError as error:
        raise ConfigError(
            f"out: {out} could not be written: {error.strerror}; nothing is left of it"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_space(folder: Path, needed: int) -> None:
    """Raises ConfigError where a folder has not so many bytes free."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise ConfigError(f"out: {needed:,} bytes are to be written, and {folder} has {free:,} free")


def renamed_header(text: str, names: Mapping[str, str], length: int | None = None) -> bytes:
    """The header of a safetensors file with other names of tensors, all else as it stands.

    Args:
        text: the header, as `Header.text`.
        names: name -> new name, where it changes.
        length: its bytes, filled up with spaces; unless given, as many as before where it fits, else as few as can be.
    """

    def new(match: re.Match[str]) -> str:
        if match[2] is None or match[1] not in names:
            return match[0]
        return f'"{names[match[1]]}"{match[2]}'

    header = _KEY.sub(new, text.rstrip(" ")).encode()
    if length is None:
        length = max(len(text.encode()), -(-len(header) // ALIGNMENT) * ALIGNMENT)
    return header.ljust(length)


def renamed_index(text: str, names: Mapping[str, str]) -> str:
    """The index of a checkpoint with each tensor in the file where it is once `names` are changed; order as before."""
    file_of = json.loads(text)["weight_map"]
    moved = {new: file_of[old] for old, new in names.items() if old in file_of}

    def entry(match: re.Match[str]) -> str:
        if match[2] is None or match[1] not in moved:
            return match[0]
        return f'"{match[1]}"{match[2]}"{moved[match[1]]}"'

    return _ENTRY.sub(entry, text)


def write_weights(
    source: Path,
    target: Path,
    header: Header,
    new_header: bytes,
    rows: Mapping[str, Sequence[int]],
    advance: Advance,
) -> None:
    """A safetensors file under another header; of the tensors in `rows`, each row i is the old row rows[name][i]."""
    with source.open("rb") as stream, target.open("wb", buffering=0) as out:
        out.write(len(new_header).to_bytes(8, "little") + new_header)
        for start, end in _ranges(header, rows, os.fstat(stream.fileno()).st_size):
            while start < end:
                # The kernel copies, as `cp` lets it: twice as fast as reading and writing.
                sent = os.sendfile(out.fileno(), stream.fileno(), start, min(end - start, PIECE))
                if not sent:
                    raise OSError(errno.EIO, f"{source} became shorter meanwhile")
                start += sent
                advance(sent)


def copy_rest(source: Path, target: Path, written: set[str]) -> list[str]:
    """Copies all that is not written yet, folders too; gives the weights that were left out."""
    left_out = []
    for folder, folders, names in os.walk(source, followlinks=True):
        folders[:] = sorted(name for name in folders if name not in NOT_COPIED)
        inside = Path(folder).relative_to(source)
        (target / inside).mkdir(exist_ok=True)
        for name in sorted(names):
            path = str(inside / name)
            if path in written or path == LAST:
                continue
            if OTHER_WEIGHTS.intersection(Path(name.removesuffix(".index.json")).suffixes[-1:]):
                left_out.append(path)
            else:
                shutil.copyfile(source / path, target / path)
    shutil.copyfile(source / LAST, target / LAST)
    return left_out


def link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system cannot do that."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _ranges(header: Header, rows: Mapping[str, Sequence[int]], size: int) -> Iterator[tuple[int, int]]:
    """The ranges of bytes of a file, in the order in which they are written."""
    first = 8 + header.length
    start = first
    moved = sorted((header.tensors[name].start, name) for name in rows if name in header.tensors)
    for begin, name in moved:
        yield start, first + begin
        old_E, tensor = rows[name], header.tensors[name]
        row = (tensor.end - tensor.start) // len(old_E)
        for old in old_E:
            yield first + begin + old * row, first + begin + (old + 1) * row
        start = first + tensor.end
    yield start, size
