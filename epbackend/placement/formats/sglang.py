"""SGLang's JSON: `logical_count` for loads, `physical_to_logical_map` for placements; loads are ours too.

Loads of one window are [layers][experts]. SGLang's own recordings are [steps][layers][experts], a step for each
forward pass, most of them empty: the steps are added up, as SGLang's own EPLB does. If we write several windows, their
names are beside the counts (`windows`), which distinguishes them from steps; and by whose numbers experts are counted
(`numbering`), where that is known. SGLang ignores both keys.

A placement is [layers][slots], slots rank by rank, dense layers too. The ranks are not in the file, node size and
provenance are lost. SGLang passes every key on to its loader, so the file has only that key.
"""

from __future__ import annotations

import json

import numpy as np

from epbackend.errors import ConfigError
from epbackend.placement.formats.base import (
    LoadsFormat,
    PlacementFormat,
    ReadOptions,
    check_equal_slots,
    checked_numbering,
    imported,
    layout_of_layer,
)
from epbackend.placement.formats.file import File, json_rows, number_array
from epbackend.placement.loads import NUMBERING, Loads
from epbackend.placement.placement import Placement

COUNT, MAP, WINDOWS = "logical_count", "physical_to_logical_map", "windows"


def _read_loads(file: File) -> Loads:
    count = number_array(
        file.json[COUNT], COUNT, "[layers][experts] or [steps][layers][experts]", dims=(2, 3)
    )
    numbering = checked_numbering(file.json.get(NUMBERING))
    if WINDOWS not in file.keys:
        return Loads.of(count if count.ndim == 2 else count.sum(axis=0), [file.name], numbering)
    names = file.json[WINDOWS]
    if count.ndim != 3 or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{WINDOWS}: must be the names (texts) of the first level of {COUNT}")
    return Loads(count, tuple(names), numbering)


def loads_bytes(loads: Loads) -> bytes:
    """The file that holds these loads."""
    windows = [json_rows(tokens_YE) for tokens_YE in loads.tokens_WYE]
    head = "" if loads.numbering is None else f'"{NUMBERING}": {json.dumps(loads.numbering)},\n'
    if loads.windows == 1:
        return f'{{{head}"{COUNT}": {windows[0]}}}\n'.encode()
    names = json.dumps(loads.names)
    return f'{{{head}"{WINDOWS}": {names},\n"{COUNT}": [{",".join(windows)}]}}\n'.encode()


def _read_placement(file: File, options: ReadOptions) -> Placement:
    ranks = options.need_ranks("a placement of SGLang")
    expert_YP = number_array(file.json[MAP], MAP, "[layers][slots]", dims=(2,))
    slots, experts = expert_YP.shape[1], int(expert_YP.max()) + 1 if np.isfinite(expert_YP).all() else 0
    if (expert_YP % 1).any() or expert_YP.min() < 0 or not 1 <= experts <= slots:
        raise ConfigError(f"{MAP}: must hold experts, whole numbers from 0 and below the {slots} slots")
    if slots % ranks:
        raise ConfigError(
            f"ranks: {ranks} do not divide the {slots} slots of {MAP}; SGLang has as many on each"
        )
    expert_YRL = expert_YP.astype(np.int64).reshape(len(expert_YP), ranks, -1).tolist()
    layers = tuple(layout_of_layer(index, held, experts) for index, held in enumerate(expert_YRL))
    return imported(layers, file, "sglang")


def _write_placement(placement: Placement, dense_layers: tuple[int, ...]) -> bytes:
    check_equal_slots(list(enumerate(placement.layers)), "SGLang")
    expert_YP = np.stack([layer.slot_to_expert_P for layer in placement.layers])
    return f'{{"{MAP}": {json_rows(expert_YP)}}}\n'.encode()


def _usage(placement: Placement, file: str) -> str:
    layer = placement.layers[0]
    return (
        f"SGLang: --ep-size {layer.ranks} --ep-num-redundant-experts {layer.slots - layer.experts} "
        f"--init-expert-location {file} (a name that ends in .json)"
    )


LOADS = LoadsFormat(
    "sglang",
    lambda file: COUNT in file.keys,
    _read_loads,
    loads_bytes,
    lambda file: file.json.get("rank"),
)
PLACEMENT = PlacementFormat(
    "sglang",
    lambda file: MAP in file.keys and COUNT not in file.keys,
    _read_placement,
    _write_placement,
    _usage,
)
