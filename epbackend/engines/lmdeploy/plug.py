"""Enables and disables the plug in this process.

Workers get the configuration and the placement through the environment, which every way in which LMDeploy starts a
process passes on or can be made to.
"""

from __future__ import annotations

import atexit
import os
import warnings

import torch

from epbackend.config import EPConfig
from epbackend.device import get_device
from epbackend.engines.lmdeploy import balance
from epbackend.engines.lmdeploy.checks import check_graphs
from epbackend.engines.lmdeploy.lmdeploy_config import executor
from epbackend.engines.lmdeploy.load.report import STATS_VARIABLE, SharedStats
from epbackend.engines.lmdeploy.patching import check_version
from epbackend.engines.lmdeploy.processes import imports_program
from epbackend.engines.lmdeploy.shown_log import ShownLog
from epbackend.engines.lmdeploy.state import (
    CONFIG_VARIABLE,
    PLACEMENT_VARIABLE,
    PlugState,
    active,
    current,
    set_current,
)
from epbackend.engines.placement import finished_placement, from_env, to_env, warm_splits
from epbackend.errors import ConfigError, UnavailableError
from epbackend.names import DEVICES
from epbackend.placement.placement import Placement

SUPPORTED_DEVICES = tuple(DEVICES.built_in)


def enable(config: EPConfig, placement: Placement | None = None) -> None:
    """Plugs expert parallelism into LMDeploy for the pipelines that this process makes from now on.

    Make them with `engine_config(config)`, or use `pipeline`, which does both. Enabling the same config again does
    nothing. `placement` is the finished placement, where it is known already; otherwise it is read or planned as the
    config says.

    Raises:
        UnavailableError: LMDeploy is missing, is another release or was changed; or the device cannot be used here.
        ConfigError: another config is enabled, or the config's placement cannot be made.
    """
    EPConfig.require(config)
    if (state := current()) is not None:
        if state.config == config:
            return
        raise ConfigError("another config is enabled in this process: call epbackend.disable() first")
    if config.engine.backend != "pytorch":
        raise ConfigError(
            "engine.backend: turbomind takes no plug; use epbackend.pipeline or serve, or remove the setting"
        )
    check_graphs(config)
    placement = placement or finished_placement(config)
    warm_splits(config)
    _switch_on(config, placement, worker=False)


def enable_worker() -> None:
    """`enable` with what the parent left in the environment, for the processes that LMDeploy starts."""
    if current() is None:
        # A user can do nothing about LMDeploy's own collectives, or arrays from Ray that it only reads.
        warnings.filterwarnings("ignore", r".*all_gather_into_tensor. is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        packed = os.environ.get(PLACEMENT_VARIABLE)
        config = EPConfig.from_json(os.environ[CONFIG_VARIABLE])
        warm_splits(config)
        _switch_on(config, from_env(packed) if packed else None, worker=True)


def set_threads() -> None:
    """Sets this worker's CPU threads: `engine.threads_per_rank`, or on a CPU its share of the machine's cores."""
    config = active().config
    threads = config.engine.threads_per_rank
    if threads is None and get_device(config.device).name == "cpu":
        threads = max(1, (os.cpu_count() or 1) // config.world_size)
    if threads is not None:
        torch.set_num_threads(threads)


def disable() -> None:
    """Leaves LMDeploy, torch and the environment as they were before `enable`; nothing where nothing is enabled."""
    if (state := current()) is not None:
        state.switch_off()
        set_current(None)
        atexit.unregister(disable)


def _switch_on(config: EPConfig, placement: Placement | None, *, worker: bool) -> None:
    check_version()
    device = get_device(config.device).name
    if device == "cpu" and torch.cuda.is_available():
        raise ConfigError(
            "device: cpu stands in for torch.cuda, and this process sees a GPU: "
            "set CUDA_VISIBLE_DEVICES='' in its environment"
        )
    if device not in SUPPORTED_DEVICES:
        raise UnavailableError(
            f"device: {device} has no plug into LMDeploy, whose own experts would run instead of ours: use one of "
            f"{', '.join(SUPPORTED_DEVICES)}, or epbackend.moe.ExpertParallelMoE (docs/layer.md)"
        )
    # Imported late: the table imports LMDeploy, whose release has to be checked first.
    from epbackend.engines.lmdeploy.patches import needed

    state = PlugState(config, device, placement)
    try:
        state.set_environment(CONFIG_VARIABLE, config.to_json())
        state.set_environment(PLACEMENT_VARIABLE, to_env(placement) if placement else "")
        # Workers write to their starter's statistics, and so do the engines of one deployment. Any other process that
        # finds one in its environment was only started from a process with an engine.
        shared = worker or config.engine.dp > 1 or imports_program()
        if STATS_VARIABLE not in os.environ or not shared:
            state.stats = SharedStats.of(config)
            state.set_environment(STATS_VARIABLE, state.stats.variable)
            state.balancer = balance.start(config, state.stats, placement)
        # The parent has checked the hooks, and reading the sources again would delay every worker.
        state.patches.apply(needed(device, config.ep_size, executor(config)), check=not worker)
    except BaseException:
        state.switch_off()
        raise
    set_current(state)
    state.log = ShownLog(config.engine.log_level)
    atexit.register(disable)
