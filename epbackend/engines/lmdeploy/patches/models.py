"""Models whose layers go wrong where experts are spread over ranks or placed layer by layer, on any device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from epbackend.engines.lmdeploy.patching import Build, Patch, When

SUMMED_TWICE = "it sums the routed experts' output over all ranks, though each rank has the whole sum already"
NO_OWN_SUM = {"_all_reduce": False}
"""The attribute by which most blocks decide whether they sum their output over the ranks."""


def _sums_once(
    name: str,
    target: str,
    shared: str,
    fingerprint: str,
    *,
    why: str = SUMMED_TWICE,
    off: Mapping[str, Any] = NO_OWN_SUM,
) -> Patch:
    """For a MoE block whose shared experts are the attribute `shared`, and whose attributes `off` stop its own sum."""

    def build(original: Callable) -> Callable:
        @functools.wraps(original)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            for attribute, value in off.items():
                setattr(self, attribute, value)
            # Only the shared experts are left to sum, where tensor parallelism cut them.
            shared_experts = getattr(self, shared)
            if shared_experts is not None and shared_experts.down_proj.tp > 1:
                shared_experts.down_proj.all_reduce = True

        return init

    return _of_model(name, target, why, "ep", build, fingerprint)


def _tells_its_layer(name: str, target: str, fingerprint: str) -> Patch:
    """For a decoder layer that does not pass its number on to its experts, or not to W8A8 ones."""

    def build(original: Callable) -> Callable:
        @functools.wraps(original)
        def init(self: Any, config: Any, layer_idx: int, *args: Any, **kwargs: Any) -> None:
            # Imported late: it imports models of LMDeploy, which on a CPU have to be patched before that.
            from epbackend.engines.lmdeploy.operators import building

            with building(layer_idx):
                original(self, config, layer_idx, *args, **kwargs)

        return init

    why = "its experts do not get the number of their layer, on which their slots and the load report depend"
    return _of_model(name, target, why, "always", build, fingerprint)


def _of_model(name: str, target: str, why: str, when: When, build: Build, fingerprint: str) -> Patch:
    """A patch of a class of one model, whose module LMDeploy imports only to serve that model."""
    target = f"lmdeploy.pytorch.models.{target}.__init__"
    return Patch(name, target, why, when, build, fingerprint, on_import=True)


def _hands_extras_over(name: str, target: str, fingerprint: str) -> Patch:
    """For a module of experts with biases and an activation."""

    def build(original: Callable) -> Callable:
        @functools.wraps(original)
        def update_weights(self: Any) -> None:
            from epbackend.engines.lmdeploy.operators import LayerExperts

            if isinstance(self.impl, LayerExperts):
                self.impl.set_extras(self.gate_up.bias, self.down.bias, self.act_func)
            original(self)

        return update_weights

    why = "our operator takes its weights here, and gets the biases and the activation only with each call"
    return Patch(name, f"lmdeploy.pytorch.nn.moe.{target}.update_weights", why, "always", build, fingerprint)


PATCHES = (
    # Qwen3.5-MoE and the models without shared experts respect expert parallelism and need no patch.
    _sums_once("deepseek-v2-sums-once", "deepseek_v2:DeepseekV2MoE", "shared_experts", "f0e43633d5f1"),
    _sums_once("deepseek-sums-once", "deepseek:DeepseekMoE", "shared_experts", "88804328d218"),
    _sums_once("glm4-moe-sums-once", "glm4_moe:Glm4MoE", "shared_experts", "e9a3138970d6"),
    # The sum of its shared experts runs on another stream, beside the experts' collectives: the order of the two could
    # differ between ranks.
    _sums_once(
        "hy3-sums-once",
        "hy3:Hy3MoE",
        "shared_mlp",
        "ee510c50f372",
        off=NO_OWN_SUM | {"_enable_shared_expert_overlap": False},
    ),
    _sums_once(
        "kimi-k2-sums-once",
        "kimi_k2_language:KimiK2MoE",
        "shared_experts",
        "671d94721f20",
        why="it asks for a group to sum the shared experts over, also with tp 1, where every rank has them whole",
    ),
    _sums_once("llama4-sums-once", "llama4:Llama4TextMoe", "shared_expert", "15eed526f38a", off={"tp": 1}),
    _sums_once("qwen2-moe-sums-once", "qwen2_moe:Qwen2MoeSparseMoeBlock", "shared_expert", "caa575bda374"),
    _sums_once(
        "qwen3-next-sums-once",
        "qwen3_next:Qwen3NextSparseMoeBlock",
        "shared_expert",
        "dc6a5dd02c3d",
        why="it never sums the shared experts, of which each rank has a part",
    ),
    _tells_its_layer("deepseek-tells-its-layer", "deepseek:DeepseekDecoderLayer", "5bed4ab01ddf"),
    _tells_its_layer("llama4-tells-its-layer", "llama4:Llama4TextDecoderLayer", "98fa7c098f76"),
    _tells_its_layer("mixtral-tells-its-layer", "mixtral:MixtralDecoderLayer", "1a5b078995fb"),
    _tells_its_layer("phi3-moe-tells-its-layer", "phi3_moe:PhiMoEDecoderLayer", "932afb2e6faf"),
    _tells_its_layer("qwen2-moe-tells-its-layer", "qwen2_moe:Qwen2MoeDecoderLayer", "d0891d24e6af"),
    # These pass it on to experts of every form but W8A8, whose modules have no argument for it.
    _tells_its_layer("deepseek-v2-tells-its-layer", "deepseek_v2:DeepseekV2DecoderLayer", "8735a04fb3d3"),
    _tells_its_layer("deepseek-v32-tells-its-layer", "deepseek_v32:DeepseekV32DecoderLayer", "d3527c13fdc0"),
    _tells_its_layer("glm4-moe-tells-its-layer", "glm4_moe:Glm4MoeDecoderLayer", "70af937c84c1"),
    _tells_its_layer("kimi-k2-tells-its-layer", "kimi_k2_language:KimiK2DecoderLayer", "51fe370468e6"),
    _tells_its_layer("qwen3-moe-tells-its-layer", "qwen3_moe:Qwen3MoeDecoderLayer", "80ecebe32b43"),
    _tells_its_layer("qwen3-5-moe-tells-its-layer", "qwen3_5_moe:Qwen3_5MoeDecoderLayer", "b6a89a7225f7"),
    _tells_its_layer("qwen3-next-tells-its-layer", "qwen3_next:Qwen3NextDecoderLayer", "48462a324891"),
    _hands_extras_over("experts-get-their-biases", "default:FusedMoE", "7d6c1d80a2b5"),
    _hands_extras_over("fp8-experts-get-their-biases", "blocked_fp8:FusedMoEBlockedF8", "06c31aff5123"),
)
