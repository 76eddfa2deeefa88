"""Processes that LMDeploy starts load the plug, and their parent notices when they die."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from epbackend.engines.lmdeploy.patching import Patch, built_by, patch, replaced_by
from epbackend.engines.lmdeploy.state import active
from epbackend.engines.lmdeploy.workers.process_guard import ended_by_us, kill_at_exit
from epbackend.errors import ConfigError, WorkerError

ALL_NPUS = "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"
"""With it Ray leaves all NPUs visible; LMDeploy sets it in its own process."""

MEETING_S = 300.0
"""Ranks on other machines may start that much later than the first, where `timeout_s` is less."""

_OURS = "epbackend.engines.lmdeploy"
_MP = "lmdeploy.pytorch.engine.executor.mp_executor"
_RAY = "lmdeploy.pytorch.engine.executor.ray_executor"


@patch(
    "lmdeploy.pytorch.engine.mp_engine:build_mp_engine",
    why="a server's engine in a Ray actor would not load the plug, and gets room for a single rank",
    when="always",
    fingerprint="5795cf53dff9",
)
def no_engine_in_ray(original: Callable) -> Callable:
    @functools.wraps(original)
    def build_mp_engine(backend: str, *args: Any, **kwargs: Any) -> Any:
        if backend == "ray":
            raise ConfigError(
                "engine.extra.mp_engine_backend: LMDeploy's ray engine does not load the plug; remove it "
                "(engine.executor: ray runs the ranks by Ray)"
            )
        return original(backend, *args, **kwargs)

    return build_mp_engine


@patch(
    "lmdeploy.pytorch.engine.executor:get_logger",
    why="it warns at every start that a later LMDeploy drops this executor, which the plug has chosen",
    when="mp",
    fingerprint="74643321fe6d",
)
def mp_without_a_warning(original: Callable) -> Callable:
    def wanted(record: logging.LogRecord) -> bool:
        return "MPExecutor will be deprecated" not in record.getMessage()

    def get_logger(*args: Any, **kwargs: Any) -> logging.Logger:
        log = original(*args, **kwargs).getChild("executor")
        log.addFilter(wanted)
        return log

    return get_logger


@patch(
    f"{_RAY}:_update_runtime_envs",
    why="Ray workers get LMDeploy's own variables only, not the config; and in a Ray that ran before they see one NPU "
    "each, of which LMDeploy takes that of the rank's number",
    when="ray",
    fingerprint="c52892a52680",
)
def ray_environment(original: Callable) -> Callable:
    def update_runtime_envs(runtime_env: dict) -> dict:
        runtime_env = original(runtime_env)
        runtime_env["env_vars"].update(active().worker_environment)
        if ALL_NPUS in os.environ:
            runtime_env["env_vars"][ALL_NPUS] = os.environ[ALL_NPUS]
        return runtime_env

    return update_runtime_envs


@patch(
    f"{_RAY}:RayExecutor._init_distributed_environment_by_device",
    why="it refuses a device it does not know",
    when="ray",
    fingerprint="5266946f7e70",
)
def ray_ranks(original: Callable) -> Callable:
    def init_distributed_environment_by_device(self: Any, device_str: str) -> None:
        # For 'cuda' it sorts the workers; GPUs are bound only with symmetric memory.
        original(self, "cuda" if device_str == "cpu" else device_str)

    return init_distributed_environment_by_device


@patch(
    "lmdeploy.pytorch.engine.executor.base_worker:init_process_group",
    why="it waits 97 years for a rank that does not come or cannot be reached",
    when="always",
    fingerprint="13128dfd0c05",
)
def ranks_meet_in_time(original: Callable) -> Callable:
    from lmdeploy.pytorch.engine.executor import dist_utils

    from epbackend.engines.lmdeploy.workers.pulse import limit_groups

    @functools.wraps(original)
    def init_process_group(rank: int, world_size: int) -> None:
        seconds = max(active().config.timeout_s, MEETING_S)
        theirs = dist_utils.timedelta
        dist_utils.timedelta = lambda **_: timedelta(seconds=seconds)
        try:
            original(rank, world_size)
        except dist.DistError as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise WorkerError(
                f"rank {rank} has not met the {world_size - 1} others at {place} within {seconds:g} s: {error}"
            ) from error
        finally:
            dist_utils.timedelta = theirs
        # Until the first step: ranks may wait long for one that still loads.
        limit_groups(theirs(days=35600).total_seconds())

    return init_process_group


@patch(
    "lmdeploy.pytorch.engine.mp_engine.zmq_engine:ZMQMPEngine._start_mp_proc",
    why="a signal while the API server starts leaves its engine's process, for which Python waits without end; Ctrl-C "
    "while it serves ends that process at once, under requests that the server would finish",
    when="always",
    fingerprint="e1154bdb3b6a",
)
def server_ends_its_engine(original: Callable) -> Callable:
    @functools.wraps(original)
    def start_mp_proc(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(self, *args, **kwargs)
        finally:
            if self.proc is not None:
                kill_at_exit(self.proc)
                if self.proc.is_alive():
                    ended_by_us(self.proc)

    return start_mp_proc


def _ray_resource(name: str, module: str) -> Patch:
    return Patch(
        name,
        f"{module}:get_device_str",
        "it knows no Ray resource for the CPU",
        "ray",
        built_by(f"{_OURS}.workers.ray_executor:resource_of"),
        "b6e6b6e0bb0c",
    )


PATCHES = (
    ranks_meet_in_time,
    Patch(
        "mp-process",
        f"{_MP}:ExecutorProc",
        "a worker must load the plug and not outlive its parent",
        "mp",
        replaced_by(f"{_OURS}.workers.mp:GuardedProc"),
        "00a81fbedc58",
    ),
    Patch(
        "mp-worker",
        f"{_MP}:MPWorkerWrapper",
        "a failed forward pass goes unnoticed",
        "mp",
        replaced_by(f"{_OURS}.workers.mp:FailFastWorker"),
        "30a85ca91013",
    ),
    Patch(
        "mp-executor",
        f"{_MP}:MPExecutor",
        "it waits without end for a worker that died",
        "mp",
        replaced_by(f"{_OURS}.workers.mp:WatchedExecutor"),
        "07780870b5df",
    ),
    Patch(
        "mp-notifier",
        f"{_MP}:Notifier",
        "its barrier blocks the event loop (with gloo a deadlock at every 32nd message) and waits for dead workers",
        "mp",
        replaced_by(f"{_OURS}.workers.ring:RingNotifier"),
        "197c9bbabf2e",
    ),
    Patch(
        "mp-buffer",
        f"{_MP}:SharedBuffer",
        "it takes its pages as they are used: where /dev/shm is full by then, SIGBUS ends the engine without a word",
        "mp",
        replaced_by(f"{_OURS}.workers.mp:AllocatedBuffer"),
        "7aab02c1b873",
    ),
    Patch(
        "zmq-process",
        "lmdeploy.pytorch.engine.mp_engine.zmq_engine:ZMQMPEngine._mp_proc",
        "the API server's engine process must load the plug",
        "always",
        replaced_by(f"{_OURS}.workers.mp:run_engine"),
        "753cbf9af5aa",
    ),
    server_ends_its_engine,
    no_engine_in_ray,
    mp_without_a_warning,
    Patch(
        "ray-worker",
        f"{_RAY}:RayWorkerWrapper",
        "a worker must load the plug",
        "ray",
        replaced_by(f"{_OURS}.workers.ray_executor:PluggedRayWorker"),
        "0b84707a152f",
    ),
    ray_environment,
    _ray_resource("ray-resource-of-executor", _RAY),
    _ray_resource("ray-resource-of-cluster", "lmdeploy.pytorch.ray"),
    Patch(
        "ray-cluster",
        "lmdeploy.pytorch.ray:init_ray_cluster",
        "a cluster it starts has no resource for CPU workers and takes a third of the memory",
        "ray",
        built_by(f"{_OURS}.workers.ray_executor:private_cluster"),
        "8e082faac6bd",
    ),
    Patch(
        "ray-room",
        "lmdeploy.pytorch.ray:_wait_until_pg_ready",
        "it waits half an hour for devices that Ray does not have",
        "ray",
        built_by(f"{_OURS}.workers.ray_executor:room_is_checked"),
        "6646cfe93ddb",
    ),
    ray_ranks,
    # After the patch of one of its methods, which stays its own.
    Patch(
        "ray-executor",
        f"{_RAY}:RayExecutor",
        "it waits without end for a worker that is stopped",
        "ray",
        replaced_by(f"{_OURS}.workers.ray_executor:WatchedRayExecutor"),
        "12011081f72a",
    ),
)
