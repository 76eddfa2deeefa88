"""Pairs in files: JSON with `logical_pairs`, [layers][experts][experts], beside SGLang's `logical_count`; or npz.

The npz holds the same under `logical_pairs`, compressed. Both say by whose numbers
experts are counted (`numbering`), where that is known.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np

from epbackend.errors import ConfigError
from epbackend.files import replace_file
from epbackend.placement.formats.base import checked_numbering
from epbackend.placement.formats.file import (
    BROKEN,
    MAX_VALUES,
    ZIP,
    File,
    first_line,
    json_rows,
    number_array,
)
from epbackend.placement.formats.npy import NUMBERS, TEXT, array_in
from epbackend.placement.loads import NUMBERING
from epbackend.placement.pairs import Pairs

PAIRS = "logical_pairs"


def read_pairs(path: str | Path) -> Pairs:
    """The pairs of a file, JSON or npz by content; it is untrusted input, as all files are.

    Raises:
        ConfigError: it holds no pairs, or such as cannot be.
    """
    file = File(Path(path))
    try:
        if file.kind == ZIP:
            tokens_YEE, numbering = _from_npz(file)
        elif PAIRS in file.keys:
            tokens_YEE = number_array(file.json[PAIRS], PAIRS, "[layers][experts][experts]", dims=(3,))
            numbering = file.json.get(NUMBERING)
        else:
            raise ConfigError(
                f'pairs: holds none: JSON needs "{PAIRS}", npz an array of that name; record them '
                "(epbackend record --pairs)"
            )
        return Pairs(tokens_YEE, file.name, checked_numbering(numbering))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def write_pairs(pairs: Pairs, path: str | Path) -> None:
    """Writes npz to a path that ends in .npz, JSON to any other. Equal pairs give equal bytes.

    Raises:
        ConfigError: the file cannot be written.
    """
    replace_file(Path(path), _npz_bytes(pairs) if Path(path).suffix == ".npz" else _json_bytes(pairs))


def _from_npz(file: File) -> tuple[np.ndarray, str | None]:
    try:
        with zipfile.ZipFile(file.path) as archive:
            sizes = {member.filename: member.file_size for member in archive.infolist()}
            if (unpacked := sum(sizes.values())) > 8 * MAX_VALUES:
                raise ConfigError(
                    f"unpacks to {unpacked >> 20} MiB, more than the {8 * MAX_VALUES >> 20} MiB that are read"
                )
            if f"{PAIRS}.npy" not in sizes:
                raise ConfigError(
                    f"pairs: the npz has no array {PAIRS}; record them (epbackend record --pairs)"
                )
            tokens_YEE = _member(archive, PAIRS, NUMBERS)
            numbering = _member(archive, NUMBERING, TEXT).item() if f"{NUMBERING}.npy" in sizes else None
    except BROKEN as error:
        raise ConfigError(f"is a broken npz: {first_line(error)}") from None
    return tokens_YEE, numbering


def _member(archive: zipfile.ZipFile, name: str, kinds: str) -> np.ndarray:
    """The array of that name. Raises ConfigError for one of another kind, and what zipfile raises."""
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as opened:
        try:
            return array_in(opened, member.file_size, kinds)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None


def _json_bytes(pairs: Pairs) -> bytes:
    head = "" if pairs.numbering is None else f'"{NUMBERING}": {json.dumps(pairs.numbering)},\n'
    layers = ",\n".join(json_rows(tokens_EE) for tokens_EE in pairs.tokens_YEE)
    return f'{{{head}"{PAIRS}": [{layers}]}}\n'.encode()


def _npz_bytes(pairs: Pairs) -> bytes:
    arrays = {PAIRS: pairs.tokens_YEE}
    if (pairs.tokens_YEE % 1 == 0).all():
        arrays[PAIRS] = pairs.tokens_YEE.astype(np.int64)
    if pairs.numbering is not None:
        arrays[NUMBERING] = np.array(pairs.numbering)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()
