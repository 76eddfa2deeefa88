"""Experts of LMDeploy's own are not asked for on a GPU, and ours are left out where it compiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from epbackend.engines.lmdeploy.patching import Patch, patch, replaced_by
from epbackend.engines.lmdeploy.state import active


def _not_required(name: str, function: str, fingerprint: str) -> Patch:
    """For a function that says whether a library is installed."""

    def build(original: Callable[[], bool]) -> Callable[[], bool]:
        return functools.wraps(original)(lambda: True)

    why = "it requires DeepEP and DeepGEMM for ep_size > 1, which LMDeploy's experts need and ours do not"
    return Patch(name, f"lmdeploy.pytorch.check_env.dist:{function}", why, "cuda", build, fingerprint)


@patch(
    "lmdeploy.pytorch.backends.cuda.graph_runner.full_graph:_configure_decode_torch_compile",
    why="where decoding is compiled (LMDEPLOY_ENABLE_DECODE_TORCH_COMPILE) it would trace our layer as well",
    when="cuda",
    fingerprint="e7f5ab92aad4",
)
def our_layer_is_not_compiled(original: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(original)
    def configure() -> None:
        from torch._dynamo import trace_rules

        original()
        trace_rules.add("epbackend")

    return configure


@patch(
    "lmdeploy.pytorch.backends.cuda.graph_runner.runner:CUDAGraphRunner.__call__",
    why="it fills a batch up to the size of a captured graph with made-up tokens, which would count as load",
    when="cuda",
    fingerprint="868e20ccfad3",
)
def filling_is_no_load(original: Callable) -> Callable:
    @functools.wraps(original)
    def run(self: Any, **inputs: Any) -> Any:
        active().real_tokens.begin_step(self.ctx_mgr.current_context(), inputs["input_ids"].numel())
        return original(self, **inputs)

    return run


PATCHES = (
    Patch(
        "checks-with-the-plug",
        "lmdeploy.pytorch.engine.engine:EngineChecker",
        "it checks in a spawned process, which must load the plug",
        "cuda",
        replaced_by("epbackend.engines.lmdeploy.workers.mp:PluggedChecker"),
        "ad6111bb755c",
    ),
    _not_required("deep-ep-not-demanded", "is_deep_ep_installed", "d657b75b1d11"),
    _not_required("deep-gemm-not-demanded", "is_deep_gemm_installed", "5575ef1e2aae"),
    our_layer_is_not_compiled,
    filling_is_no_load,
)
