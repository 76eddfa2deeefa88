"""What LMDeploy is given: its engine configuration, made of our settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from epbackend.config import EPConfig
from epbackend.device import get_device
from epbackend.errors import ConfigError

if TYPE_CHECKING:
    from lmdeploy import PytorchEngineConfig

REFUSED_ENGINE_FIELDS = {
    "enable_eplb": "LMDeploy's own balancing renumbers the experts that epbackend spreads",
    "enable_microbatch": "LMDeploy splits batches inside its DeepEP operator, which epbackend stands in for",
}
"""Fields of LMDeploy's that belong to its own expert parallelism."""


def engine_config(config: EPConfig, dp_rank: int = 0) -> PytorchEngineConfig:
    """LMDeploy's configuration of the engine, for `lmdeploy.pipeline` after `enable(config)`.

    `dp_rank` is the engine's number in a deployment with `engine.dp` > 1, where each engine is a process of its own.

    Raises:
        ConfigError: LMDeploy lacks the dtype on this device, or `engine.extra` asks for a part of its own expert
            parallelism.
    """
    EPConfig.require(config)
    from lmdeploy import PytorchEngineConfig

    engine, device = config.engine, get_device(config.device).name
    if engine.dtype == "float32" and device != "cpu":
        raise ConfigError(
            f"engine.dtype: LMDeploy has no float32 on device {device}; write bfloat16, float16 or auto"
        )
    for name, why in REFUSED_ENGINE_FIELDS.items():
        if engine.extra.get(name):
            raise ConfigError(f"engine.extra.{name}: {why}; remove it")
    settings: dict[str, Any] = {
        "device_type": device,
        "dtype": engine.dtype,
        "tp": engine.tp,
        "dp": engine.dp,
        "dp_rank": dp_rank,
        "ep": config.ep_size,
        "session_len": engine.session_len,
        "max_batch_size": engine.max_batch_size,
        "max_prefill_token_num": engine.max_prefill_token_num,
        "cache_max_entry_count": engine.cache_max_entry_count,
        "num_gpu_blocks": engine.cache_blocks or 0,
        "block_size": block_size(config),
        "enable_prefix_caching": engine.enable_prefix_caching,
        # Our dispatch has not been captured on Ascend yet.
        "eager_mode": engine.eager_mode or device == "ascend",
        "distributed_executor_backend": executor(config),
        # Costs nothing until a request asks for log probabilities.
        "logprobs_mode": engine.extra.get("logprobs_mode", "raw_logprobs"),
    }
    return PytorchEngineConfig(**settings | engine.extra)


def block_size(config: EPConfig) -> int:
    """Tokens in a block of the KV cache: what is set, or what suits the device's attention."""
    return config.engine.block_size or (128 if get_device(config.device).name == "ascend" else 64)


def executor(config: EPConfig) -> str:
    """How LMDeploy starts the ranks: uni, mp or ray."""
    if config.engine.executor != "auto":
        return config.engine.executor
    if config.world_size == 1:
        return "uni"
    # LMDeploy runs dp > 1 by Ray only. On one machine mp starts twice as fast.
    return "ray" if config.engine.dp > 1 else "mp"
