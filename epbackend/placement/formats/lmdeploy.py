"""LMDeploy's `LMDEPLOY_EPLB_EXPERTS_STATISTIC_FILE`: JSON [layers][experts], tokens of each expert, dense layers too.

LMDeploy reads no placement: it runs its own EPLB on these counts. A placement is written as made-up counts from which
that EPLB makes the placement (`lmdeploy_counts`), and read by running the EPLB. This needs certain settings, one group
and one node (see `usage`): then it bin packs over all ranks. Slots of a rank may change their order; node size and
provenance are not kept.
"""

from __future__ import annotations

import numpy as np

from epbackend.errors import ConfigError
from epbackend.placement.formats.base import (
    LoadsFormat,
    PlacementFormat,
    ReadOptions,
    check_equal_slots,
    imported,
    moe_layers,
)
from epbackend.placement.formats.file import File, json_rows, number_array
from epbackend.placement.formats.lmdeploy_counts import counts_for
from epbackend.placement.loads import Loads
from epbackend.placement.placement import Layout, Placement
from epbackend.placement.planners.eplb import rebalance


def _matches(file: File) -> bool:
    return isinstance(file.json, list)


def _read_loads(file: File) -> Loads:
    return Loads.of(number_array(file.json, "statistics", "[layers][experts]", dims=(2,)), [file.name])


def _write_loads(loads: Loads) -> bytes:
    """Several windows as their mixture: the file holds one."""
    return (json_rows(loads.mixture_YE()) + "\n").encode()


def _read_placement(file: File, options: ReadOptions) -> Placement:
    loads = _read_loads(file)
    ranks = options.need_ranks("LMDeploy's statistics file")
    slots = loads.experts if options.slots is None else options.slots
    if slots % ranks or not loads.experts <= slots <= loads.experts * ranks:
        raise ConfigError(
            f"slots: {slots} must be a multiple of the {ranks} ranks, from {loads.experts} to {loads.experts * ranks}"
        )
    expert_YP = rebalance(loads.tokens_WYE[0], slots, ranks)
    layers = tuple(Layout.of(expert_P, ranks, loads.experts) for expert_P in expert_YP)
    return imported(layers, file, "lmdeploy")


def _write_placement(placement: Placement, dense_layers: tuple[int, ...]) -> bytes:
    """Raises ConfigError for a layer that EPLB cannot be made to answer."""
    layers = moe_layers(placement, dense_layers)
    check_equal_slots(layers, "LMDeploy")
    count_YE = np.ones((len(placement.layers), placement.experts))  # those of dense layers are not used
    for index, layer in layers:
        try:
            count_YE[index] = counts_for(layer)
        except ConfigError as error:
            raise ConfigError(
                f"layer {index}: LMDeploy's EPLB cannot be brought to this placement: {error}. Use the placement in "
                "epbackend's config instead, or give a dense layer as such (--dense-layers)"
            ) from None
    return (json_rows(count_YE) + "\n").encode()


def _usage(placement: Placement, file: str) -> str:
    redundant = max(layer.slots for layer in placement.layers) - placement.experts
    return (
        f"LMDeploy: LMDEPLOY_EPLB_EXPERTS_STATISTIC_FILE={file} LMDEPLOY_EPLB_NUM_GROUPS=1 "
        f"LMDEPLOY_EPLB_RANKS_PER_NODE={placement.ranks} LMDEPLOY_EPLB_NUM_REDUNDANT_EXPERTS={redundant}, enable_eplb"
    )


LOADS = LoadsFormat("lmdeploy", _matches, _read_loads, _write_loads)
PLACEMENT = PlacementFormat("lmdeploy", _matches, _read_placement, _write_placement, _usage)
