"""The MoE block of every model family of LMDeploy, tiny, built and run by itself on one rank or on several.

Weights are drawn by name, in the checkpoint's shapes, and go through LMDeploy's own weight loaders: so each rank loads
its part, and all parts are of the same model. Nothing here needs a checkpoint or an engine.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from lmdeploy.pytorch.config import DistConfig
from lmdeploy.pytorch.devices import DeviceContext, get_device_manager
from lmdeploy.pytorch.distributed import DistContext, get_dist_manager
from lmdeploy.pytorch.model_inputs import StepContextManager, step_ctx_manager
from lmdeploy.pytorch.models.patch import BuildModelContext, build_model_context
from lmdeploy.pytorch.weight_loader.model_weight_loader import load_weight
from torch import Tensor, nn

import epbackend
from epbackend import EPConfig
from epbackend.device.cpu import CpuDevice
from epbackend.dispatch.base import RankGroup
from epbackend.placement.placement import Layout, Placement

EXPERTS, TOP_K, HIDDEN, WIDTH, TOKENS, LAYER = 8, 2, 32, 16, 12, 3
CPU = torch.device("cpu")

CONFIG = {
    "hidden_size": HIDDEN,
    "hidden_act": "silu",
    "intermediate_size": WIDTH,
    "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": WIDTH,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "num_experts_per_tok": TOP_K,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "router_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 4,
    "topk_group": 2,
    "enable_moe_fp32_combine": True,
    "mlp_bias": False,
    "router_jitter_noise": 0.01,
    "input_jitter_noise": 0.0,
}
"""What the families' configurations say of their experts, under all their names."""

ATTENTION = {
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
    "attention_bias": False,
    "qkv_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "layer_types": ["full_attention"] * 6,
    # DeepSeek's, Llama 4's
    "use_mla": True,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "attn_scale": 0.1,
    "floor_scale": 8192,
    "attn_temperature_tuning": False,
    "use_qk_norm": False,
    # which layers have experts
    "moe_layers": [LAYER],
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
"""What whole layers need besides."""


COPIES = {
    2: Layout(((0, 1, 2, 3, 7), (4, 5, 6, 7, 0, 2)), EXPERTS),
    4: Layout(((0, 1, 2), (3, 7, 4), (5, 6), (7, 0, 2)), EXPERTS),
}
"""By the number of ranks: unequal ranks, three experts on two of them."""


@dataclass(frozen=True)
class Family:
    """A MoE block of lmdeploy/pytorch/models, `module:Class`."""

    target: str
    layer_told: bool = True
    """Whether the block takes its layer's number."""
    flat: bool = False
    """Whether it takes tokens [T, D], not [1, T, D]."""

    def build(self) -> nn.Module:
        module, _, name = self.target.partition(":")
        block = getattr(import_module(f"lmdeploy.pytorch.models.{module}"), name)
        told = {"layer_idx": LAYER} if self.layer_told else {}
        return block(SimpleNamespace(**CONFIG), **told, dtype=torch.float32, device=CPU)


FAMILIES = {
    "deepseek": Family("deepseek:DeepseekMoE", layer_told=False),
    "deepseek-v2": Family("deepseek_v2:DeepseekV2MoE"),
    "glm4-moe": Family("glm4_moe:Glm4MoE"),
    "gpt-oss": Family("gpt_oss:GptOssMLP"),
    "hy3": Family("hy3:Hy3MoE"),
    "interns2-mobius": Family("interns2_mobius:InternS2MobiusMetaMoeBlock", flat=True),
    "kimi-k2": Family("kimi_k2_language:KimiK2MoE"),
    "llama4": Family("llama4:Llama4TextMoe", layer_told=False),
    "meta-moe": Family("meta_moe:Qwen3_5MoeSparseMoeBlock", flat=True),
    "mixtral": Family("mixtral:MixtralSparseMoeBlock", layer_told=False),
    "phi3-moe": Family("phi3_moe:PhiMoESparseMoeBlock", layer_told=False),
    "qwen2-moe": Family("qwen2_moe:Qwen2MoeSparseMoeBlock"),
    "qwen3-moe": Family("qwen3_moe:Qwen3MoeSparseMoeBlock"),
    "qwen3-next": Family("qwen3_next:Qwen3NextSparseMoeBlock"),
    "qwen3.5-moe": Family("qwen3_5_moe:Qwen3_5MoeSparseMoeBlock"),
    "sdar-moe": Family("sdar_moe:SDARMoeSparseMoeBlock"),
}


def run_blocks(
    groups: dict[int, RankGroup], ep: int, tp: int = 1, dp: int = 1, replicas: bool = False
) -> dict[str, Tensor]:
    """Every family's output [T, D] for this rank's tokens, experts on `ep` ranks in order, or as in COPIES."""
    config = EPConfig.load({"device": "cpu", "ep_size": ep, "engine": {"tp": tp, "dp": dp}})
    epbackend.enable(config, Placement((COPIES[ep],) * (LAYER + 1)) if replicas else None)
    try:
        with _in_lmdeploy(groups[1].rank, DistConfig(dp=dp, tp=tp, ep=ep)) as dp_rank:
            return {name: _run(family, tokens(dp_rank)) for name, family in FAMILIES.items()}
    finally:
        epbackend.disable()


def layer_number(target: str) -> int:
    """The layer's number that our operator finds in a decoder layer, `module:Class`, built as number LAYER."""
    module, _, name = target.partition(":")
    layer_class = getattr(import_module(f"lmdeploy.pytorch.models.{module}"), name)
    epbackend.enable(EPConfig.load({"device": "cpu"}))
    try:
        with _in_lmdeploy(0, DistConfig()):
            layer = layer_class(
                SimpleNamespace(**CONFIG, **ATTENTION), LAYER, dtype=torch.float32, device=CPU
            )
    finally:
        epbackend.disable()
    (number,) = [m.impl.layer_number for m in layer.modules() if hasattr(m, "gate_up")]
    return number


def tokens(dp_rank: int) -> Tensor:
    """[T, D], others for each data-parallel group."""
    return _drawn(f"tokens {dp_rank}", (TOKENS, HIDDEN))


@contextmanager
def _in_lmdeploy(rank: int, dist_config: DistConfig) -> Iterator[int]:
    """What LMDeploy's model agent sets up before it builds a model; gives the rank's data-parallel group."""
    dist_config.dp_rank = rank // dist_config.attn_tp
    context = DistContext.build(rank, dist_config, ccl_backend=CpuDevice().collective_backend)
    steps = StepContextManager()
    get_device_manager().set_context(DeviceContext("cpu"))
    with (
        get_dist_manager().context(context),
        build_model_context(BuildModelContext()),
        step_ctx_manager(steps),
        steps.context(_Prefill()),
    ):
        yield dist_config.dp_rank


@torch.no_grad()
def _run(family: Family, hidden_TD: Tensor) -> Tensor:
    block = family.build()
    _load(block)
    out = block(hidden_TD.clone() if family.flat else hidden_TD[None].clone())
    return (out[0] if isinstance(out, tuple) else out).reshape(hidden_TD.shape)


class _Prefill:
    """As much of a StepContext as the blocks look at."""

    dp_meta = None
    is_dummy = False

    @staticmethod
    def global_is_decoding() -> bool:
        return False


def _load(block: nn.Module) -> None:
    for name, parameter in block.named_parameters():
        for shape, where in _checkpoint_parts(name, parameter):
            load_weight(parameter, _drawn(f"{name} {where}", shape), **where)
    for module in block.modules():
        if hasattr(module, "update_weights"):
            module.update_weights()


def _checkpoint_parts(name: str, parameter: nn.Parameter) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    """(shape in the checkpoint, arguments of LMDeploy's loader) of each part of a parameter."""
    bias = name.endswith("bias")
    if ".gate_up." in name or name.startswith("experts.gate_up."):
        shape = (WIDTH,) if bias else (WIDTH, HIDDEN)
        return [
            (shape, {"expert_id": e, "shard_id": half}) for e in range(EXPERTS) for half in ("gate", "up")
        ]
    if ".down." in name or name.startswith("experts.down."):
        shape = (HIDDEN,) if bias else (HIDDEN, WIDTH)
        return [(shape, {"expert_id": e, "shard_id": "down"}) for e in range(EXPERTS)]
    if "gate_up_proj" in name:
        return [((WIDTH, HIDDEN), {"shard_id": half}) for half in (0, 1)]
    if "down_proj" in name:
        return [((HIDDEN, WIDTH), {})]
    return [(tuple(parameter.shape), {})]


def _drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """The same values for the same name, everywhere."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator) / 4
