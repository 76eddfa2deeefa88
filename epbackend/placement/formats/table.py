"""Loads as CSV: a line for each count under the header `layer,expert,tokens`, or a plain matrix, a line for each layer.

Several windows have a further column `window` in front, with their names. Counts that are left out are 0.
"""

from __future__ import annotations

import csv
import io
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

import numpy as np

from epbackend.errors import ConfigError
from epbackend.placement.formats.base import LoadsFormat
from epbackend.placement.formats.file import MAX_VALUES, TEXT, File, check_values
from epbackend.placement.loads import Loads

HEADER = ["layer", "expert", "tokens"]


def _read(file: File) -> Loads:
    rows = _rows(file)
    head = list(islice(rows, 1))
    names = [cell.strip().lower() for _, cells in head for cell in cells]
    if names in (HEADER, ["window", *HEADER]):
        return _read_list(rows, file.name, named=len(names) > len(HEADER))
    return Loads.of(_matrix(chain(head, rows)), [file.name])


def read_matrix(file: File) -> np.ndarray:
    """The numbers of a csv file without a header, float64. Raises ConfigError, with the line, for anything else."""
    return _matrix(_rows(file))


def _rows(file: File) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row that is not empty. Raises ConfigError, with the line, for text that is no csv."""
    lines = csv.reader(io.StringIO(file.text))
    try:
        yield from ((number, row) for number, row in enumerate(lines, 1) if any(row))
    except csv.Error as error:
        raise ConfigError(f"line {lines.line_num}: is no csv: {error}") from None


def _matrix(rows: Iterable[tuple[int, list[str]]]) -> np.ndarray:
    values, width = array("d"), 0
    for number, row in rows:
        width = width or len(row)
        if len(row) != width:
            raise ConfigError(
                f"line {number}: has {len(row)} numbers, the first one has {width}; make them equal"
            )
        values.extend(_number(float, cell, number) for cell in row)
    if not width:
        raise ConfigError("has no number in any line")
    return np.array(values).reshape(-1, width)


def _read_list(rows: Iterable[tuple[int, list[str]]], name: str, *, named: bool) -> Loads:
    """A line for each count; the first column is the name of the window if they are `named`."""
    window_of: dict[str, int] = {}
    indices, tokens = array("q"), array("d")
    for number, row in rows:
        if len(row) != len(HEADER) + named:
            raise ConfigError(f"line {number}: has {len(row)} fields, the header {len(HEADER) + named}")
        layer_expert = [int(_number(int, cell, number)) for cell in row[-3:-1]]
        if not all(0 <= index < MAX_VALUES for index in layer_expert):
            raise ConfigError(
                f"line {number}: layer {layer_expert[0]}, expert {layer_expert[1]}: must be 0 or more, and sensible"
            )
        indices.extend([window_of.setdefault(row[0] if named else name, len(window_of)), *layer_expert])
        tokens.append(_number(float, row[-1], number))
    if not tokens:
        raise ConfigError("has a header and no counts")
    cells = np.array(indices).reshape(-1, 3)  # (window, layer, expert) of each count
    shape = tuple((cells.max(axis=0) + 1).tolist())
    check_values(shape)
    flat = np.ravel_multi_index(tuple(cells.T), shape)
    if len(repeated := np.flatnonzero(np.bincount(flat) > 1)):
        _, layer, expert = np.unravel_index(repeated[0], shape)
        raise ConfigError(f"layer {layer}, expert {expert}: is there more than once; add its counts up")
    tokens_WYE = np.zeros(shape)
    tokens_WYE.flat[flat] = tokens
    return Loads(tokens_WYE, tuple(window_of))


def _number(kind: Callable[[str], float], cell: str, line: int) -> float:
    try:
        return kind(cell)
    except ValueError:
        raise ConfigError(
            f"line {line}: {cell[:40]!r} is no number; write a matrix of numbers, or the header {','.join(HEADER)}"
        ) from None


def _write(loads: Loads) -> bytes:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    named = loads.windows > 1
    lines.writerow(["window"] * named + HEADER)
    for (window, layer, expert), tokens in np.ndenumerate(loads.tokens_WYE):
        value = float(tokens)
        lines.writerow(
            [loads.names[window]] * named + [layer, expert, int(value) if value.is_integer() else value]
        )
    return text.getvalue().encode()


LOADS = LoadsFormat("csv", lambda file: file.kind == TEXT, _read, _write)
