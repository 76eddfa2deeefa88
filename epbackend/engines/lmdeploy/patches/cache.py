"""The size of the KV cache: a budget instead of a share of all memory, on a CPU always."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from epbackend.engines.lmdeploy.patching import patch
from epbackend.engines.lmdeploy.plug import active
from epbackend.errors import ConfigError

GIB = 1 << 30
DEFAULT_GB = 1.0
KEPT_FREE = 0.1
"""Share of the free memory that no cache may take: activations and the ranks' own needs."""
FEWEST_BLOCKS = 16


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
    "lmdeploy.pytorch.engine.executor.base:ExecutorBase._update_num_gpu_blocks",
    why="it knows no budget, engine.cache_gb; and on a CPU it would give the cache most of the machine's memory",
    when="always",
    fingerprint="530062688135",
)
def cache_by_budget(original: Callable) -> Callable:
    def update_num_gpu_blocks(
        self: Any, free_mems: list[int], cache_block_sizes: list[Any], spec_cache_config: Any
    ) -> None:
        engine = active().config.engine
        if active().device == "cpu" or engine.cache_gb is not None:
            self.cache_config.num_gpu_blocks = cache_blocks(
                block_bytes=max(size.total for size in cache_block_sizes),
                free_bytes=min(free_mems),
                gigabytes=engine.cache_gb,
                blocks=self.cache_config.num_gpu_blocks or None,
            )
        original(self, free_mems, cache_block_sizes, spec_cache_config)

    return update_num_gpu_blocks


def cache_blocks(block_bytes: int, free_bytes: int, gigabytes: float | None, blocks: int | None) -> int:
    """Blocks of one rank's KV cache.

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
        setting, wanted = "engine.cache_gb is not set", min(int(DEFAULT_GB * GIB), usable) // block_bytes
    if wanted * block_bytes > usable:
        raise ConfigError(
            f"{setting}: not enough memory, {usable / GIB:.2f} GiB are free for a rank's KV cache; "
            f"lower it to at most {usable / GIB:.2f} GiB ({usable // block_bytes} blocks)"
        )
    if wanted < FEWEST_BLOCKS:
        raise ConfigError(
            f"{setting}: a block takes {block_bytes / GIB:.4f} GiB, so it holds {wanted} blocks, and at least "
            f"{FEWEST_BLOCKS} are needed; set engine.cache_gb to {FEWEST_BLOCKS * block_bytes / GIB:.3f} or more, "
            "or a smaller engine.block_size"
        )
    return wanted
