"""LMDeploy's configuration accepts the CPU and keeps float32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from epbackend.engines.lmdeploy.patching import patch
from epbackend.errors import ConfigError, EPError

DEFAULT_BATCH_SIZE = 16


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


@patch(
    "lmdeploy.pytorch.config:is_bf16_supported",
    why="it says no for a device it does not know, and bfloat16 would become float16",
    when="cpu",
    fingerprint="a3ba97b0bd8a",
)
def cpu_has_bf16(original: Callable) -> Callable:
    def is_bf16_supported(device_type: str = "cuda") -> bool:
        return device_type == "cpu" or original(device_type)

    return is_bf16_supported


@patch(
    "lmdeploy.pytorch.config:_update_torch_dtype",
    why="dtype 'auto' turns a float32 checkpoint into float16",
    when="cpu",
    fingerprint="d66dfd57a86c",
)
def auto_keeps_float32(original: Callable) -> Callable:
    def update_torch_dtype(config: Any, dtype: str, device_type: str = "auto") -> Any:
        stored = str(getattr(config.hf_config, "dtype", None)).removeprefix("torch.")
        keep = device_type == "cpu" and dtype == "auto" and stored == "float32"
        return original(config, "float32" if keep else dtype, device_type)

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
    why="it tests torch with a tensor on 'cuda'",
    when="cpu",
    fingerprint="2d5ae3a7e8e6",
)
def torch_checked_on_cpu(original: type) -> Callable:
    return functools.partial(original, "cpu")


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
        if isinstance(e, EPError):  # raised here before, in the process that ran the check
            raise e
        reason = message or "please check your environment"
        cause = f" ({type(e).__name__}: {e})" if e else ""
        raise ConfigError(
            f"LMDeploy's check of {mod_name or type(self).__name__} failed: {reason}{cause}"
        ) from e

    return raise_error
