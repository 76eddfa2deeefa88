"""The two model forms: sizes, and the router habits of the released models they stand for.

Both have 4 layers and between 2 and 3 million parameters, so that the bfloat16 weights stay under 6 MB.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


def qwen3_moe(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Qwen3-MoE: grouped-query attention with normed heads, softmax router, renormalized top 4 of 32 experts."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_common(tokenizer),
            head_dim=32,
            num_key_value_heads=2,
            moe_intermediate_size=32,
            num_experts=32,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            router_aux_loss_coef=0.0,  # training.py adds its own, layer by layer
        )
    )


def deepseek_v3(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """DeepSeek-V3: latent attention, a dense first layer, a shared expert, sigmoid scores and group-limited top 4."""
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **_common(tokenizer),
            intermediate_size=256,
            first_k_dense_replace=1,
            q_lora_rank=96,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            num_key_value_heads=4,
            moe_intermediate_size=32,
            n_routed_experts=32,
            n_shared_experts=1,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            num_nextn_predict_layers=0,
            # The released config.json holds these; transformers does not read them, LMDeploy does.
            moe_layer_freq=1,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
        )
    )


def _common(tokenizer: PreTrainedTokenizerFast) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


FORMS: dict[str, Callable[[PreTrainedTokenizerFast], PreTrainedModel]] = {
    "tiny-qwen3-moe": qwen3_moe,
    "tiny-deepseek-v3": deepseek_v3,
}
