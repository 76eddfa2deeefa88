"""Recorded loads and placements in files of several programs: read by content, written by format name.

    loads = read_loads(["prefill.json", "decode.pt"])           # each file is a window
    write(plan(loads, ranks=32, slots=288), "map.json", "vllm-ascend", dense_layers=(0, 1, 2))

A module for each format. Every error is a ConfigError with the file, the field and the remedy. Files are untrusted
input: sizes are checked before parsing, and no pickle is ever run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from epbackend.errors import ConfigError, UnavailableError, did_you_mean
from epbackend.files import replace_file
from epbackend.placement.formats import (
    epbackend,
    expert_map,
    lmdeploy,
    mindie_hotspots,
    npy,
    omni,
    sglang,
    sglang_pt,
    table,
)
from epbackend.placement.formats.base import LoadsFormat, PlacementFormat, ReadOptions
from epbackend.placement.formats.file import PICKLE, File
from epbackend.placement.loads import Loads
from epbackend.placement.placement import Placement

__all__ = ["LOADS", "PLACEMENTS", "ReadOptions", "read", "read_loads", "read_placement", "usage", "write"]

LOADS: dict[str, LoadsFormat] = {
    each.name: each
    for each in (sglang.LOADS, sglang_pt.LOADS, lmdeploy.LOADS, mindie_hotspots.LOADS, npy.LOADS, table.LOADS)
}
PLACEMENTS: dict[str, PlacementFormat] = {
    each.name: each
    for each in (
        epbackend.PLACEMENT,
        sglang.PLACEMENT,
        expert_map.VLLM_ASCEND,
        expert_map.MINDIE,
        omni.PLACEMENT,
        lmdeploy.PLACEMENT,
    )
}

NO_OPTIONS = ReadOptions()


def read_loads(paths: str | Path | Sequence[str | Path]) -> Loads:
    """The windows of all files, in order; files that each hold what one rank recorded are added up to one window.

    Raises:
        ConfigError: a file holds no loads, or loads of another model than the first; or a rank's file is missing.
    """
    each = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not each:
        raise ConfigError("loads: no file is given; name one at least")
    read = [_read_loads(Path(path)) for path in each]
    recorded = _ranks_added_up([loads for loads, _ in read], [rank for _, rank in read])
    windows = [tokens_YE for loads in recorded for tokens_YE in loads.tokens_WYE]
    names = [name for loads in recorded for name in loads.names]
    return Loads.of(windows, names, common_numbering(recorded))


def common_numbering(recorded: Sequence[Loads]) -> str | None:
    """By whose numbers all of these count experts; None where none says it. Raises ConfigError where they differ."""
    known = {loads.numbering: ", ".join(loads.names) for loads in recorded if loads.numbering is not None}
    if len(known) > 1:
        said = ", ".join(f"{names} by those of {numbering}" for numbering, names in known.items())
        raise ConfigError(
            f"loads: they count experts by different numbers, {said}; record all with one checkpoint"
        )
    return next(iter(known), None)


def read_placement(path: str | Path, options: ReadOptions = NO_OPTIONS) -> Placement:
    """The placement of a file; `options` give what its format leaves out. Raises ConfigError if it holds none."""
    found, _, _ = _read(Path(path), [*PLACEMENTS.values(), *LOADS.values()], options)
    if not isinstance(found, Placement):
        raise ConfigError(
            f"{path}: holds loads, not a placement; plan one: epbackend plan {path} --ranks R --slots P --out FILE"
        )
    return found


def read(path: str | Path, name: str | None = None, options: ReadOptions = NO_OPTIONS) -> Loads | Placement:
    """Loads or a placement, by content; with a `name`, only of that format. Raises ConfigError for anything else.

    LMDeploy's statistics are loads, unless the options give slots: then the placement that its EPLB makes of them.
    """
    placements = [
        form for form in PLACEMENTS.values() if options.slots is not None or form is not lmdeploy.PLACEMENT
    ]
    every: list[LoadsFormat | PlacementFormat] = [*placements, *LOADS.values()]
    forms = [form for form in every if name in (None, form.name)]
    if not forms:
        raise _unknown(str(name), {**PLACEMENTS, **LOADS}, "format")
    return _read(Path(path), forms, options)[0]


def write(thing: Loads | Placement, path: str | Path, name: str, dense_layers: tuple[int, ...] = ()) -> None:
    """Writes loads or a placement in the format of that name, by `replace_file`. Equal things give equal bytes.

    Args:
        thing: loads or a placement.
        path: the file; missing folders are made.
        name: of a format of `LOADS` or `PLACEMENTS`.
        dense_layers: layers of a placement that have no experts; formats that number MoE layers only leave them out.

    Raises:
        ConfigError: the format is unknown or for the other kind of thing, it cannot express this one, or the file
            cannot be written.
    """
    written = _writer(thing, name, dense_layers)
    try:
        content = written()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    replace_file(Path(path), content)


def usage(placement: Placement, name: str, path: str | Path) -> str:
    """How to give the file at `path` to the program of that format."""
    return _placement_format(name).usage(placement, str(path))


def _writer(thing: Loads | Placement, name: str, dense_layers: tuple[int, ...]) -> Callable[[], bytes]:
    if isinstance(thing, Placement):
        return partial(_placement_format(name).write, thing, dense_layers)
    writable = {form.name: form.write for form in LOADS.values() if form.write}
    if name not in writable:
        raise _unknown(name, writable, "format of loads to write")
    return partial(writable[name], thing)


def _placement_format(name: str) -> PlacementFormat:
    if name not in PLACEMENTS:
        raise _unknown(name, PLACEMENTS, "format of placements")
    return PLACEMENTS[name]


def _unknown(name: str, known: Iterable[str], what: str) -> ConfigError:
    return ConfigError(f"{name!r} is no {what}{did_you_mean(name, known)}; known are {', '.join(known)}")


def _read_loads(path: Path) -> tuple[Loads, int | None]:
    """The loads of a file, and the rank that recorded them, where the file says it."""
    found, file, form = _read(path, [*LOADS.values(), *PLACEMENTS.values()], None)
    assert isinstance(found, Loads)
    assert isinstance(form, LoadsFormat)
    rank = form.rank(file)
    if rank is not None and (type(rank) is not int or rank < 0):
        raise ConfigError(f"{path}: rank: must be a whole number from 0")
    return found, rank


def _ranks_added_up(recorded: list[Loads], ranks: list[int | None]) -> list[Loads]:
    """Windows as they are, where no file is of one rank among others (SGLang's rank 0 writes down all of them)."""
    if not any(ranks):
        return recorded
    if sorted(rank for rank in ranks if rank is not None) != list(range(len(ranks))):
        said = ", ".join("none" if rank is None else str(rank) for rank in ranks)
        raise ConfigError(
            f"loads: the files are of ranks {said}, each of which recorded its own part; give the file of each rank, "
            "from 0 on, once, and nothing else"
        )
    shapes = {loads.tokens_WYE.shape for loads in recorded}
    if len(shapes) > 1:
        raise ConfigError(f"loads: the files of the ranks have different shapes: {sorted(shapes)}")
    total_WYE = np.sum([loads.tokens_WYE for loads in recorded], axis=0)
    return [Loads(total_WYE, recorded[0].names, common_numbering(recorded))]


def _read(
    path: Path, forms: Sequence[LoadsFormat | PlacementFormat], options: ReadOptions | None
) -> tuple[Loads | Placement, File, LoadsFormat | PlacementFormat]:
    """What the file holds in the first format that matches, the file, and the format; errors start with the path.

    `options`: None where a placement is not wanted.
    """
    hotspots = path / mindie_hotspots.CONFIG
    # Path.is_file raises for a name that is too long.
    file = File(hotspots if os.path.isfile(hotspots) else path)
    try:
        if inner := sorted(path.glob(f"*/{mindie_hotspots.CONFIG}")) if os.path.isdir(path) else []:
            raise ConfigError(f"has a folder for each phase; give one of them: {inner[0].parent}")
        if file.kind == PICKLE:
            raise ConfigError("is a pickle, which may run any code: never read; save it as JSON, CSV or npy")
        form = next((form for form in forms if form.matches(file)), None)
        if form is None:
            names = dict.fromkeys(form.name for form in forms)
            raise ConfigError(f"{file.kind} of none of these formats: {', '.join(names)}")
        if isinstance(form, LoadsFormat):
            return form.read(file), file, form
        if options is None:
            raise ConfigError("holds a placement, not loads; give a recording of the experts' tokens")
        return form.read(file, options), file, form
    except (ConfigError, UnavailableError) as error:
        raise type(error)(f"{path}: {error}") from None
