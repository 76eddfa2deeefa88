"""Tiny random MoE models with 16 experts, in the forms that LMDeploy serves, and what Hugging Face makes of them."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

EXPERTS, TOP_K = 16, 4
NEW_TOKENS = 16
WORDS = "the quick brown fox jumps over a lazy dog while expert parallel load says hello today".split(" ")  # noqa: SIM905

_SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# LMDeploy reads some keys of released checkpoints that transformers does not need.
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": EXPERTS,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "initializer_range": 0.15,
}


def qwen3_moe(**changes: object) -> PreTrainedModel:
    settings = _SIZES | {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": EXPERTS,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(settings | changes)))


def deepseek_v2() -> PreTrainedModel:
    routing = {"routed_scaling_factor": 1.0, "norm_topk_prob": False, "n_group": 1, "topk_group": 1}
    released = {"topk_method": "greedy", "scoring_func": "softmax", "q_lora_rank": None}
    return DeepseekV2ForCausalLM(DeepseekV2Config(**_SIZES, **_DEEPSEEK, **routing, **released))


def deepseek_v3() -> PreTrainedModel:
    routing = {"routed_scaling_factor": 2.5, "norm_topk_prob": True, "n_group": 4, "topk_group": 2}
    released = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "q_lora_rank": 24}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**_SIZES, **_DEEPSEEK, **routing, **released))
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.data.normal_(0, 0.1)
    return model


def mixtral() -> PreTrainedModel:
    """Its blocks in LMDeploy do not know their layer; neither do those of qwen2_moe."""
    settings = {name: value for name, value in _SIZES.items() if name != "moe_intermediate_size"}
    own = {
        "num_key_value_heads": 2,
        "num_local_experts": EXPERTS,
        "intermediate_size": 32,
        "sliding_window": None,
    }
    return MixtralForCausalLM(MixtralConfig(**(settings | own), initializer_range=0.2))


def qwen2_moe() -> PreTrainedModel:
    own = {
        "num_key_value_heads": 2,
        "num_experts": EXPERTS,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    }
    shared = {"shared_expert_intermediate_size": 48, "mlp_only_layers": [], "tie_word_embeddings": False}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**_SIZES, **own, **shared, initializer_range=0.2))


def dense() -> PreTrainedModel:
    settings = {name: value for name, value in _SIZES.items() if "expert" not in name and "moe" not in name}
    return Qwen3ForCausalLM(Qwen3Config(**settings, num_key_value_heads=2, head_dim=16))


FORMS = {
    "qwen3-moe": qwen3_moe,
    "deepseek-v2": deepseek_v2,
    "deepseek-v3": deepseek_v3,
    "mixtral": mixtral,
    "qwen2-moe": qwen2_moe,
    "dense": dense,
}


def save(form: str, folder: Path) -> Path:
    """The model of that form with its tokenizer in folder/form; the same weights every time."""
    path = folder / form
    torch.manual_seed(0)
    model = FORMS[form]().eval()
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def prompts() -> list[str]:
    """Prompts of 1 to 150 words, two of them sharing a long beginning."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=length)) for length in (1, 3, 60, 7, 33, 120, 2, 5, 40, 150)]
    return [*texts, texts[2] + " fox", texts[2] + " dog"]


def greedy_tokens(path: Path, texts: list[str], count: int = NEW_TOKENS) -> list[list[int]]:
    """Hugging Face's own answer to each text, alone: `count` token ids, never the end of text (ignore_eos)."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    answers = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.inference_mode():
            whole = model.generate(
                ids,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
            )
        answers.append(whole[0, ids.shape[1] :].tolist())
    return answers


def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 50, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
