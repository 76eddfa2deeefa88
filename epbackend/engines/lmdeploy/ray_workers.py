"""LMDeploy's Ray executor on CPUs. Imports ray, which takes two seconds: only where ray runs the ranks."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from typing import Any

import ray
import torch.distributed as dist
from lmdeploy.pytorch.devices import get_device_manager
from lmdeploy.pytorch.engine.executor.ray_executor import RayWorkerWrapper

from epbackend.engines.lmdeploy import plug
from epbackend.engines.lmdeploy.plug import set_threads

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
