"""Moving experts in LMDeploy's engine: what can be known to be wrong before, the parent's balancer, a rank's migrator.

The board of migrations lies in the load report's memory. A step is one forward pass of LMDeploy, dummy ones too: with
dp > 1 the ranks agree on each before they make it (`_prepare_dp_v1`), and every MoE layer holds a collective of all.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epbackend.balance.balancer import Balancer, BalanceReport, Options, Reading
from epbackend.balance.board import Board
from epbackend.balance.decision import Policy
from epbackend.balance.migration import Migrator
from epbackend.balance.recording import WindowsFile
from epbackend.checkpoint import expert_count, layer_count, read_model_config
from epbackend.config import EPConfig
from epbackend.config.checks import SPEEDS_NOT_SEEN
from epbackend.device import get_device
from epbackend.engines.lmdeploy.checks import expert_bytes
from epbackend.engines.lmdeploy.load.report import SharedStats, all_rows
from epbackend.engines.lmdeploy.state import active
from epbackend.errors import ConfigError, EPError
from epbackend.moe import ExpertParallelMoE, ExpertWork
from epbackend.names import LEVELLING, PHASES
from epbackend.placement.placement import Placement, with_speeds
from epbackend.placement.renumbering import Renumbering, numbering_of

logger = logging.getLogger("epbackend")

MB = 1_000_000
MAX_ERROR = 1000
"""Characters of the last error that readers of the load report are told."""


NOT_SEEN = (
    "balance.on: moving experts on device cuda was tested in Triton's interpreter, and no run on a GPU has been "
    "compared yet (docs/balance.md, Limits): compare some answers with balance.on: false first; with "
    "engine.eager_mode: true no captured graph is concerned"
)
"""What the log says where experts move on a device on which no answers were held against others."""


def graphs_follow(config: EPConfig, device: str) -> bool:
    """Whether experts move under captured graphs: on device cuda, also where a step happens to be captured late."""
    return config.balance.on and device == "cuda"


def starting_placement(path: str, config: EPConfig, placement: Placement | None) -> Placement | None:
    """Where the experts of the model at `path` live before any moves; as given, unless balance makes one.

    Raises:
        ConfigError: nothing could ever move.
    """
    balance = config.balance
    if not balance.on:
        return placement
    settings = read_model_config(Path(path))
    layers, experts = layer_count(settings), expert_count(settings)
    if layers is None or experts is None:
        raise ConfigError(f"balance.on: {path} does not say how many layers and experts it has")
    if balance.record is not None:
        WindowsFile(balance.record, balance.phases)
    if placement is None:
        slots = experts + balance.redundant_experts
        if short := -slots % config.ep_size:
            raise ConfigError(
                f"balance.redundant_experts: {balance.redundant_experts} beside {experts} experts are {slots} slots, "
                f"which {config.ep_size} ranks (ep_size) do not divide; use {balance.redundant_experts + short}"
            )
        placement = Placement.even(layers, experts, config.ep_size, slots)
        placement = replace(placement, node_size=config.placement.node_size)
        placement = with_speeds(placement, config.placement.rank_speed)
    if all((layer.slots_R == 1).all() for layer in placement.layers):
        raise ConfigError(
            f"balance.on: each of the {config.ep_size} ranks has one expert, so that no move changes its load; set "
            "balance.redundant_experts, or fewer ranks"
        )
    _check_sizes(config, expert_bytes(settings, config.engine.dtype))
    # What is recorded, and the placement in use that a server gives away, say by whose numbers experts count.
    return placement.with_options(numbering=placement.numbering or numbering_of(Renumbering.beside(path)))


def _check_sizes(config: EPConfig, length: int | None) -> None:
    """Raises ConfigError for budgets and buffers below one expert, where the model's config.json tells its size."""
    if length is None:
        return
    for name, value in (("max_mb", config.balance.max_mb), ("staging_mb", config.balance.staging_mb)):
        if value is not None and value * MB < length:
            raise ConfigError(
                f"balance.{name}: {value:g} MB are less than one expert, {length / MB:.3g} MB; set "
                f"{length / MB:.3g} or more"
            )


def start(config: EPConfig, stats: SharedStats, placement: Placement | None) -> Balancer | None:
    """The balancer of the deployment whose ranks write to `stats`; None where balance is off.

    Raises:
        ConfigError: there is no placement, because the plug was enabled without knowing the model.
    """
    if not config.balance.on:
        return None
    if get_device(config.device).name == "cuda":
        logger.warning(NOT_SEEN)
    if placement is None:
        raise ConfigError("balance.on: needs the model: use epbackend.pipeline or epbackend.serve")
    settings, layers = config.balance, len(placement.layers)

    def read() -> Reading:
        report = stats.report()
        tokens_2RYE = np.zeros((len(PHASES), config.ep_size, layers, placement.experts), dtype=np.int64)
        known = [number for number in report.layers if number < layers]  # a draft model's come after
        counted_2RYE = report.tokens_2RYE[:, : config.ep_size, : len(known), : placement.experts]
        tokens_2RYE[:, :, known] = counted_2RYE
        return Reading(report.calls, tokens_2RYE)

    splits = {config.placement.split_of(phase) for phase in PHASES}

    def policy(length: int) -> Policy:
        return Policy(
            threshold=settings.threshold,
            max_slots=settings.max_slots,
            max_bytes=None if settings.max_mb is None else int(settings.max_mb * MB),
            expert_bytes=length,
            objective=config.placement.objective,
            split="level" if splits <= set(LEVELLING) else "even",
        )

    options = Options(
        window_steps=settings.window_steps,
        interval_s=settings.interval_s,
        policy=policy,
        staging_bytes=int(settings.staging_mb * MB),
        checksums=settings.checksum,
        timeout_s=settings.timeout_s,
        speed_margin=settings.speed_margin,
        levels=not splits.isdisjoint(LEVELLING),
        phases=settings.phases,
    )

    def tell(report: BalanceReport) -> None:
        error = report.last_error and report.last_error[:MAX_ERROR]
        stats.tell(balance=asdict(replace(report, last_error=error)), balance_at=time.monotonic())

    tell(BalanceReport())
    record = None
    if settings.record is not None:
        record = WindowsFile(settings.record, settings.phases, placement.numbering)
    return Balancer(Board(stats.places), read, options, placement, tell, record)


def report_of(balancer: Balancer | None) -> BalanceReport:
    """What moving experts has done so far. Raises EPError where there is no balancer."""
    if balancer is None:
        raise EPError("no expert moves here: set balance.on: true, with ep_size > 1")
    return balancer.report()


def watch(number: int, layer: ExpertParallelMoE, device: torch.device) -> None:
    """A layer of this rank, which takes part in migrations if they are on and its parent can lead them."""
    plug = active()
    if not plug.config.balance.on or plug.placement is None or number >= len(plug.placement.layers):
        return
    rows: Any = all_rows()
    if plug.migrator is None:
        if rows is None:
            raise EPError("balance.on: all ranks must run on the machine of their parent; remove it")
        staging_bytes = int(plug.config.balance.staging_mb * MB)
        plug.migrator = Migrator(
            rows["balance"], layer.ranks.rank, device, staging_bytes, plug.stats_writer.moving
        )
    plug.migrator.watch(number, layer)
    if plug.config.balance.speed_margin is not None:
        if device.type != "cpu":  # a device named "auto" is known here alone
            raise ConfigError(f"balance.speed_margin: {SPEEDS_NOT_SEEN}")
        layer.load.work = ExpertWork(rows["balance"][layer.ranks.rank]["work"])
