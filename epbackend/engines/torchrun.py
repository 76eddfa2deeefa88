"""For adapters of engines whose ranks all run one program, as torchrun starts it: they find each other and agree.

LMDeploy needs none of it: one process starts its ranks, and hands the config and the placement down.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from epbackend.config import EPConfig
from epbackend.device import Device, get_device
from epbackend.dispatch.base import RankGroup
from epbackend.engines.load_report import STEPS, LoadReport, step_imbalance_Y
from epbackend.engines.placement import finished_placement, warm_splits
from epbackend.errors import ConfigError, EPError, UnavailableError
from epbackend.moe import ExpertParallelMoE
from epbackend.names import PHASES
from epbackend.placement.placement import Placement
from epbackend.placement.renumbering import Renumbering


def join(config: EPConfig, group: dist.ProcessGroup | None = None) -> RankGroup:
    """This rank's place among those of `group` (None: all); they hold the same tokens where `engine.dp` is 1.

    It makes the process group where there is none yet, on the GPU or NPU of the rank's number on its machine; where
    there is one, the script has chosen the device.

    Raises:
        UnavailableError: the device has no collectives.
        ConfigError: there are not as many ranks as the config says, or not as many devices as ranks.
    """
    if config.ep_size == 1:
        return RankGroup.single()
    device = get_device(config.device)
    if reason := device.no_collectives():
        raise UnavailableError(f"device {device.name} cannot run {config.ep_size} ranks: {reason}")
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise ConfigError(f"ep_size: {config.ep_size} ranks are needed; start the script by torchrun")
        _take_own(device)
        dist.init_process_group(device.collective_backend)
    everyone: Any = dist.group.WORLD
    group = group or everyone
    if (size := dist.get_world_size(group)) != config.ep_size:
        raise ConfigError(f"ep_size: {config.ep_size}, but {size} ranks were started; make them equal")
    return RankGroup.of(group, group if config.engine.dp == 1 else None)


def _take_own(device: Device) -> None:
    """Make this rank's device the process's current one, which collectives and launches use: it is the first, untold.

    Raises:
        ConfigError: nothing says which it is, or there is none for this rank.
    """
    kind = device.torch_device(0).type
    if kind == "cpu":
        return
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            f"device: {device.name}, but LOCAL_RANK, the number of this rank on its machine, is not set; start the "
            "script by torchrun"
        )
    number, there = int(os.environ["LOCAL_RANK"]), torch.get_device_module(kind)
    if number >= (seen := there.device_count()):
        raise ConfigError(
            f"device: {device.name}, but rank {number} of this machine sees {seen} of them; start as many ranks here "
            "as there are (--nproc-per-node), and show each rank all (CUDA_VISIBLE_DEVICES, ASCEND_RT_VISIBLE_DEVICES)"
        )
    there.set_device(device.torch_device(number))


def agreed_placement(
    config: EPConfig, ranks: RankGroup, layers: int, with_experts: Sequence[int], model_path: str
) -> Placement | None:
    """Where the experts of a model live: planned by the first rank, so that all have the same. All ranks ask together.

    Args:
        layers: of the model, dense ones too; `with_experts` are the numbers of those that have experts.
        model_path: its folder, which may say that its experts were renumbered.

    Raises:
        UnavailableError: the first rank lacks what it plans on.
        ConfigError: it cannot plan, its placement is another model's, or the ranks were given different configs.
        EPError: it failed otherwise, as by a planner of a third party.
    """
    found: Placement | EPError | None = None
    cause: Exception | None = None
    if ranks.rank == 0:
        dense = tuple(sorted(set(range(layers)).difference(with_experts)))
        try:
            found = finished_placement(config, layers, dense, Renumbering.beside(model_path))
            warm_splits(config)
        except EPError as error:
            found = error
        except Exception as error:
            # The others wait for an answer, and may be unable to unpickle this one.
            found, cause = EPError(f"placement: rank 0 failed: {type(error).__name__}: {error}"), error
    answers = gather(ranks, (config.to_json(), found))
    if len({text for text, _ in answers}) > 1:
        raise ConfigError("the ranks were given different configs; give all the same")
    found = answers[0][1]
    if isinstance(found, EPError):
        raise found from cause
    if found is not None and (found.ranks, len(found.layers)) != (ranks.size, layers):
        raise ConfigError(
            f"placement: it has {found.ranks} ranks and {len(found.layers)} layers, but ep_size is {ranks.size} and "
            f"the model has {layers} layers (dense ones count); plan one for it"
        )
    return found


def gather(ranks: RankGroup, mine: Any) -> list[Any]:
    """Each rank's object, on all ranks."""
    answers = [mine] * ranks.size
    if ranks.size > 1:
        dist.all_gather_object(answers, mine, group=ranks.group)
    return answers


class StepCounts:
    """What a model's layers have counted on this rank when each of its last steps ended."""

    def __init__(self, layers: int, slots: int, device: torch.device) -> None:
        """`slots`: the most that a layer has on this rank."""
        self._rows_Y2L = torch.zeros(layers, len(PHASES), slots, dtype=torch.int64, device=device)
        self._sums_Y: deque[Tensor] = deque([self._rows_Y2L.sum((1, 2))], maxlen=STEPS + 1)
        self._layers: list[ExpertParallelMoE] = []
        self._steps = 0

    def watch(self, layer: ExpertParallelMoE) -> None:
        """The model's next layer that has experts."""
        layer.load.count_in(self._rows_Y2L[len(self._layers), :, : len(layer.load.local_experts)])
        self._layers.append(layer)

    def end_step(self) -> None:
        """A forward pass through all layers is over."""
        self._steps += 1
        self._sums_Y.append(self._rows_Y2L.sum((1, 2)))

    def report(self, ranks: RankGroup, top_k: int) -> LoadReport:
        """Of all ranks, which ask together and get the same."""
        layers = self._layers
        most = max(layer.slot_map.experts for layer in layers)
        tokens_2YE = np.zeros((len(PHASES), len(layers), most), dtype=np.int64)
        for at, layer in enumerate(layers):
            tokens_2YE[:, at, : layer.slot_map.experts] = layer.load.tokens_2E.numpy()
        passes = max(layer.load.most_passes for layer in layers)
        rounds = max(layer.load.most_rounds for layer in layers)
        sums_SY = torch.stack(list(self._sums_Y)).cpu().numpy()
        of_ranks = gather(ranks, (tokens_2YE, passes, rounds, np.diff(sums_SY, axis=0)))
        return LoadReport(
            layers=tuple(layer.layer for layer in layers),
            tokens_2RYE=np.stack([rank[0] for rank in of_ranks], axis=1),
            calls=self._steps,
            passes=max(rank[1] for rank in of_ranks),
            rounds=max(rank[2] for rank in of_ranks),
            dispatchers={phase: asdict(choice) for phase, choice in layers[0].dispatchers.items()},
            step_imbalance_Y=step_imbalance_Y(np.stack([rank[3] for rank in of_ranks])),
            top_k=top_k,
        )
