"""LMDeploy's Ray executor, watched, and on CPUs too. Imports ray, which takes 2 s: only where ray runs the ranks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import threading
from collections.abc import Callable
from typing import Any

import ray
import torch.distributed as dist
from lmdeploy.pytorch.devices import get_device_manager
from lmdeploy.pytorch.engine.executor.ray_executor import RayExecutor, RayWorkerWrapper

from epbackend.engines.lmdeploy import plug
from epbackend.engines.lmdeploy.load.report import last_error, rank_row
from epbackend.engines.lmdeploy.plug import set_threads
from epbackend.engines.lmdeploy.state import active
from epbackend.engines.lmdeploy.workers.rank_watch import LOOK_S, RankState, judge, look_at
from epbackend.errors import WorkerError

logger = logging.getLogger("lmdeploy")

CPU_RESOURCE = "epbackend_cpu_rank"
"""One of these a rank: Ray allows no placement by its own CPU resource."""

OBJECT_STORE_BYTES = 512 << 20


class PluggedRayWorker(RayWorkerWrapper):
    """A Ray actor. Pickled by reference, so that creating it imports the plug in its process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        plug.enable_worker()
        set_threads()
        super().__init__(*args, **kwargs)

    def warmup_dist(self) -> None:
        """Brings the ranks together once; LMDeploy's own way reduces a tensor on 'cuda'."""
        if self.device_type == "cpu":
            dist.barrier()
        else:
            super().warmup_dist()

    def start(self) -> None:
        active().pulse.start(self.rank)
        super().start()


class WatchedRayExecutor(RayExecutor):
    """The engine's end: fails, naming the rank, when one on this machine has ended or does not move on.

    A rank on another machine ends by itself when it is stuck, and Ray tells that it did.
    """

    def start(self, forward_event: asyncio.Event) -> None:
        super().start(forward_event)
        self._released = threading.Event()
        active().suspect = lambda: judge(self._ranks(), active().config.timeout_s, failed=True)
        threading.Thread(target=self._watch, name="epbackend-watch", daemon=True).start()

    def release(self) -> None:
        if hasattr(self, "_released"):  # it had started
            self._released.set()
        super().release()

    def _watch(self) -> None:
        timeout_s = active().config.timeout_s
        text = None
        while text is None:
            if self._released.wait(LOOK_S):
                return
            text = judge(self._ranks(), timeout_s)
        failure = WorkerError(f"{text}. The other ranks were stopped; the log above tells more.")
        logger.error(str(failure))
        # Ray waits without end for one that is stopped.
        for rank in self._ranks():
            if rank.own and rank.process and not rank.ended:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.process, signal.SIGKILL)
        active().engine_failed(failure)

    def _ranks(self) -> list[RankState]:
        """Of all engines: which one is at fault, the own ones alone do not show."""
        first = self.dist_config.dp_rank * self.dist_config.attn_tp
        own = range(first, first + self.dist_config.attn_tp)
        return [
            look_at(rank, rank_row(rank), own=rank in own, said=last_error(rank))
            for rank in range(active().config.world_size)
        ]


def resource_of(original: Callable) -> Callable:
    """`get_device_str` that knows the CPU too."""

    def get_device_str(device_type: str | None = None) -> str:
        device_type = device_type or get_device_manager().current_context().device_type
        return CPU_RESOURCE if device_type == "cpu" else original(device_type)

    return get_device_str


def private_cluster(original: Callable) -> Callable:
    """`init_ray_cluster` that starts a cluster of ours where the ranks run on CPUs and no cluster is named."""

    def init_ray_cluster(
        world_size: int, ray_address: str | None = None, dp: int = 1, device_type: str = "cuda"
    ) -> Any:
        if device_type == "cpu":
            _start_cluster(world_size, ray_address)
        return original(world_size, ray_address, dp, device_type)

    return init_ray_cluster


def _start_cluster(ranks: int, address: str | None) -> None:
    """Starts Ray on this machine for so many ranks, unless it runs or the user named a cluster.

    A cluster of ours is a private one, never one that another process happens to run.
    """
    if ray.is_initialized() or address is not None or "RAY_ADDRESS" in os.environ:
        return
    # Ray would write a key of its own into the home, which containers do not have.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(
        address="local",
        num_cpus=ranks,
        resources={CPU_RESOURCE: ranks},
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        logging_level=logging.ERROR,
    )
