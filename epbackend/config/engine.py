"""The settings passed on to LMDeploy's PyTorch engine."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue, field_validator

from epbackend.config.base import Section
from epbackend.config.lmdeploy import FIELDS_SET_BY_US, unknown_engine_fields

Executor = Literal["auto", "uni", "mp", "ray"]
Positive = Annotated[int, Field(ge=1)]


class EngineSettings(Section):
    """LMDeploy's engine, in the names a user of it knows; `extra` reaches every other field of its config."""

    tp: Positive = Field(
        default=1,
        description="Tensor-parallel ranks, where ep_size is 1. With ep_size > 1 attention gets ep_size "
        "// dp ranks by itself: write 1, or ep_size.",
    )
    dp: Positive = Field(
        default=1,
        description="Attention groups, each with its own requests. More than 1 must divide ep_size, and "
        "needs Ray.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Type of weights and activations. auto takes the checkpoint's.",
    )
    session_len: Positive | None = Field(
        default=None,
        description="Longest prompt plus answer, in tokens. Unset: the model's own limit.",
    )
    max_batch_size: Positive | None = Field(
        default=None,
        description="Requests decoded together; more wait in line. Unset: LMDeploy's choice for the device.",
    )
    max_prefill_token_num: Positive = Field(
        default=8192,
        description="Tokens prefilled in one step. Longer prompts are prefilled in chunks.",
    )
    cache_gb: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="KV-cache memory of one rank, in GiB. Unset: 1 GiB on the CPU, "
        "cache_max_entry_count elsewhere.",
    )
    cache_blocks: Positive | None = Field(
        default=None,
        description="KV cache of one rank, in blocks. Instead of cache_gb.",
    )
    cache_max_entry_count: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.8,
        description="Share of free accelerator memory for the KV cache. Not used on the CPU.",
    )
    block_size: Annotated[int, Field(ge=16)] = Field(
        default=64,
        description="Tokens in a block of the KV cache, a power of two.",
    )
    enable_prefix_caching: bool = Field(
        default=False,
        description="Share the KV cache of prompts that begin alike.",
    )
    eager_mode: bool = Field(
        default=False, description="Run without captured graphs; the CPU and Ascend always do."
    )
    executor: Executor = Field(
        default="auto",
        description="How ranks are started; uni is one process. auto: uni for one rank, ray for dp > 1, "
        "else mp.",
    )
    threads_per_rank: Positive | None = Field(
        default=None,
        description="CPU threads of one rank. Unset: the machine's cores divided among its ranks.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field(
        default="WARNING",
        description="Level of LMDeploy's log and of ours.",
    )
    extra: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="More fields of LMDeploy's PytorchEngineConfig. Passed on as they are; names are "
        "checked where LMDeploy is installed.",
    )

    @field_validator("block_size")
    @classmethod
    def _power_of_two(cls, block_size: int) -> int:
        if block_size & (block_size - 1):
            raise ValueError("must be a power of two, for example 16, 64 or 128")
        return block_size

    @field_validator("extra")
    @classmethod
    def _known_to_lmdeploy(cls, extra: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for name in extra:
            if name in FIELDS_SET_BY_US:
                raise ValueError(f"{name} is set by epbackend: use {FIELDS_SET_BY_US[name]} instead")
        if unknown := unknown_engine_fields(extra):
            raise ValueError("; ".join(unknown))
        return extra
