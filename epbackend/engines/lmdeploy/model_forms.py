"""A model's configuration as LMDeploy reads it: with the keys of the models' releases, which transformers 5 drops.

transformers 5 saves what its own classes have as fields. What all releases of a family have in common it writes into
the code instead: that DeepSeek-V3 scores experts by a sigmoid, for one. Here it is said again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from epbackend.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_NOAUX_TC = {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
IMPLIED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"moe_layer_freq": 1, "scoring_func": "softmax"},
    "deepseek_v3": _NOAUX_TC,
    "deepseek_v32": _NOAUX_TC,
    "glm4_moe_lite": _NOAUX_TC,
    "glm_moe_dsa": _NOAUX_TC,
    "kimi_k2": _NOAUX_TC,
    "qwen3_5_text": {"attn_output_gate": True},
    "qwen3_5_moe_text": {"attn_output_gate": True},
}
"""model_type -> what transformers' class of that type computes, in the words of the releases."""
_SECTIONS = {
    "qwen3_vl_text": [24, 20, 20],
    "qwen3_vl_moe_text": [24, 20, 20],
    "qwen3_omni_moe_text": [24, 20, 20],
    "qwen3_5_text": [11, 11, 10],
    "qwen3_5_moe_text": [11, 11, 10],
}
"""model_type -> how transformers divides rotary frequencies among time, height and width, unless a config says."""
RENAMED = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}
"""Architectures whose class has another name in transformers than in their releases."""


def as_released(config: PretrainedConfig) -> PretrainedConfig:
    """The same configuration, with the keys that its family's releases have and it lacks.

    Raises:
        ConfigError: its layers are arranged in a way that these keys cannot say.
    """
    config.architectures = [RENAMED.get(name, name) for name in config.architectures or []] or None
    text = text_part(config)
    for name, value in _lacking(text).items():
        setattr(text, name, value)
    if getattr(text, "rope_parameters", None):
        text.rope_parameters = _rope(text) | text.rope_parameters
    if config.model_type == "internvl" and not text.architectures:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

        text.architectures = [CLASSES[text.model_type]]
    return config


def text_part(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the language model in a configuration of several parts."""
    for part in ("thinker_config", "text_config"):
        inner: Any = getattr(config, part, None)
        config = inner if hasattr(inner, "model_type") else config
    return config


def reading_as_released(original: Callable[..., PretrainedConfig]) -> Callable[..., PretrainedConfig]:
    """The reader of a checkpoint's configuration, which then has these keys."""

    @functools.wraps(original)
    def read(*args: Any, **kwargs: Any) -> PretrainedConfig:
        return as_released(original(*args, **kwargs))

    return read


def _lacking(text: PretrainedConfig) -> dict[str, Any]:
    keys = dict(IMPLIED.get(text.model_type, {}))
    if getattr(text, "mlp_layer_types", None):
        keys["first_k_dense_replace"] = _leading_dense(text.mlp_layer_types)
    if text.model_type == "qwen3_next":
        keys["full_attention_interval"] = _interval(text.layer_types)
    return {name: value for name, value in keys.items() if not hasattr(text, name)}


def _rope(text: PretrainedConfig) -> dict[str, Any]:
    """Parameters of its rotary embedding that LMDeploy's models read and take as given."""
    if text.model_type in _SECTIONS:
        return {"mrope_section": _SECTIONS[text.model_type], "mrope_interleaved": True}
    if text.model_type != "phimoe":
        return {}
    # LMDeploy's PhiMoE knows the scaled embedding only: unscaled is scaled by 1.
    ones = [1.0] * (text.hidden_size // text.num_attention_heads // 2)
    unscaled = {"short_factor": ones, "long_factor": ones, "short_mscale": 1.0, "long_mscale": 1.0}
    return unscaled | {"type": "longrope"}


def _leading_dense(kinds: Sequence[str]) -> int:
    """
    >>> _leading_dense(["dense", "sparse", "sparse"])
    1
    """
    dense = next((layer for layer, kind in enumerate(kinds) if kind != "dense"), len(kinds))
    if "dense" in kinds[dense:]:
        raise ConfigError(
            f"mlp_layer_types: layer {kinds.index('dense', dense)} is dense, and LMDeploy knows dense layers before "
            "all others only; this model cannot be served"
        )
    return dense


def _interval(kinds: Sequence[str]) -> int:
    """
    >>> _interval(["linear_attention", "full_attention"] * 2)
    2
    """
    interval = [*kinds, "full_attention"].index("full_attention") + 1
    period = ["linear_attention"] * (interval - 1) + ["full_attention"]
    if list(kinds) != period * (len(kinds) // interval):
        raise ConfigError(
            "layer_types: LMDeploy knows full attention in every n-th layer and in the last one only; this model "
            "cannot be served"
        )
    return interval
