"""Switching the plug on and off in this process, and what is on.

What the workers must know travels in the environment, so that every way LMDeploy has of starting a process will do.
"""

from __future__ import annotations

import atexit
import logging
import os
from dataclasses import dataclass, field

import torch

from epbackend.config import EPConfig
from epbackend.device import get_device
from epbackend.dispatch.context import GroupContext
from epbackend.engines.lmdeploy.load import BOARD_VARIABLE, LoadBoard, LoadReport
from epbackend.engines.lmdeploy.load_writer import LoadWriter
from epbackend.engines.lmdeploy.patching import Patches, check_version
from epbackend.engines.placement import finished_placement, from_env, to_env, warm_splits
from epbackend.errors import ConfigError, EPError, UnavailableError
from epbackend.names import DEVICES
from epbackend.placement.placement import Placement

CONFIG_VARIABLE = "EPBACKEND_CONFIG"
PLACEMENT_VARIABLE = "EPBACKEND_PLACEMENT"
"""Holds the finished placement, packed: every rank has the identical one, on whatever machine it runs."""
PLUGGED = tuple(DEVICES.built_in)
"""Devices that LMDeploy can use through us."""


@dataclass
class _Plug:
    """What is on, and what it takes to switch it off."""

    config: EPConfig
    device: str
    """The name of the config's device, which "auto" stands for."""
    placement: Placement | None = None
    patches: Patches = field(default_factory=Patches)
    environment: dict[str, str | None] = field(default_factory=dict)
    """The variables we set, as they were before."""
    board: LoadBoard | None = None
    load_writer: LoadWriter = field(default_factory=LoadWriter)
    context: GroupContext = field(default_factory=GroupContext)
    """What all MoE layers share on their process groups."""

    def set_environment(self, name: str, value: str) -> None:
        self.environment.setdefault(name, os.environ.get(name))
        os.environ[name] = value

    @property
    def worker_environment(self) -> dict[str, str]:
        """What a worker needs to find in its environment, for starters that do not hand down ours."""
        names = (CONFIG_VARIABLE, PLACEMENT_VARIABLE, BOARD_VARIABLE)
        return {name: os.environ[name] for name in names if name in os.environ}

    def load_report(self) -> LoadReport:
        """What the workers of this process did.

        Raises:
            EPError: this process is itself part of an engine, whose starter has the report.
        """
        if self.board is None:
            raise EPError("the load report belongs to the process that started the engines")
        return self.board.report()

    def switch_off(self) -> None:
        self.patches.restore()
        self.load_writer.close()
        self.context.close()
        if self.board is not None:
            self.board.remove()
        for name, value in self.environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_plug: _Plug | None = None


def enable(config: EPConfig, placement: Placement | None = None) -> None:
    """Plugs expert parallelism into LMDeploy for the pipelines that this process makes from now on.

    Make them with `engine_config(config)`, or use `pipeline`, which does both. Enabling the same config again does
    nothing. `placement` is what the config's section stands for, where that is known already; it is read or planned
    otherwise.

    Raises:
        UnavailableError: LMDeploy is missing, is another release or was changed; or the device cannot be used here.
        ConfigError: another config is enabled, or the config's placement cannot be made.
    """
    if _plug is not None:
        if _plug.config == config:
            return
        raise ConfigError("another config is enabled in this process: call epbackend.disable() first")
    placement = placement or finished_placement(config)
    warm_splits(config)
    _switch_on(config, placement, worker=False)


def enable_worker() -> None:
    """`enable` with what the parent left in the environment, for the processes that LMDeploy starts."""
    if _plug is None:
        packed = os.environ.get(PLACEMENT_VARIABLE)
        config = EPConfig.from_json(os.environ[CONFIG_VARIABLE])
        warm_splits(config)
        _switch_on(config, from_env(packed) if packed else None, worker=True)


def disable() -> None:
    """Leaves LMDeploy, torch and the environment as they were before `enable`; nothing where nothing is enabled."""
    global _plug
    if _plug is not None:
        _plug.switch_off()
        _plug = None
        atexit.unregister(disable)


def active() -> _Plug:
    """What is on.

    Raises:
        EPError: nothing is.
    """
    if _plug is None:
        raise EPError(
            "expert parallelism is not enabled in this process: call epbackend.enable(config) first"
        )
    return _plug


def executor(config: EPConfig) -> str:
    """How LMDeploy starts the ranks: uni, mp or ray."""
    if config.engine.executor != "auto":
        return config.engine.executor
    if config.world_size == 1:
        return "uni"
    # LMDeploy runs dp > 1 by Ray only. On one machine mp starts twice as fast.
    return "ray" if config.engine.dp > 1 else "mp"


def _switch_on(config: EPConfig, placement: Placement | None, *, worker: bool) -> None:
    global _plug
    check_version()
    device = get_device(config.device).name
    if device == "cpu" and torch.cuda.is_available():
        raise ConfigError(
            "device: cpu stands in for torch.cuda, and this process sees a GPU: "
            "set CUDA_VISIBLE_DEVICES='' in its environment"
        )
    if device not in PLUGGED:
        raise UnavailableError(
            f"device: {device} has no plug into LMDeploy, whose own experts would run instead of ours: use one of "
            f"{', '.join(PLUGGED)}, or epbackend.moe.ExpertParallelMoE (docs/layer.md)"
        )
    # Imported late: the table imports LMDeploy, whose release has to be checked first.
    from epbackend.engines.lmdeploy.patches import needed

    plug = _Plug(config, device, placement)
    try:
        plug.set_environment(CONFIG_VARIABLE, config.to_json())
        plug.set_environment(PLACEMENT_VARIABLE, to_env(placement) if placement else "")
        # Workers write to their starter's board, and so do the engines of one deployment. Any other process that
        # finds one in its environment only happens to be started from a process with an engine.
        if BOARD_VARIABLE not in os.environ or not (worker or config.engine.dp > 1):
            plug.board = LoadBoard(config.world_size)
            plug.set_environment(BOARD_VARIABLE, plug.board.variable)
        # The parent has checked the hooks, and reading the sources again would delay every worker.
        plug.patches.apply(needed(device, config.ep_size, executor(config)), check=not worker)
    except BaseException:
        plug.switch_off()
        raise
    _plug = plug
    _show_log(config.engine.log_level)
    atexit.register(disable)


def _show_log(level: str) -> None:
    """Our own log at that level, on stderr unless the program has a place for it."""
    log = logging.getLogger("epbackend")
    log.setLevel(level)
    if not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s - %(name)s - %(levelname)s - %(message)s"))
        log.addHandler(handler)
