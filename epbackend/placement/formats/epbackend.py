"""epbackend's own placement: JSON that keeps everything, byte for byte the same when saved again."""

from __future__ import annotations

from epbackend.placement.formats.base import PlacementFormat, ReadOptions
from epbackend.placement.formats.file import File
from epbackend.placement.placement import FORMAT, Placement


def _matches(file: File) -> bool:
    return {"format", "layers"} <= file.keys and file.json["format"] == FORMAT


def _read(file: File, options: ReadOptions) -> Placement:
    return Placement.from_json(file.text)


def _write(placement: Placement, dense_layers: tuple[int, ...]) -> bytes:
    return placement.to_json().encode()


def _usage(placement: Placement, file: str) -> str:
    return f"epbackend: in the config, placement: {{file: {file}}}"


PLACEMENT = PlacementFormat("epbackend", _matches, _read, _write, _usage)
