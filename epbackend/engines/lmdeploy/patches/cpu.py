"""LMDeploy accepts the CPU as a device: its configuration, its engine, and the `torch.cuda` that it calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import torch

from epbackend.engines.lmdeploy.devices import torch_cuda_shim
from epbackend.engines.lmdeploy.model_forms import text_part
from epbackend.engines.lmdeploy.patching import MODELS, Patch, patch, replaced_by
from epbackend.engines.lmdeploy.state import active
from epbackend.errors import ConfigError

DEFAULT_BATCH_SIZE = 16

_AGENT = "lmdeploy.pytorch.engine.model_agent.agent"


@patch(
    "torch:compile",
    why="compiling LMDeploy's rotary embedding and norm takes 4 to 28 s of a first start, the compiler's import 2 s",
    when="cpu",
)
def lmdeploy_uncompiled(original: Callable) -> Callable:
    def compile_others(model: Any = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(compile_others, **options)
        if not getattr(model, "__module__", "").startswith("lmdeploy."):
            return original(model, **options)
        return _compiled_later(model, lambda: original(model, **options))

    return compile_others


def _compiled_later(function: Callable, compiled: Callable[[], Callable]) -> Callable:
    """Runs the function as it is while this patch is applied, and compiles it at the first call without it."""
    once = functools.cache(compiled)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        patched = torch.compile.__module__ == __name__
        return function(*args, **kwargs) if patched else once()(*args, **kwargs)

    return run


@patch(
    "lmdeploy.messages:PytorchEngineConfig.__post_init__",
    why="it refuses device_type 'cpu' and dtype 'float32'",
    when="cpu",
    fingerprint="745b7c7baa69",
)
def engine_config_accepts_cpu(original: Callable) -> Callable:
    @functools.wraps(original)
    def post_init(self: Any) -> None:
        if self.device_type != "cpu":
            return original(self)
        if self.quant_policy:
            raise ConfigError("quant_policy: device cpu keeps its KV cache unquantized; remove the setting")
        # Everything else that it checks holds for the CPU too: let it see a device and a dtype that it knows.
        dtype = self.dtype
        self.device_type, self.dtype = "cuda", "auto" if dtype == "float32" else dtype
        try:
            return original(self)
        finally:
            self.device_type, self.dtype = "cpu", dtype

    return post_init


def _bf16_on_the_cpu(original: Callable) -> Callable:
    def is_bf16_supported(device_type: str = "cuda") -> bool:
        return device_type == "cpu" or original(device_type)

    return is_bf16_supported


@patch(
    "lmdeploy.pytorch.config:_update_torch_dtype",
    why="dtype 'auto' turns a float32 checkpoint into float16, and states of linear attention are kept in bfloat16",
    when="cpu",
    fingerprint="d66dfd57a86c",
)
def auto_keeps_float32(original: Callable) -> Callable:
    def update_torch_dtype(config: Any, dtype: str, device_type: str = "auto") -> Any:
        if device_type != "cpu":
            return original(config, dtype, device_type)
        text = text_part(config.hf_config)
        stored = str(getattr(config.hf_config, "dtype", None) or getattr(text, "dtype", None))
        keep = dtype == "auto" and stored.removeprefix("torch.") == "float32"
        config = original(config, "float32" if keep else dtype, device_type)
        config.states_shapes = [(shape, torch.float32) for shape, _ in config.states_shapes]
        return config

    return update_torch_dtype


@patch(
    "lmdeploy.pytorch.engine.config_builder:get_max_batch_size",
    why="it asserts a device it knows",
    when="cpu",
    fingerprint="d11af188c821",
)
def batch_size_of_cpu(original: Callable) -> Callable:
    def get_max_batch_size(device_type: str) -> int:
        return DEFAULT_BATCH_SIZE if device_type == "cpu" else original(device_type)

    return get_max_batch_size


@patch(
    "lmdeploy.pytorch.engine.engine_checker:TorchChecker",
    why="it tests torch with a tensor on 'cuda', by a function that imports half a second of torch",
    when="cpu",
    fingerprint="2d5ae3a7e8e6",
)
def torch_checked_on_cpu(original: type) -> Callable:
    class Checker(original):
        def check(self) -> None:
            torch.ones(1, dtype=torch.float32, device="cpu").add(1)

    return Checker


@patch(
    "lmdeploy.pytorch.engine.executor.base:ExecutorBase._reserve_runtime_mem",
    why="it lowers max_prefill_token_num to fit an accelerator's memory, with an error that names none of our settings",
    when="cpu",
    fingerprint="f3c8e9f15f2f",
)
def prefill_tokens_as_set(original: Callable) -> Callable:
    def reserve_runtime_mem(
        self: Any, free_mems: list[int], cache_block_sizes: list[Any], spec_cache_config: Any
    ) -> list[int]:
        # All ranks share the machine's memory, those of the other dp engines too.
        return [free // active().config.world_size for free in free_mems]

    return reserve_runtime_mem


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


@patch(
    "lmdeploy.pytorch.engine.config_builder:ConfigBuilder.build_specdecode_config",
    why="drafted tokens (multi-token prediction) need operators of GPUs, which it finds out after loading",
    when="cpu",
    fingerprint="87add9563a75",
)
def drafting_is_refused_on_cpu(original: Callable) -> Callable:
    def build_specdecode_config(target_model: str, speculative_config: Any, *args: Any, **kwargs: Any) -> Any:
        if speculative_config is not None:
            raise ConfigError(
                f"speculative_config: device cpu drafts no tokens ({speculative_config.method}); leave it out, or use "
                "a GPU (device: cuda)"
            )
        return original(target_model, speculative_config, *args, **kwargs)

    return build_specdecode_config


def on_cpu(original: FunctionType) -> FunctionType:
    """The function with its literal 'cuda' changed to 'cpu', all else the same."""
    code = original.__code__
    return _with_code(original, code.replace(co_consts=_cpu_for_cuda(code.co_consts)))


def moved_to_cpu(original: FunctionType) -> FunctionType:
    """The function with its calls of `tensor.cuda()` changed to `tensor.cpu()`, all else the same."""
    code = original.__code__
    return _with_code(original, code.replace(co_names=_cpu_for_cuda(code.co_names)))


def _cpu_for_cuda(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple("cpu" if value == "cuda" else value for value in values)


def _with_code(original: FunctionType, code: CodeType) -> FunctionType:
    copy = FunctionType(
        code,
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


def _weights_on_cpu(name: str, method: str, fingerprint: str) -> Patch:
    target = f"{MODELS}gpt_oss:GptOssForCausalLM.{method}"
    return Patch(name, target, "it loads through a GPU", "cpu", moved_to_cpu, fingerprint)


def _knows_bf16(name: str, module: str, why: str) -> Patch:
    return Patch(name, f"{module}:is_bf16_supported", why, "cpu", _bf16_on_the_cpu, "a3ba97b0bd8a")


def _shim(name: str, replacement: Any) -> Patch:
    return Patch(
        f"torch-cuda-{name.replace('_', '-')}",
        f"torch.cuda:{name}",
        "the engine calls it on every device; is_available() stays False",
        "cpu",
        lambda original: replacement,
    )


def _gated_norm(name: str, module: str) -> Patch:
    return Patch(
        name,
        f"{MODELS}{module}:build_rmsnorm_gated",
        "it builds a norm of flash-linear-attention, which is for GPUs",
        "cpu",
        replaced_by("epbackend.engines.lmdeploy.devices.cpu_delta_rule:GatedRMSNorm"),
        "df1ceb0d0a1c",
    )


PATCHES = (
    # First: looking for the other targets imports the functions that it is about.
    lmdeploy_uncompiled,
    engine_config_accepts_cpu,
    _knows_bf16(
        "cpu-has-bf16",
        "lmdeploy.pytorch.config",
        "it says no for a device it does not know, and bfloat16 would become float16",
    ),
    _knows_bf16(
        "checks-know-bf16",
        "lmdeploy.utils",
        "its check of the model warns of bfloat16 on a device it does not know",
    ),
    auto_keeps_float32,
    batch_size_of_cpu,
    torch_checked_on_cpu,
    prefill_tokens_as_set,
    inputs_stay_on_cpu,
    drafting_is_refused_on_cpu,
    _device_literal("agent-device", f"{_AGENT}:BaseModelAgent.__init__", "the model", "ec8f7a916625"),
    _device_literal(
        "agent-warmup", f"{_AGENT}:BaseModelAgent._warmup_prefill", "its warm-up batch", "1b1de076971d"
    ),
    _device_literal(
        "cache-device",
        "lmdeploy.pytorch.engine.cache_engine.engine:CacheEngine.allocate_gpu_cache",
        "the KV cache",
        "35bfc7c570ef",
    ),
    _device_literal(
        "state-cache-device",
        "lmdeploy.pytorch.engine.cache_engine.state:StateCacheEngine.__init__",
        "the state cache",
        "c9d9bfcecd74",
    ),
    _weights_on_cpu("gpt-oss-gate-up-on-cpu", "_load_weight_experts_gate_up", "3a6b8adc0a8f"),
    _weights_on_cpu("gpt-oss-down-on-cpu", "_load_weight_experts_down", "6dcca3d3c27e"),
    _gated_norm("qwen3-next-gated-norm", "qwen3_next"),
    _gated_norm("qwen3-5-gated-norm", "qwen3_5"),
    _shim("Stream", torch_cuda_shim.Stream),
    _shim("Event", torch_cuda_shim.Event),
    _shim("stream", torch_cuda_shim.stream),
    _shim("current_stream", torch_cuda_shim.current_stream),
    _shim("default_stream", torch_cuda_shim.current_stream),
    _shim("synchronize", torch_cuda_shim.synchronize),
    _shim("empty_cache", torch_cuda_shim.empty_cache),
    _shim("set_device", torch_cuda_shim.set_device),
    _shim("current_device", torch_cuda_shim.current_device),
    _shim("mem_get_info", torch_cuda_shim.mem_get_info),
    _shim("get_device_properties", torch_cuda_shim.get_device_properties),
)
