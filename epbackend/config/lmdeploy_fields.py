"""Which fields LMDeploy's configurations of its engines have, read from its source so that no torch is imported."""

import ast
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from epbackend.errors import did_you_mean

# LMDeploy's field -> the setting of ours that decides it.
_OF_BOTH_ENGINES = {
    "tp": "engine.tp",
    "attn_tp_size": "engine.tp",
    "mlp_tp_size": "engine.tp",
    "dp": "engine.dp",
    "ep": "ep_size",
    "dtype": "engine.dtype",
    "session_len": "engine.session_len",
    "max_batch_size": "engine.max_batch_size",
    "max_prefill_token_num": "engine.max_prefill_token_num",
    "cache_max_entry_count": "engine.cache_max_entry_count",
    "enable_prefix_caching": "engine.enable_prefix_caching",
}
FIELDS_SET_BY_US = {
    **_OF_BOTH_ENGINES,
    "moe_tp_size": "engine.tp",
    "dp_rank": "engine.dp",
    "device_type": "device",
    "num_gpu_blocks": "engine.cache_blocks",
    "block_size": "engine.block_size",
    "eager_mode": "engine.eager_mode",
    "distributed_executor_backend": "engine.executor",
}
TURBOMIND_FIELDS_SET_BY_US = {
    **_OF_BOTH_ENGINES,
    "attn_dp_size": "engine.dp",
    "mlp_dp_size": "engine.dp",
    "outer_dp_size": "engine.dp",
    "device_num": "ep_size",
    "cache_block_seq_len": "engine.block_size",
}
ENGINE_CONFIGS = {
    "pytorch": ("PytorchEngineConfig", FIELDS_SET_BY_US),
    "turbomind": ("TurbomindEngineConfig", TURBOMIND_FIELDS_SET_BY_US),
}
"""engine.backend -> LMDeploy's configuration of that engine, and what of it our settings decide."""


def unknown_engine_fields(names: Iterable[str], config: str = "PytorchEngineConfig") -> list[str]:
    """A message for each name the installed LMDeploy does not know; none where LMDeploy is not installed."""
    known = _engine_fields(config)
    if known is None:
        return []
    return [
        f"LMDeploy's {config} has no field {name!r}{did_you_mean(name, known)}"
        for name in names
        if name not in known
    ]


@cache
def _engine_fields(config: str) -> frozenset[str] | None:
    spec = find_spec("lmdeploy")
    if spec is None or spec.origin is None:
        return None
    module = ast.parse(Path(spec.origin).with_name("messages.py").read_text(encoding="utf-8"))
    return frozenset(
        statement.target.id
        for node in module.body
        if isinstance(node, ast.ClassDef) and node.name == config
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    )
