"""What the plug has changed in this process, and the environment by which worker processes learn of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from epbackend.balance.balancer import Balancer
from epbackend.balance.migration import Migrator
from epbackend.config import EPConfig
from epbackend.dispatch.context import GroupContext
from epbackend.engines.lmdeploy.environment import environment
from epbackend.engines.lmdeploy.load.real_tokens import RealTokens
from epbackend.engines.lmdeploy.load.report import STATS_VARIABLE, SharedStats, record_verdict
from epbackend.engines.lmdeploy.load.stats_writer import StatsWriter
from epbackend.engines.lmdeploy.patching import Patches
from epbackend.engines.lmdeploy.shown_log import ShownLog
from epbackend.engines.lmdeploy.workers.pulse import Pulse
from epbackend.engines.load_report import LoadReport
from epbackend.errors import EPError, WorkerError
from epbackend.placement.placement import Placement

CONFIG_VARIABLE = "EPBACKEND_CONFIG"
PLACEMENT_VARIABLE = "EPBACKEND_PLACEMENT"
"""Holds the finished placement, packed: every rank has the identical one, on whatever machine it runs."""


@dataclass
class PlugState:
    """What is on, and what it takes to switch it off."""

    config: EPConfig
    device: str
    """The name of the config's device, which "auto" stands for."""
    placement: Placement | None = None
    patches: Patches = field(default_factory=Patches)
    environment: ExitStack = field(default_factory=ExitStack)
    """The variables that we set; closed, it puts them back."""
    stats: SharedStats | None = None
    stats_writer: StatsWriter = field(default_factory=StatsWriter)
    real_tokens: RealTokens = field(default_factory=RealTokens)
    context: GroupContext = field(default_factory=GroupContext)
    """What all MoE layers share on their process groups."""
    pulse: Pulse = field(init=False)
    """Watches the steps of this process's rank."""
    failure: WorkerError | None = None
    """Why the engine that runs in this process ended; None while it has not."""
    suspect: Callable[[], str | None] = lambda: None
    """Names the rank that seems to be at fault when the engine's loop has failed."""
    on_failure: Callable[[WorkerError], None] | None = None
    """What a process that is there for its engine alone does then."""
    balancer: Balancer | None = None
    """In the process that owns the load report, while experts move."""
    migrator: Migrator | None = None
    """In a rank whose experts move."""
    of_pipeline: bool = False
    """Whether a pipeline of ours has it, whose end is the plug's."""
    log: ShownLog | None = None

    def __post_init__(self) -> None:
        self.pulse = Pulse(self.config.timeout_s)

    def engine_failed(self, failure: WorkerError) -> None:
        """Keeps the first reason why the engine of this process ended, and tells whoever waits for it."""
        if self.failure is None:
            self.failure = failure
            record_verdict(str(failure))
        if self.on_failure is not None:
            self.on_failure(self.failure)

    def set_environment(self, name: str, value: str) -> None:
        self.environment.enter_context(environment({name: value}))

    @property
    def worker_environment(self) -> dict[str, str]:
        """What a worker needs to find in its environment, for starters that do not hand down ours."""
        names = (CONFIG_VARIABLE, PLACEMENT_VARIABLE, STATS_VARIABLE)
        return {name: os.environ[name] for name in names if name in os.environ}

    def load_report(self) -> LoadReport:
        """What the workers of this process did.

        Raises:
            EPError: this process is itself part of an engine, whose starter has the report.
        """
        if self.stats is None:
            raise EPError("the load report belongs to the process that started the engines")
        return self.stats.report()

    def switch_off(self) -> None:
        self.patches.restore()
        self.pulse.close()
        if self.balancer is not None:
            self.balancer.close()
        if self.migrator is not None:
            self.migrator.close()
        self.stats_writer.close()
        self.context.close()
        if self.stats is not None:
            self.stats.remove()
        self.environment.close()
        if self.log is not None:
            self.log.close()


_state: PlugState | None = None


def current() -> PlugState | None:
    """The state of the plug; None while it is disabled."""
    return _state


def set_current(state: PlugState | None) -> None:
    """Replaces what `current` returns; for `plug` alone."""
    global _state
    _state = state


def active() -> PlugState:
    """The state of the plug.

    Raises:
        EPError: the plug is not enabled.
    """
    if _state is None:
        raise EPError(
            "expert parallelism is not enabled in this process: call epbackend.enable(config) first"
        )
    return _state
