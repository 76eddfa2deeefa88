"""The processes that LMDeploy starts load the plug, and are missed when they die."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from epbackend.engines.lmdeploy.patching import patch
from epbackend.errors import ConfigError

_MP = "lmdeploy.pytorch.engine.executor.mp_executor"
_RAY = "lmdeploy.pytorch.engine.executor.ray_executor"


@patch(
    f"{_MP}:ExecutorProc",
    why="a worker must load the plug and not outlive its parent",
    when="mp",
    fingerprint="00a81fbedc58",
)
def mp_process(original: type) -> type:
    from epbackend.engines.lmdeploy.workers import GuardedProc

    return GuardedProc


@patch(
    f"{_MP}:MPWorkerWrapper",
    why="a failed forward pass goes unnoticed",
    when="mp",
    fingerprint="30a85ca91013",
)
def mp_worker(original: type) -> type:
    from epbackend.engines.lmdeploy.workers import FailingWorker

    return FailingWorker


@patch(
    f"{_MP}:MPExecutor", why="it waits for ever for a worker that died", when="mp", fingerprint="07780870b5df"
)
def mp_executor(original: type) -> type:
    from epbackend.engines.lmdeploy.workers import WatchedExecutor

    return WatchedExecutor


@patch(
    f"{_MP}:Notifier",
    why="its barrier blocks the event loop (with gloo a deadlock at every 32nd message) and waits for the dead",
    when="mp",
    fingerprint="197c9bbabf2e",
)
def mp_notifier(original: type) -> type:
    from epbackend.engines.lmdeploy.notifier import RingNotifier

    return RingNotifier


@patch(
    "lmdeploy.pytorch.engine.mp_engine.zmq_engine:ZMQMPEngine._mp_proc",
    why="the API server's engine process must load the plug",
    when="always",
    fingerprint="753cbf9af5aa",
)
def zmq_process(original: Callable) -> Callable:
    from epbackend.engines.lmdeploy.engine_process import run_engine

    return run_engine


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


@patch(f"{_RAY}:RayWorkerWrapper", why="a worker must load the plug", when="ray", fingerprint="0b84707a152f")
def ray_worker(original: type) -> type:
    from epbackend.engines.lmdeploy.ray_workers import PluggedRayWorker

    return PluggedRayWorker


@patch(
    f"{_RAY}:_update_runtime_envs",
    why="Ray workers get LMDeploy's own variables only, not the config",
    when="ray",
    fingerprint="c52892a52680",
)
def ray_environment(original: Callable) -> Callable:
    from epbackend.engines.lmdeploy.plug import active

    def update_runtime_envs(runtime_env: dict) -> dict:
        runtime_env = original(runtime_env)
        runtime_env["env_vars"].update(active().worker_environment)
        return runtime_env

    return update_runtime_envs


@patch(
    f"{_RAY}:get_device_str",
    why="it knows no Ray resource for the CPU",
    when="ray",
    fingerprint="b6e6b6e0bb0c",
)
def ray_resource_of_executor(original: Callable) -> Callable:
    from epbackend.engines.lmdeploy.ray_workers import resource_of

    return resource_of(original)


@patch(
    "lmdeploy.pytorch.ray:get_device_str",
    why="it knows no Ray resource for the CPU",
    when="ray",
    fingerprint="b6e6b6e0bb0c",
)
def ray_resource_of_cluster(original: Callable) -> Callable:
    from epbackend.engines.lmdeploy.ray_workers import resource_of

    return resource_of(original)


@patch(
    "lmdeploy.pytorch.ray:init_ray_cluster",
    why="a cluster it starts has no resource for CPU workers and takes a third of the memory",
    when="ray",
    fingerprint="8e082faac6bd",
)
def ray_cluster(original: Callable) -> Callable:
    from epbackend.engines.lmdeploy.ray_workers import start_cluster

    def init_ray_cluster(
        world_size: int, ray_address: str | None = None, dp: int = 1, device_type: str = "cuda"
    ) -> Any:
        if device_type == "cpu":
            start_cluster(world_size, ray_address)
        return original(world_size, ray_address, dp, device_type)

    return init_ray_cluster


@patch(
    f"{_RAY}:RayExecutor._init_distributed_environment_by_device",
    why="it refuses a device it does not know",
    when="ray",
    fingerprint="5266946f7e70",
)
def ray_ranks(original: Callable) -> Callable:
    def init_distributed_environment_by_device(self: Any, device_str: str) -> None:
        # What it does for 'cuda' is sorting the workers; binding GPUs comes only with symmetric memory.
        original(self, "cuda" if device_str == "cpu" else device_str)

    return init_distributed_environment_by_device
