"""The device's operators, and the CPU where LMDeploy's engine writes 'cuda'."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import FunctionType
from typing import Any

from epbackend.engines.lmdeploy import cuda_on_cpu
from epbackend.engines.lmdeploy.patching import Patch, patch
from epbackend.engines.lmdeploy.plug import active

BACKENDS = {"cpu": "CpuBackend", "cuda": "CudaBackend", "ascend": "AscendBackend"}
"""device -> our class for it, in the module of the device's name."""

_AGENT = "lmdeploy.pytorch.engine.model_agent.agent"


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
        return getattr(import_module(f"epbackend.engines.lmdeploy.backends.{device}"), BACKENDS[device])

    return get_backend


@patch(
    f"{_AGENT}:_try_to_cuda",
    why="it moves each step's inputs to 'cuda'",
    when="cpu",
    fingerprint="a10a1831c2a5",
)
def inputs_stay_on_cpu(original: Callable) -> Callable:
    def try_to_cpu(value: Any, non_blocking: bool = False) -> Any:
        return value.to_device("cpu") if hasattr(value, "to_device") else value

    return try_to_cpu


def on_cpu(original: FunctionType) -> FunctionType:
    """The function with its literal 'cuda' changed to 'cpu', all else the same."""
    code = original.__code__
    constants = tuple("cpu" if constant == "cuda" else constant for constant in code.co_consts)
    copy = FunctionType(
        code.replace(co_consts=constants),
        original.__globals__,
        original.__name__,
        original.__defaults__,
        original.__closure__,
    )
    copy.__kwdefaults__ = original.__kwdefaults__
    copy.__qualname__ = original.__qualname__
    return copy


def _device_literal(name: str, target: str, what: str, fingerprint: str) -> Patch:
    return Patch(name, target, f"it writes the device as 'cuda' for {what}", "cpu", on_cpu, fingerprint)


agent_device = _device_literal(
    "agent-device", f"{_AGENT}:BaseModelAgent.__init__", "the model", "ec8f7a916625"
)
agent_warmup = _device_literal(
    "agent-warmup", f"{_AGENT}:BaseModelAgent._warmup_prefill", "its warm-up batch", "1b1de076971d"
)
cache_device = _device_literal(
    "cache-device",
    "lmdeploy.pytorch.engine.cache_engine.engine:CacheEngine.allocate_gpu_cache",
    "the KV cache",
    "35bfc7c570ef",
)
state_cache_device = _device_literal(
    "state-cache-device",
    "lmdeploy.pytorch.engine.cache_engine.state:StateCacheEngine.__init__",
    "the state cache",
    "c9d9bfcecd74",
)


def _shim(name: str, replacement: Any) -> Patch:
    return Patch(
        f"torch-cuda-{name.replace('_', '-')}",
        f"torch.cuda:{name}",
        "the engine calls it on every device; is_available() stays False",
        "cpu",
        lambda original: replacement,
    )


stream_class = _shim("Stream", cuda_on_cpu.Stream)
event_class = _shim("Event", cuda_on_cpu.Event)
stream_context = _shim("stream", cuda_on_cpu.stream)
current_stream = _shim("current_stream", cuda_on_cpu.current_stream)
default_stream = _shim("default_stream", cuda_on_cpu.current_stream)
synchronize = _shim("synchronize", cuda_on_cpu.synchronize)
empty_cache = _shim("empty_cache", cuda_on_cpu.empty_cache)
set_device = _shim("set_device", cuda_on_cpu.set_device)
current_device = _shim("current_device", cuda_on_cpu.current_device)
mem_get_info = _shim("mem_get_info", cuda_on_cpu.mem_get_info)
device_properties = _shim("get_device_properties", cuda_on_cpu.get_device_properties)
