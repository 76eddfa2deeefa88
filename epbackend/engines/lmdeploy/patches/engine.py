"""LMDeploy's engine on every device: its operators, its KV cache, its checks, and what follows each of its steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from pkgutil import resolve_name
from typing import Any

import torch
from lmdeploy.pytorch.distributed import get_dist_manager

from epbackend.config.schema import FEWEST_BLOCKS
from epbackend.engines.lmdeploy.checks import (
    GIB,
    KEPT_FREE,
    check_cache,
    ranks_sharing_memory,
    too_large_cache,
)
from epbackend.engines.lmdeploy.load.calibration import calibrate
from epbackend.engines.lmdeploy.patching import patch
from epbackend.engines.lmdeploy.state import active
from epbackend.errors import ConfigError, EPError, WorkerError

BACKENDS = {
    "cpu": "epbackend.engines.lmdeploy.devices.cpu:CpuBackend",
    "cuda": "epbackend.engines.lmdeploy.devices.cuda:CudaBackend",
    "ascend": "epbackend.engines.lmdeploy.devices.ascend:AscendBackend",
}
"""Device -> our backend for it. Each imports what only its own device has."""

DEFAULT_CACHE_GIB = 1.0


@patch(
    "lmdeploy.pytorch.backends.selector:_get_backend",
    why="its backends for CUDA and Ascend bring experts of their own, and there is none for the CPU",
    when="always",
    fingerprint="b34c4c2e1c5b",
)
def backend_with_our_experts(original: Callable) -> Callable:
    from lmdeploy.pytorch.devices import get_device_manager

    def get_backend() -> type:
        device = get_device_manager().current_context().device_type
        if device != active().device:
            return original()
        return resolve_name(BACKENDS[device])

    return get_backend


@patch(
    "lmdeploy.pytorch.engine.executor.base:ExecutorBase._update_num_gpu_blocks",
    why="it knows no budget, engine.cache_gb; and on a CPU it would give the cache most of the machine's memory",
    when="always",
    fingerprint="530062688135",
)
def cache_by_budget(original: Callable) -> Callable:
    def update_num_gpu_blocks(
        self: Any, free_mems: list[int], cache_block_sizes: list[Any], spec_cache_config: Any
    ) -> None:
        engine, on_cpu = active().config.engine, active().device == "cpu"
        if on_cpu or engine.cache_gb is not None:
            self.cache_config.num_gpu_blocks = cache_blocks(
                block_bytes=max(size.total for size in cache_block_sizes),
                free_bytes=min(free_mems),
                gigabytes=engine.cache_gb,
                blocks=self.cache_config.num_gpu_blocks or None,
                sharing=ranks_sharing_memory(active().config) if on_cpu else 1,
            )
        original(self, free_mems, cache_block_sizes, spec_cache_config)

    return update_num_gpu_blocks


def cache_blocks(
    block_bytes: int, free_bytes: int, gigabytes: float | None, blocks: int | None, sharing: int = 1
) -> int:
    """Blocks of one rank's KV cache, where `sharing` ranks have `free_bytes` together.

    `blocks` as set, or as many as `gigabytes` hold, or the default budget as far as memory allows.

    Raises:
        ConfigError: what was set does not fit into the free memory, or holds too few blocks to work with.
    """
    usable = int(free_bytes * (1 - KEPT_FREE))
    if blocks is not None:
        setting, wanted = f"engine.cache_blocks: {blocks} blocks", blocks
    elif gigabytes is not None:
        setting, wanted = f"engine.cache_gb: {gigabytes:g} GiB a rank", int(gigabytes * GIB) // block_bytes
    else:
        setting, wanted = (
            "engine.cache_gb is not set",
            min(int(DEFAULT_CACHE_GIB * GIB), usable // sharing) // block_bytes,
        )
    if wanted * block_bytes * sharing > usable:
        most = usable // sharing // block_bytes
        raise ConfigError(
            f"{too_large_cache(setting, wanted * block_bytes, usable, sharing)} ({most} blocks)"
        )
    if wanted < FEWEST_BLOCKS:
        raise ConfigError(
            f"{setting}: a block takes {block_bytes / GIB:.4f} GiB, so it holds {wanted} blocks, and at least "
            f"{FEWEST_BLOCKS} are needed; set engine.cache_gb to {FEWEST_BLOCKS * block_bytes / GIB:.3f} or more, "
            "or a smaller engine.block_size"
        )
    return wanted


@patch(
    "lmdeploy.pytorch.engine.engine_checker:EngineChecker.check",
    why="a cache that the device's memory cannot hold is found only when all weights are loaded",
    when="always",
    fingerprint="6d2566323421",
)
def memory_is_checked(original: Callable) -> Callable:
    @functools.wraps(original)
    def check(self: Any) -> None:
        original(self)
        check_cache(active().config)

    return check


@patch(
    "lmdeploy.pytorch.check_env.base:BaseChecker.log_and_exit",
    why="a failed check ends the process, Python's user included",
    when="always",
    fingerprint="3b919f4b186c",
)
def failed_checks_raise(original: Callable) -> Callable:
    def raise_error(
        self: Any, e: Exception | None = None, mod_name: str | None = None, message: str | None = None
    ) -> None:
        if isinstance(e, EPError):  # raised by one of ours, in the process that ran the check
            raise e
        reason = message or "please check your environment"
        cause = f" ({type(e).__name__}: {e})" if e else ""
        raise ConfigError(
            f"LMDeploy's check of {mod_name or type(self).__name__} failed: {reason}{cause}"
        ) from e

    return raise_error


@patch(
    "lmdeploy.pytorch.weight_loader.model_weight_loader:ModelWeightLoader.load_model_weights",
    why="a tensor that the checkpoint lacks is not missed: its place keeps what the memory held before",
    when="always",
    fingerprint="7a012a37fc83",
)
def loaded_weights_are_checked(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_model_weights(self: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        # Imported late: it imports LMDeploy's operators, which on a CPU have to be patched before that.
        from epbackend.engines.lmdeploy.weight_check import WeightCheck

        with WeightCheck(model, self.model_path):
            original(self, model, *args, **kwargs)

    return load_model_weights


@patch(
    "lmdeploy.pytorch.engine.model_agent.agent:model_forward",
    why="layers in a captured graph neither report what they did nor fail in time; here a step is over either way. "
    "Between two of them experts move",
    when="always",
    fingerprint="590e0f33e595",
)
def steps_are_counted(original: Callable) -> Callable:
    @functools.wraps(original)
    def model_forward(*args: Any, stream: Any = None, **kwargs: Any) -> Any:
        plug = active()
        # LMDeploy is in the step's stream already; going there once more would cost more than what is done there.
        there = stream is None or stream == torch.cuda.current_stream()
        if plug.migrator is not None and not plug.real_tokens.warming_up:
            with nullcontext() if there else torch.cuda.stream(stream):
                plug.migrator.begin_step()
        # A lost rank would be waited for without end, in graphs too. Not in the interpreter, whose device is cuda as
        # well, and where nothing runs behind the host's back.
        watched = plug.device == "cuda" and plug.config.ep_size > 1 and torch.cuda.is_initialized()
        with plug.context.one_mark() if watched else nullcontext():
            output = original(*args, stream=stream, **kwargs)
        with nullcontext() if there else torch.cuda.stream(stream):
            plug.stats_writer.step()
            if watched:
                group = get_dist_manager().current_context().ep_gpu_group
                plug.context.watch("a step of the engine", group, plug.config.timeout_s)
        return output

    return model_forward


@patch(
    "lmdeploy.pytorch.engine.model_agent.agent:BaseModelAgent.warmup",
    why="the random tokens of its warm-up, at the start and after a sleep, would count as load. After it, experts can "
    "be timed",
    when="always",
    fingerprint="53e20637a948",
)
def warm_up_is_no_load(original: Callable) -> Callable:
    @functools.wraps(original)
    def warmup(self: Any) -> None:
        writer = active().stats_writer
        with active().real_tokens.warm_up(), writer.forgetting():
            original(self)
        calibrate(writer.layers, self.model_config.hidden_size, self.model_config.dtype)

    return warmup


@patch(
    "lmdeploy.pytorch.engine.model_agent.agent:tqdm",
    why="a warm-up of nothing has a progress bar",
    when="always",
)
def no_bar_of_nothing(original: Callable) -> Callable:
    @functools.wraps(original)
    def bar(items: Any, *args: Any, disable: bool = False, **kwargs: Any) -> Any:
        return original(items, *args, disable=disable or not len(items), **kwargs)

    return bar


@patch(
    "lmdeploy.pytorch.engine.model_agent.agent:BaseModelAgent._async_step",
    why="a rank that is lost in one of its own collectives is waited for without end: the age of each step is watched",
    when="always",
    fingerprint="03b3ed9babb0",
)
def steps_are_watched(original: Callable) -> Callable:
    @functools.wraps(original)
    async def async_step(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> None:
        plug = active()
        phase = "decode" if inputs is None or inputs.is_decoding else "prefill"
        with plug.pulse.step(phase, lambda: self.state.is_sleeping):
            await original(self, inputs, *args, **kwargs)
        if plug.device == "cuda" and self.dist_config.world_size > 1 and torch.cuda.is_initialized():
            # The host is through, the GPU perhaps not: with the sampling and the broadcast that follow the model.
            group = self.dist_ctx.attn_tp_group.gpu_group or self.dist_ctx.ep_gpu_group
            plug.context.watch("the end of a step", group, plug.config.timeout_s)

    return async_step


@patch(
    "lmdeploy.pytorch.engine.engine:Engine.async_loop",
    why="when its loop ends of an error the process stays, answers no request any more and tells nobody",
    when="always",
    fingerprint="a81641caa27e",
)
def failed_loop_is_told(original: Callable) -> Callable:
    @functools.wraps(original)
    async def async_loop(self: Any) -> None:
        try:
            await original(self)
        except Exception as error:
            if not isinstance(error, WorkerError):
                text = active().suspect() or f"the engine's loop failed: {type(error).__name__}: {error}"
                active().engine_failed(WorkerError(text))
            else:
                active().engine_failed(error)
            raise

    return async_loop


PATCHES = (
    backend_with_our_experts,
    cache_by_budget,
    memory_is_checked,
    failed_checks_raise,
    loaded_weights_are_checked,
    steps_are_counted,
    steps_are_watched,
    failed_loop_is_told,
    warm_up_is_no_load,
    no_bar_of_nothing,
)
