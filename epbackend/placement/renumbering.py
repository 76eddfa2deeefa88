"""`Renumbering`: the experts of a checkpoint under new numbers; and what that means for loads and placements.

`epbackend renumber` writes it beside the weights (`FILE`). Recorded loads and placements say which numbering they count
in, where that is known: `ORIGINAL`, or the `name` of a renumbering. What counts in the original one is translated for
a renumbered checkpoint; what counts in another one is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from epbackend.errors import ConfigError
from epbackend.placement.loads import ORIGINAL, Loads
from epbackend.placement.placement import Layout, Placement

FILE = "epbackend-renumbering.json"
"""Its name in the folder of a checkpoint."""
FORMAT, FORMAT_VERSION = "epbackend-renumbering", 1

logger = logging.getLogger("epbackend")


@dataclass(frozen=True, eq=False)
class Renumbering:
    """Which expert of the original checkpoint is behind each number.

    Raises:
        ConfigError: a layer is no permutation of its experts.
    """

    old_YE: np.ndarray
    """The original number of each expert, int64 [Y, E]; a layer that was left alone, or has no experts, is in order."""
    planned_on: tuple[str, ...] = ()
    """Fingerprints of the windows of loads that it was planned on, counted in the original numbering."""
    headers: Mapping[str, int] = field(default_factory=dict)
    """Weight file -> bytes of its original header, so that undoing gives the same file."""

    def __post_init__(self) -> None:
        experts = np.arange(self.old_YE.shape[1])
        for layer, old_E in enumerate(np.sort(self.old_YE, axis=1)):
            if not np.array_equal(old_E, experts):
                raise ConfigError(f"layers[{layer}]: must hold each expert from 0 to {experts.size - 1} once")

    @cached_property
    def name(self) -> str:
        """Names this numbering: the same experts under the same numbers have the same name."""
        return _digest(self.old_YE.astype("<i8"))

    @property
    def new_YE(self) -> np.ndarray:
        """The number that each original expert has now, int64 [Y, E]."""
        return np.argsort(self.old_YE, axis=1)

    @property
    def changed(self) -> tuple[int, ...]:
        """Layers whose experts have other numbers."""
        in_order = np.arange(self.old_YE.shape[1])
        return tuple(np.flatnonzero((self.old_YE != in_order).any(axis=1)).tolist())

    def to_json(self) -> str:
        """Text that `from_json` reads; null stands for a layer in order."""
        changed = set(self.changed)
        rows = [
            json.dumps(row, separators=(",", ":")) if layer in changed else "null"
            for layer, row in enumerate(self.old_YE.tolist())
        ]
        head = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "name": self.name,
            "experts": self.old_YE.shape[1],
            "planned_on": list(self.planned_on),
            "headers": dict(sorted(self.headers.items())),
        }
        return json.dumps(head, indent=1)[:-2] + ',\n "old_numbers": [\n' + ",\n".join(rows) + "\n]\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Renumbering:
        """Raises ConfigError for a text that is no renumbering, naming the field."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"is not JSON: {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ConfigError(f'is no renumbering: "format" must be "{FORMAT}"')
        if data.get("version") != FORMAT_VERSION:
            raise ConfigError(
                f"version: {data.get('version')!r} is unknown; this epbackend reads {FORMAT_VERSION}"
            )
        experts, rows = data.get("experts"), data.get("old_numbers")
        if type(experts) is not int or experts < 1 or not isinstance(rows, list) or not rows:
            raise ConfigError('needs "experts", a whole number, and "old_numbers", a list for each layer')
        for layer, row in enumerate(rows):
            if row is not None and not (isinstance(row, list) and len(row) == experts and _experts(row)):
                raise ConfigError(f"old_numbers[{layer}]: must be null or {experts} experts")
        planned_on, headers = data.get("planned_on"), data.get("headers")
        if not isinstance(planned_on, list) or not all(isinstance(each, str) for each in planned_on):
            raise ConfigError("planned_on: must be a list of texts")
        if not isinstance(headers, dict) or not all(type(each) is int for each in headers.values()):
            raise ConfigError("headers: must map files to numbers of bytes")
        old_YE = np.array([list(range(experts)) if row is None else row for row in rows], dtype=np.int64)
        return cls(old_YE, tuple(planned_on), headers)

    @classmethod
    def beside(cls, folder: str | Path) -> Renumbering | None:
        """That of the checkpoint in a folder; None where it was never renumbered.

        Raises:
            ConfigError: the file is unreadable.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            return None
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (ConfigError, OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from None


def numbering_of(renumbering: Renumbering | None) -> str:
    """What loads that are recorded on this checkpoint, and placements for it, say of their numbering."""
    return ORIGINAL if renumbering is None else renumbering.name


def loads_for(renumbering: Renumbering | None, loads: Loads) -> Loads:
    """Loads, counted by the numbers of a checkpoint.

    Raises:
        ConfigError: they are known to count by those of another one.
    """
    known = loads.numbering
    if known is None and renumbering is not None:
        same = [fingerprint(tokens_YE) in renumbering.planned_on for tokens_YE in loads.tokens_WYE]
        known = ORIGINAL if all(same) else None
    if not _translates(renumbering, known, f"loads: {', '.join(loads.names)} count"):
        return loads
    assert renumbering is not None
    old_WYE = np.broadcast_to(
        _rows_for(renumbering.old_YE, loads.layers, loads.experts), loads.tokens_WYE.shape
    )
    tokens_WYE = np.take_along_axis(loads.tokens_WYE, old_WYE, axis=2)
    return Loads(tokens_WYE, loads.names, renumbering.name)


def placement_for(renumbering: Renumbering | None, placement: Placement) -> Placement:
    """A placement, by the numbers of a checkpoint.

    Raises:
        ConfigError: it is known to be by those of another one.
    """
    if not _translates(renumbering, placement.numbering, "placement: it counts"):
        return placement
    assert renumbering is not None
    new_YE = _rows_for(renumbering.new_YE, len(placement.layers), placement.experts)
    layers = tuple(
        Layout(tuple(tuple(new_E[list(held)].tolist()) for held in layer.experts_of_rank), layer.experts)
        for layer, new_E in zip(placement.layers, new_YE, strict=True)
    )
    return replace(placement, layers=layers).with_options(numbering=renumbering.name)


def fingerprint(tokens_YE: np.ndarray) -> str:
    """Of one window of loads: the same counts have the same one."""
    return _digest(np.ascontiguousarray(tokens_YE, dtype="<f8"))


def _translates(renumbering: Renumbering | None, known: Any, what: str) -> bool:
    """Whether what counts in the numbering `known` (None: nobody knows) has to be translated for a checkpoint."""
    wanted = numbering_of(renumbering)
    if known == wanted or (known is None and renumbering is None):
        return False
    if known is None:
        logger.warning(
            "%s experts by numbers of which it does not say whether they are those of the renumbered checkpoint; they "
            "are taken for these",
            what,
        )
        return False
    if known != ORIGINAL:
        raise ConfigError(
            f"{what} experts by the numbers of the renumbered checkpoint {known}, but the model's numbers are "
            f"{'the original ones' if renumbering is None else f'those of {wanted}'}; record with this model, or give "
            "that checkpoint"
        )
    return True


def _rows_for(number_YE: np.ndarray, layers: int, experts: int) -> np.ndarray:
    """The numbers of all layers. Raises ConfigError for loads or a placement of another model."""
    for name, given, known in zip(("layers", "experts"), (layers, experts), number_YE.shape, strict=True):
        if given != known:
            raise ConfigError(
                f"{name}: {given}, but the renumbered checkpoint has {known}; use those of the same model"
            )
    return number_YE


def _experts(row: list[Any]) -> bool:
    """Whether these are numbers of experts."""
    return all(type(each) is int and 0 <= each < len(row) for each in row)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()[:12]
