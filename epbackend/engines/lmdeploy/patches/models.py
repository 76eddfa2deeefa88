"""Models that go wrong: where experts are spread over ranks or placed layer by layer, and those that are wrong by
themselves, on any device."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch

from epbackend.engines.lmdeploy.patching import MODELS, Patch, built_by, patch

logger = logging.getLogger("epbackend")

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

    return Patch(name, f"{MODELS}{target}.__init__", why, "ep", build, fingerprint)


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
    return Patch(name, f"{MODELS}{target}.__init__", why, "always", build, fingerprint)


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


_FORMS = "epbackend.engines.lmdeploy.model_forms"


def _as_released(name: str, target: str) -> Patch:
    return Patch(
        name,
        f"{target}:config_from_pretrained",
        "its models read keys of config.json that transformers 5 does not save",
        "always",
        built_by(f"{_FORMS}:reading_as_released"),
        "965f770c4bf0",
    )


@patch(
    f"{MODELS}deepseek_v2:MoEGate.__init__",
    why="group_limited_greedy masks logits by 0, which beats negative ones, and its softmax leaves other groups out",
    when="always",
    fingerprint="df68e2c9496d",
)
def groups_limit_the_choice(original: Callable) -> Callable:
    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        from epbackend.engines.lmdeploy.routers import GroupLimitedTopK

        original(self, *args, **kwargs)
        if self.topk_method == "group_limited_greedy":
            self.softmax_topk = GroupLimitedTopK(self.top_k, self.n_group, self.topk_group)
            self.topk_method = "greedy"  # the branch that asks softmax_topk alone

    return init


@patch(
    "lmdeploy.pytorch.backends.default.moe_router:DefaultRouterNoauxTCImpl._forward_default",
    why="it masks experts of other groups by 0, which beats negative scores",
    when="always",
    fingerprint="4c271a5b3a1a",
)
def other_groups_never_win(original: Callable) -> Callable:
    @functools.wraps(original)
    def forward(
        self: Any, scores: torch.Tensor, scores_for_choice: torch.Tensor, sequence_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from epbackend.engines.lmdeploy.routers import within_groups

        best_two = scores_for_choice.unflatten(-1, (self.n_group, -1)).topk(2).values
        choosable = within_groups(scores_for_choice, best_two.sum(-1), self.topk_group)
        experts = choosable.topk(self.top_k).indices
        return scores.gather(1, experts), experts

    return forward


@patch(
    f"{MODELS}glm4_moe:Glm4MoE.__init__",
    why="it routes by softmax, GLM-4.5 by sigmoid with a correction bias, which it loads and leaves unused",
    when="always",
    fingerprint="e9a3138970d6",
)
def glm4_moe_corrects_its_choice(original: Callable) -> Callable:
    @functools.wraps(original)
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        from lmdeploy.pytorch.nn.moe.route import NoauxTCRouter

        from epbackend.engines.lmdeploy.routers import CorrectedTopK

        original(self, config, *args, **kwargs)
        router = NoauxTCRouter(
            "sigmoid",
            top_k=self.top_k,
            n_group=config.n_group,
            topk_group=config.topk_group,
            n_routed_experts=self.num_experts,
            routed_scaling_factor=1.0,  # the block scales
            renormalize=self.renormalize,
            router_n_groups=getattr(config, "router_n_groups", -1),
        )
        del self.softmax_topk
        self.softmax_topk = CorrectedTopK(router, self.gate)

    return init


@patch(
    f"{MODELS}qwen3_moe:Qwen3MoeMLP.forward",
    why="dense layers (mlp_only_layers, decoder_sparse_step) are called with an argument of sparse ones",
    when="always",
    fingerprint="49944b884890",
)
def qwen3_moe_has_dense_layers(original: Callable) -> Callable:
    @functools.wraps(original)
    def forward(self: Any, x: torch.Tensor, all_routed_experts: torch.Tensor | None = None) -> torch.Tensor:
        return original(self, x)

    return forward


@patch(
    f"{MODELS}qwen3_vl_moe:Qwen3VLMoeForConditionalGeneration._load_weight_fused_experts",
    why="it knows the releases' stacked experts only, [E, in, out], and transformers 5 saves [E, out, in]",
    when="always",
    fingerprint="3e09db54779a",
)
def qwen3_vl_moe_loads_either_way(original: Callable) -> Callable:
    @functools.wraps(original)
    def load(self: Any, name: str, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        text = self.config.text_config
        inputs = text.moe_intermediate_size if name.endswith("down_proj") else text.hidden_size
        # As transformers decides: by the shape alone, so a square one is taken as saved.
        if loaded_weight.shape[2] == inputs:
            loaded_weight = loaded_weight.transpose(1, 2)
        return original(self, name, loaded_weight, *args, **kwargs)

    return load


@patch(
    f"{MODELS}kimi_k25:KimiK25ForConditionalGeneration.rename_weight",
    why="transformers 5 saves its layers under another name (blocks) than the releases",
    when="always",
    fingerprint="3a2423788aca",
)
def kimi_k25_has_layers(original: Callable) -> Callable:
    @functools.wraps(original)
    def rename_weight(cls: type, name: str) -> str:
        return original(cls, name).replace("language_model.model.blocks.", "language_model.model.layers.")

    return rename_weight


@patch(
    "lmdeploy.tokenizer:GptOssTokenizer",
    why="it needs openai_harmony to take an answer's channel marks away, also for who wants tokens or completions",
    when="always",
    fingerprint="d7cc5df0759b",
)
def gpt_oss_without_harmony(original: type) -> type:
    if find_spec("openai_harmony") is not None:
        return original
    from lmdeploy.tokenizer import HuggingFaceTokenizer

    class MarkedTokenizer(HuggingFaceTokenizer):
        """Answers keep their channel marks."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            logger.warning(
                "gpt-oss answers keep their channel marks: pip install openai-harmony takes them away"
            )

    return MarkedTokenizer


@patch(
    "lmdeploy.pytorch.config:QuantizationConfig.get_quant_method",
    why="with smooth_quant the norms of queries and keys (Qwen3-MoE) are built as int8 ones, and answers are wrong",
    when="always",
    fingerprint="75cdc1e3d942",
)
def heads_are_not_quantized(original: Callable) -> Callable:
    @functools.wraps(original)
    def get_quant_method(self: Any, prefix: str = "", module_kind: str = "linear") -> str | None:
        if module_kind == "norm" and prefix.endswith((".q_norm", ".k_norm")):
            return None
        return original(self, prefix, module_kind)

    return get_quant_method


@patch(
    f"{MODELS}deepseek_v2:DeepseekV2Attention.__init__",
    why="with smooth_quant the norm of the latent is built as an int8 one, whose rows the cache of keys cannot take",
    when="always",
    fingerprint="bf7ec4fbe9a5",
)
def latent_is_not_quantized(original: Callable) -> Callable:
    from lmdeploy.pytorch.nn import RMSNorm

    @functools.wraps(original)
    def init(self: Any, config: Any, dtype: Any = None, device: Any = None) -> None:
        original(self, config, dtype, device)
        if getattr(config, "quantization_config", None):
            self.kv_a_layernorm = RMSNorm(
                config.kv_lora_rank, self.kv_a_layernorm.eps, dtype=dtype, device=device
            )

    return init


PATCHES = (
    # Modules that import this function come before the module that defines it.
    _as_released("draft-configs-as-released", "lmdeploy.pytorch.engine.config_builder"),
    _as_released("configs-as-released", "lmdeploy.pytorch.transformers"),
    _as_released("checked-configs-as-released", "lmdeploy.hf_configs"),
    groups_limit_the_choice,
    other_groups_never_win,
    glm4_moe_corrects_its_choice,
    qwen3_moe_has_dense_layers,
    qwen3_vl_moe_loads_either_way,
    kimi_k25_has_layers,
    gpt_oss_without_harmony,
    heads_are_not_quantized,
    latent_is_not_quantized,
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
