"""A program that knows no plug gets one: `epbackend run` applies these before the program starts."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from epbackend.engines.lmdeploy.patching import Patch, When, built_by, patch, replaced_by
from epbackend.engines.lmdeploy.processes import LOOPBACK, free_port
from epbackend.models import resolve

_OURS = "epbackend.engines.lmdeploy.handover"
_ENGINE = "lmdeploy.serve.core.async_engine:AsyncEngine"
_LAUNCH = "lmdeploy.serve.openai.launch_server"


def _packaged_too(original: Callable) -> Callable:
    @functools.wraps(original)
    def get_model(model: str, *args: Any, **kwargs: Any) -> str:
        found = resolve(model)
        return found if os.path.isdir(found) else original(model, *args, **kwargs)

    return get_model


def _packaged_models(name: str, module: str, when: When) -> Patch:
    why = "it looks for the packaged models in the hub"
    return Patch(name, f"{module}:get_model", why, when, _packaged_too, "01a61ee3a8d4")


packaged_models = _packaged_models("packaged-models", "lmdeploy.pipeline", "always")


@patch(
    "lmdeploy.archs:autoget_backend",
    why="it prefers TurboMind, which the plug does not reach",
    when="run",
    fingerprint="5d40bb4b401c",
)
def pytorch_is_the_backend(original: Callable) -> Callable:
    @functools.wraps(original)
    def autoget_backend(model_path: str, trust_remote_code: bool = False) -> str:
        return "pytorch"

    return autoget_backend


@patch(
    "lmdeploy.cli.serve:get_max_batch_size",
    why="it asks the GPU by name, also where there is none; the engine decides later, for its own device",
    when="run",
    fingerprint="d11af188c821",
)
def batch_size_is_left_open(original: Callable) -> Callable:
    @functools.wraps(original)
    def get_max_batch_size(device_type: str) -> None:
        return None

    return get_max_batch_size


@patch(
    f"{_LAUNCH}:launch_server",
    why="its servers must find each other, which it leaves to the environment",
    when="run",
    fingerprint="7c7e19bd037d",
)
def servers_find_each_other(original: Callable) -> Callable:
    @functools.wraps(original)
    def launch_server(num_nodes: int, *args: Any, **kwargs: Any) -> Any:
        if num_nodes == 1:
            os.environ.setdefault("LMDEPLOY_DP_MASTER_ADDR", LOOPBACK)
            os.environ.setdefault("LMDEPLOY_DP_MASTER_PORT", str(free_port()))
        return original(num_nodes, *args, **kwargs)

    return launch_server


PATCHES = (
    packaged_models,
    _packaged_models("packaged-models-on-the-command-line", "lmdeploy.utils", "run"),
    pytorch_is_the_backend,
    batch_size_is_left_open,
    Patch(
        "engine-gets-the-plug",
        f"{_ENGINE}.__init__",
        "the program's own engine config says how many ranks there are: here it is known, and nothing is started yet",
        "run",
        built_by(f"{_OURS}:with_the_plug"),
        "02b7cdffc525",
    ),
    Patch(
        "closed-engine-lets-go",
        f"{_ENGINE}.close",
        "the program's next engine may have another config",
        "run",
        built_by(f"{_OURS}:letting_go"),
        "62c9f2ff9170",
    ),
    servers_find_each_other,
    Patch(
        "dp-server",
        f"{_LAUNCH}:_run_server",
        "a server of dp > 1 is a process of its own, which must get the plug too",
        "run",
        replaced_by(f"{_OURS}:run_server"),
        "f2e6b5e7583e",
    ),
)
