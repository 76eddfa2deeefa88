"""The placement of a deployment: read or planned once, before any rank starts, and handed to the ranks."""

from __future__ import annotations

import logging
import zlib
from base64 import b64decode, b64encode
from dataclasses import replace
from typing import Any

import numpy as np

from epbackend.config import EPConfig, PlacementSettings
from epbackend.device import get_device
from epbackend.errors import ConfigError, UnavailableError
from epbackend.names import LEVEL_BY_NODE, LEVELLING, PHASES
from epbackend.placement.formats import ReadOptions, read_loads, read_placement
from epbackend.placement.loads import Loads
from epbackend.placement.placement import Layout, Placement, with_speeds
from epbackend.placement.planners import plan
from epbackend.placement.renumbering import Renumbering, loads_for, placement_for
from epbackend.placement.replica_split import level_by_node_shares, own_quota
from epbackend.replica_split import SlotMap

MAX_TEXT = 130_000
"""Characters. Linux gives one variable 128 KiB; DeepSeek-V3 on 64 ranks (61 layers of 320 slots) takes about 40,000."""

logger = logging.getLogger("epbackend")


def finished_placement(
    config: EPConfig,
    layers: int | None = None,
    dense_layers: tuple[int, ...] = (),
    renumbering: Renumbering | None = None,
) -> Placement | None:
    """Where the experts live: from `placement.file`, or planned on `placement.loads`; None without either.

    `layers` and `dense_layers` are the model's, where it is known: files that number only layers with experts are read
    by them, and loads that give tokens to a layer without experts are refused. What counts experts by the numbers that
    they had before the model's `renumbering` is translated.

    Raises:
        ConfigError: a file is missing or holds something else, or the settings cannot work for what it holds.
    """
    settings = config.placement
    if not settings.given:
        return None
    try:
        if settings.file is not None:
            found = _read(settings, config.ep_size, layers, dense_layers)
            return found if layers is None else placement_for(renumbering, found)
        loads = read_loads(settings.loads)
        if layers == loads.layers + len(dense_layers):  # of layers with experts only
            loads = loads.with_dense(dense_layers)
        _check_dense(loads, dense_layers)
        if layers is not None:
            loads = loads_for(renumbering, loads)
        return _plan(settings, loads, config.ep_size)
    except (ConfigError, UnavailableError) as error:
        raise type(error)(f"placement: {error}") from error


def warm_splits(config: EPConfig) -> None:
    """Loads the compiled levelling splits of the CPU, and compiles them if no earlier run did.

    The parent does this before its workers start, so that they find it on disk; a worker, before others wait for it.
    """
    splits = map(config.placement.split_of, PHASES)
    if (
        (config.placement.given or config.balance.on)
        and set(LEVELLING) & set(splits)
        and get_device(config.device).name == "cpu"
    ):
        layout, counts_RE = Layout.even(2, 2, 4), np.ones((2, 2), dtype=np.int64)
        own_quota(counts_RE, level_by_node_shares(counts_RE, layout, node_size=1), layout, source_rank=0)


def slot_map_of(placement: Placement | None, layer: int, experts: int, ranks: int) -> SlotMap:
    """Where this layer's experts live. Layers after the model's own, those of a draft model, are not in a placement.

    Raises:
        ConfigError: the placement is of a model with other experts.
    """
    if placement is None or layer >= len(placement.layers):
        return SlotMap.uniform(experts, ranks)
    if placement.experts != experts:
        raise ConfigError(
            f"placement: it has {placement.experts} experts, but MoE layer {layer} has {experts}; plan one for it"
        )
    return SlotMap(placement.layers[layer], placement.node_size, placement.rank_speed)


def to_env(placement: Placement) -> str:
    """The placement as text for an environment variable. Raises ConfigError if it is too long for one."""
    text = b64encode(zlib.compress(placement.to_json().encode(), level=9)).decode()
    if len(text) > MAX_TEXT:
        raise ConfigError(
            f"placement: it takes {len(text):,} characters, more than the {MAX_TEXT:,} that workers can be handed; "
            "use fewer redundant experts"
        )
    return text


def from_env(text: str) -> Placement:
    """The placement that `to_env` made the text of."""
    return Placement.from_json(zlib.decompress(b64decode(text)).decode())


def _read(
    settings: PlacementSettings, ranks: int, layers: int | None, dense_layers: tuple[int, ...]
) -> Placement:
    """From a file; node size and speeds of the config override those in it."""
    file, node_size = str(settings.file), settings.node_size
    placement = read_placement(file, ReadOptions(ranks=ranks))
    if dense_layers and layers == len(placement.layers) + len(dense_layers):
        placement = read_placement(file, ReadOptions(ranks=ranks, dense_layers=dense_layers))
    placement = replace(placement, node_size=node_size) if node_size else placement
    if not placement.node_size and LEVEL_BY_NODE in map(settings.split_of, PHASES):
        raise ConfigError(
            f"split: is {LEVEL_BY_NODE}, but {file} does not say which ranks are near each other; set node_size"
        )
    return with_speeds(placement, settings.rank_speed) if settings.rank_speed else placement


def _check_dense(loads: Loads, dense_layers: tuple[int, ...]) -> None:
    """Raises ConfigError for loads that give tokens to a layer without experts."""
    if odd := sorted(set(loads.loaded_layers) & set(dense_layers)):
        raise ConfigError(
            f"loads: layer {odd[0]} has tokens, but is a layer of the model without experts; the loads are of another "
            "model, or their layers are numbered without the dense ones"
        )


def _plan(settings: PlacementSettings, loads: Loads, ranks: int) -> Placement:
    """As the config asks. Raises ConfigError where it cannot be."""
    asked: dict[str, Any] = {"budget": settings.budget}
    if settings.budget is None:
        redundant = settings.redundant_experts or 0
        if short := -(loads.experts + redundant) % ranks:
            raise ConfigError(
                f"redundant_experts: {redundant} beside {loads.experts} experts are {loads.experts + redundant} slots, "
                f"which {ranks} ranks (ep_size) do not divide; use {redundant + short}, or a budget"
            )
        asked = {"slots": loads.experts + redundant}
    algorithm = settings.algorithm or "refined"
    # The best placement for a split that balances every batch is not the best one for other splits.
    splits = set(map(settings.split_of, PHASES))
    if algorithm == "refined" and splits <= set(LEVELLING) and settings.objective == "tokens":
        asked["split"] = "level"
    placement = plan(
        loads,
        ranks=ranks,
        algorithm=algorithm,
        objective=settings.objective,
        node_size=settings.node_size,
        search_ms=settings.search_ms,
        rank_speed=settings.rank_speed or None,
        **asked,
    )
    logger.info("planned a placement by %s on %s", placement.provenance.algorithm, ", ".join(loads.names))
    return placement
