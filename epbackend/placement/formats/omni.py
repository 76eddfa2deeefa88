"""OmniPlacement's pattern: npy [ranks, MoE layers, experts] of 0 and 1.

Ranks and layers may differ in slots, but a rank holds an expert once at most, in ascending order. The order of slots
within a rank, node size and provenance are not kept. Dense layers are not in the file.
"""

from __future__ import annotations

import numpy as np

from epbackend.errors import ConfigError
from epbackend.placement.formats.base import (
    PlacementFormat,
    ReadOptions,
    check_no_duplicates,
    imported,
    layout_of_layer,
    moe_layers,
    with_dense,
)
from epbackend.placement.formats.file import NPY, File
from epbackend.placement.formats.npy import array_bytes, read_array
from epbackend.placement.placement import Placement


def _matches(file: File) -> bool:
    if file.kind != NPY:
        return False
    pattern = read_array(file)
    return pattern.ndim == 3 and bool(np.isin(pattern, (0, 1)).all())


def _read(file: File, options: ReadOptions) -> Placement:
    pattern_RYE = read_array(file)
    if 0 in pattern_RYE.shape:
        raise ConfigError(
            f"pattern: must be [ranks, layers, experts], none of them 0, not of shape {pattern_RYE.shape}"
        )
    experts = pattern_RYE.shape[2]
    layers = [
        layout_of_layer(index, [np.flatnonzero(held_E).tolist() for held_E in pattern_RYE[:, index]], experts)
        for index in range(pattern_RYE.shape[1])
    ]
    return imported(with_dense(layers, options.dense_layers), file, "omni")


def _write(placement: Placement, dense_layers: tuple[int, ...]) -> bytes:
    moe = moe_layers(placement, dense_layers)
    check_no_duplicates(moe, "OmniPlacement")
    pattern_RYE = np.zeros((placement.ranks, len(moe), placement.experts), dtype=np.int32)
    for row, (_, layer) in enumerate(moe):
        pattern_RYE[layer.rank_of_slot_P, row, layer.slot_to_expert_P] = 1
    return array_bytes(pattern_RYE)


def _usage(placement: Placement, file: str) -> str:
    return f"OmniPlacement: pattern_path: {file}"


PLACEMENT = PlacementFormat("omni", _matches, _read, _write, _usage)
