"""Every MoE architecture that LMDeploy lists and transformers can build: tiny, random, float32, and what each must do.

A `Model` is written twice: `saved`, as transformers' own save_pretrained writes it, and `released`, with the keys of
config.json that the models' own releases have and transformers 5 leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from tests.helpers.engine_models import EXPERTS, TOP_K, tokenizer

Settings = dict[str, Any]

SIZES: Settings = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_experts_per_tok": TOP_K,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
EXPERTS_QWEN: Settings = {
    "head_dim": 16,
    "moe_intermediate_size": 24,
    "num_experts": EXPERTS,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
SHARED_QWEN: Settings = {"shared_expert_intermediate_size": 48}
DELTA: Settings = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    "head_dim": 32,
}
MLA: Settings = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "initializer_range": 0.15,
}
GROUPED: Settings = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
VISION: Settings = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}


@dataclass(frozen=True)
class Model:
    """One row of the matrix."""

    architecture: str
    what: str
    """What of the architecture this one has."""
    build: Callable[[], PreTrainedModel]
    released: Settings = field(default_factory=dict)
    """Keys of config.json that releases have and save_pretrained does not write; a nested one is merged."""

    def save(self, folder: Path, *, released: bool) -> Path:
        """The same weights every time, with a tokenizer, and the answers of transformers (see `answers`)."""
        folder.mkdir(parents=True)
        model = self._model()
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        if released:
            file = folder / "config.json"
            file.write_text(json.dumps(_merged(json.loads(file.read_text()), self.released)))
        return folder

    def _model(self) -> PreTrainedModel:
        torch.manual_seed(0)
        model = self.build().eval()
        # What starts as ones or zeros (norms, biases, sinks) is drawn too: otherwise nobody would miss it.
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if values.dim() == 1 and ("correction_bias" in name or "inv_freq" not in name):
                values.data += torch.randn_like(values) * 0.1
        return model.float()


def _merged(settings: Settings, more: Settings) -> Settings:
    for name, value in more.items():
        settings[name] = _merged(settings[name], value) if isinstance(value, dict) and name in settings else value
    return settings


def _causal(family: str, *parts: Settings, config: str | None = None, **own: Any) -> PreTrainedModel:
    settings: Settings = {}
    for part in (SIZES, *parts, own):
        settings |= part
    return getattr(hf, f"{family}ForCausalLM")(getattr(hf, config or f"{family}Config")(**settings))


def _with_vision(family: str, vision: Settings, *parts: Settings, **own: Any) -> PreTrainedModel:
    settings: Settings = {}
    for part in (SIZES, *parts, own):
        settings |= part
    config = getattr(hf, f"{family}Config")(
        text_config=settings, vision_config=vision, tie_word_embeddings=False
    )
    return getattr(hf, f"{family}ForConditionalGeneration")(config)


MODELS = {
    "qwen2-moe": Model("Qwen2MoeForCausalLM", "shared expert, biases of attention", partial(_causal, "Qwen2Moe", EXPERTS_QWEN, SHARED_QWEN, norm_topk_prob=False)),
    "qwen2-moe-dense": Model("Qwen2MoeForCausalLM", "a dense layer (`mlp_only_layers`)", partial(_causal, "Qwen2Moe", EXPERTS_QWEN, SHARED_QWEN, mlp_only_layers=[1])),
    "qwen3-moe": Model("Qwen3MoeForCausalLM", "", partial(_causal, "Qwen3Moe", EXPERTS_QWEN)),
    "qwen3-moe-dense": Model("Qwen3MoeForCausalLM", "a dense layer (`mlp_only_layers`)", partial(_causal, "Qwen3Moe", EXPERTS_QWEN, mlp_only_layers=[1])),
    "qwen3-moe-step": Model("Qwen3MoeForCausalLM", "every second layer dense (`decoder_sparse_step`)", partial(_causal, "Qwen3Moe", EXPERTS_QWEN, decoder_sparse_step=2)),
    "qwen3-next": Model("Qwen3NextForCausalLM", "", partial(_causal, "Qwen3Next", EXPERTS_QWEN, SHARED_QWEN, DELTA), {"full_attention_interval": 4}),
    "qwen3.5-moe": Model("Qwen3_5MoeForConditionalGeneration", "", partial(_with_vision, "Qwen3_5Moe", VISION, EXPERTS_QWEN, SHARED_QWEN, DELTA)),
    "qwen3-vl-moe": Model("Qwen3VLMoeForConditionalGeneration", "", partial(_with_vision, "Qwen3VLMoe", VISION | {"deepstack_visual_indexes": [0]}, EXPERTS_QWEN)),
    "mixtral": Model("MixtralForCausalLM", "", partial(_causal, "Mixtral", num_local_experts=EXPERTS, intermediate_size=32, sliding_window=None)),
    "mixtral-window": Model("MixtralForCausalLM", "sliding window", partial(_causal, "Mixtral", num_local_experts=EXPERTS, intermediate_size=32, sliding_window=20)),
    "phimoe": Model("PhiMoEForCausalLM", "", partial(_causal, "Phimoe", num_local_experts=EXPERTS, intermediate_size=32, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True)),
    "deepseek-v2": Model("DeepseekV2ForCausalLM", "greedy routing", partial(_causal, "DeepseekV2", MLA, q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1)),
    "deepseek-v2-groups": Model("DeepseekV2ForCausalLM", "group-limited routing", partial(_causal, "DeepseekV2", MLA, q_lora_rank=24, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0)),
    "deepseek-v3": Model("DeepseekV3ForCausalLM", "", partial(_causal, "DeepseekV3", MLA, GROUPED, q_lora_rank=24)),
    "deepseek-v3.2": Model("DeepseekV32ForCausalLM", "", partial(_causal, "DeepseekV32", MLA, GROUPED, q_lora_rank=24, index_topk=16, index_head_dim=32, index_n_heads=2)),
    "glm4-moe": Model("Glm4MoeForCausalLM", "partial rotary, correction bias, biases, norms of queries and keys", partial(_causal, "Glm4Moe", moe_intermediate_size=32, n_routed_experts=EXPERTS, n_shared_experts=1, head_dim=16, use_qk_norm=True, attention_bias=True, routed_scaling_factor=2.5, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})),
    "glm4-moe-lite": Model("Glm4MoeLiteForCausalLM", "", partial(_causal, "Glm4MoeLite", {k: v for k, v in MLA.items() if k != "first_k_dense_replace"}, q_lora_rank=24)),
    "glm-moe-dsa": Model("GlmMoeDsaForCausalLM", "", partial(_causal, "GlmMoeDsa", MLA, q_lora_rank=24, index_topk=16, index_head_dim=32, index_n_heads=2)),
    "gpt-oss": Model("GptOssForCausalLM", "sinks, biases, sliding window", partial(_causal, "GptOss", num_local_experts=EXPERTS, head_dim=16, intermediate_size=32, sliding_window=20, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])),
    "llama4": Model("Llama4ForConditionalGeneration", "", partial(_with_vision, "Llama4", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128, "image_size": 28, "patch_size": 14, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}, num_local_experts=EXPERTS, num_experts_per_tok=1, head_dim=16, intermediate_size=32, intermediate_size_mlp=64, num_hidden_layers=4, interleave_moe_layer_step=2)),
    "hy3": Model("HYV3ForCausalLM", "", partial(_causal, "HYV3", head_dim=16, moe_intermediate_size=32, num_experts=EXPERTS, num_shared_experts=1, mlp_layer_types=["dense", "sparse", "sparse"])),
    "kimi-k2.5": Model("Kimi_K25ForConditionalGeneration", "", partial(_with_vision, "Kimi_K25", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}, MLA, GROUPED, q_lora_rank=24, model_type="deepseek_v3")),
}
