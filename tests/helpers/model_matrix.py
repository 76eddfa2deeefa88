"""Every MoE architecture that LMDeploy lists and transformers can build: tiny, random, float32, and what each must do.

`python -m scripts.model_matrix` runs all of it and writes the table in docs/lmdeploy.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

import epbackend
from epbackend import EPConfig
from epbackend.checkpoint import SAFETENSORS, layer_count
from epbackend.errors import ConfigError
from epbackend.placement import plan
from tests.helpers.engine_models import EXPERTS, NEW_TOKENS, TOP_K, prompts, tokenizer
from tests.helpers.engines import GREEDY, config

Settings = dict[str, Any]
Tensors = dict[str, torch.Tensor]

TEXTS = [prompts()[number] for number in (0, 2, 3, 4, 5)]
"""Of 1 to 120 words."""
REFERENCE = "reference.json"
"""In a checkpoint's folder: transformers' own greedy tokens for TEXTS."""
PLACEMENT = "placement.json"
"""Likewise: a placement with four copies in each layer, other ones in each."""

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
QWEN: Settings = {
    "head_dim": 16,
    "moe_intermediate_size": 24,
    "num_experts": EXPERTS,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
SHARED: Settings = {"shared_expert_intermediate_size": 48}
LINEAR: Settings = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    "head_dim": 32,
}
MIXTRAL: Settings = {"num_local_experts": EXPERTS, "intermediate_size": 32}
LATENT: Settings = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "initializer_range": 0.15,
}
DENSE_FIRST: Settings = {"first_k_dense_replace": 1}
GROUPS: Settings = {"n_group": 4, "topk_group": 2}
CORRECTED: Settings = GROUPS | {"norm_topk_prob": True, "routed_scaling_factor": 2.5}
INDEX: Settings = {"index_topk": 16, "index_head_dim": 32, "index_n_heads": 2}
GLM: Settings = {
    "moe_intermediate_size": 32,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "head_dim": 16,
    "use_qk_norm": True,
    "attention_bias": True,
    "routed_scaling_factor": 2.5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}
SINKS: Settings = {
    "num_local_experts": EXPERTS,
    "head_dim": 16,
    "intermediate_size": 32,
    "sliding_window": 20,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}
PHI: Settings = MIXTRAL | {"num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True}
LONG: Settings = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0] * 8,
    "short_mscale": 1.2,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 512,
}
LLAMA: Settings = {
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 1,
    "head_dim": 16,
    "intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "num_hidden_layers": 4,
    "interleave_moe_layer_step": 2,
}
HY: Settings = {
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": EXPERTS,
    "num_shared_experts": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
VISION: Settings = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
}
LLAMA_VISION: Settings = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 28,
    "patch_size": 14,
    "vision_output_dim": 64,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
}
INTERN_VISION: Settings = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": [28, 28],
    "patch_size": [14, 14],
}
KIMI_VISION: Settings = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@dataclass(frozen=True)
class Model:
    """One row of the matrix."""

    architecture: str
    """As LMDeploy calls it."""
    build: Callable[[], PreTrainedModel]
    what: str = ""
    """What this one has that another of its architecture has not."""
    released: Callable[[Settings, Tensors], None] | None = None
    """Turns what save_pretrained wrote into the form of the model's releases, in place."""
    refused: str | None = None
    """The refusal on a CPU, a regular expression."""

    def save(self, folder: Path) -> Path:
        """The same weights every time, a tokenizer, and the answers of transformers."""
        torch.manual_seed(0)
        model = self.build().eval()
        # What begins as ones or zeros (norms, biases, sinks) is drawn too: nobody would miss it otherwise.
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if values.dim() == 1 and "inv_freq" not in name:
                values.data += torch.randn_like(values) * 0.1
        model = model.float()
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        settings = _settings(folder)
        if self.released:
            tensors = load_file(folder / SAFETENSORS)
            self.released(settings, tensors)
            save_file(tensors, folder / SAFETENSORS, {"format": "pt"})
            (folder / "config.json").write_text(json.dumps(settings))
        (folder / REFERENCE).write_text(json.dumps(_answers(model, folder)))
        loads_YE = np.random.default_rng(2).lognormal(3, 1, (layer_count(settings), EXPERTS))
        (folder / PLACEMENT).write_text(
            plan(loads_YE, ranks=2, slots=EXPERTS + 4, algorithm="eplb").to_json()
        )
        return folder


@dataclass(frozen=True)
class Run:
    """How experts are spread."""

    ep_size: int = 1
    ep_level: int | dict[str, int] = 1
    copies: bool = False
    engine: Settings = field(default_factory=dict)

    def settings(self, folder: Path) -> EPConfig:
        text = {"extra": {"language_model_only": True}} if "vision_config" in _settings(folder) else {}
        placement = {"placement": {"file": str(folder / PLACEMENT)}} if self.copies else {}
        return config(self.engine | text, ep_size=self.ep_size, ep_level=self.ep_level, **placement)


PROMPTS_AT_2, ANSWERS_AT_2 = {"prefill": 2, "decode": 1}, {"prefill": 1, "decode": 2}
RUNS = {
    "ep 1": Run(),
    "ep 2, prompts at level 2": Run(2, PROMPTS_AT_2),
    "ep 2, answers at level 2": Run(2, ANSWERS_AT_2),
    "ep 2, copies, prompts at level 2": Run(2, PROMPTS_AT_2, copies=True),
    "ep 2, copies, answers at level 2": Run(2, ANSWERS_AT_2, copies=True),
}
"""Both levels in each run of two ranks: prompts by one, answers by the other."""


def matching_tokens(folder: Path, run: Run) -> tuple[int, int]:
    """How many of the engine's greedy tokens are those of transformers, and of how many."""
    reference = json.loads((folder / REFERENCE).read_text())
    with epbackend.pipeline(str(folder), run.settings(folder)) as pipe:
        answers = [answer.token_ids for answer in pipe(TEXTS, gen_config=GREEDY, do_preprocess=False)]
    pairs = zip(chain(*answers), chain(*reference), strict=True)
    same = sum(ours == theirs for ours, theirs in pairs)
    return same, sum(map(len, reference))


def refusal(folder: Path, run: Run) -> str:
    """What the parent says to a model that it refuses."""
    try:
        epbackend.pipeline(str(folder), run.settings(folder)).close()
    except ConfigError as error:
        return str(error)
    raise AssertionError(f"{folder} was not refused")


def _answers(model: PreTrainedModel, folder: Path) -> list[list[int]]:
    words = AutoTokenizer.from_pretrained(folder)
    answers = []
    for text in TEXTS:
        ids = words(text, return_tensors="pt").input_ids
        with torch.inference_mode():
            whole = model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        answers.append(whole[0, ids.shape[1] :].tolist())
    return answers


def _settings(folder: Path) -> Settings:
    return json.loads((folder / "config.json").read_text())


def _text(family: str, *parts: Settings, **own: Any) -> PreTrainedModel:
    settings = {name: value for part in (SIZES, *parts, own) for name, value in part.items()}
    return getattr(hf, f"{family}ForCausalLM")(getattr(hf, f"{family}Config")(**settings))


def _with_vision(family: str, vision: Settings, *parts: Settings, **own: Any) -> PreTrainedModel:
    settings = {name: value for part in (SIZES, *parts, own) for name, value in part.items()}
    whole = getattr(hf, f"{family}Config")(
        text_config=settings, vision_config=vision, tie_word_embeddings=False
    )
    return getattr(hf, f"{family}ForConditionalGeneration")(whole)


def _older_keys(settings: Settings, **more: Any) -> None:
    """The keys of transformers 4, in which releases are written, and `more`."""
    rope = settings.pop("rope_parameters")
    settings |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": settings.pop("dtype")} | more
    if "partial_rotary_factor" in rope:
        settings["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    settings["rope_scaling"] = None if kind == "default" else {"type": kind} | rope


def _with_head(settings: Settings, tensors: Tensors, head: str = "model.layers.{layers}.") -> None:
    """A head that drafts tokens: a copy of the last layer, and what joins it to the model."""
    layers = settings["num_hidden_layers"]
    own, last = head.format(layers=layers), f"model.layers.{layers - 1}."
    copies = {
        own + name.removeprefix(last): values.clone()
        for name, values in tensors.items()
        if name.startswith(last)
    }
    size = settings["hidden_size"]
    tensors |= copies | {
        f"{own}eh_proj.weight": torch.ones(size, 2 * size),
        f"{own}enorm.weight": torch.ones(size),
    }


def _deepseek_v3(settings: Settings, tensors: Tensors) -> None:
    _older_keys(settings, moe_layer_freq=1, scoring_func="sigmoid", topk_method="noaux_tc", ep_size=1)
    _with_head(settings, tensors)


def _glm4_moe(settings: Settings, tensors: Tensors) -> None:
    _older_keys(settings)
    _with_head(settings, tensors)


def _qwen3_next(settings: Settings, tensors: Tensors) -> None:
    del settings["layer_types"]
    _older_keys(settings, full_attention_interval=4)
    _with_head(settings, tensors, "mtp.layers.0.")


def _qwen3_vl_moe(settings: Settings, tensors: Tensors) -> None:
    for name, values in tensors.items():
        if ".experts." in name:
            tensors[name] = values.transpose(1, 2).contiguous()


def _phimoe(settings: Settings, tensors: Tensors) -> None:
    settings["architectures"] = ["PhiMoEForCausalLM"]
    settings["original_max_position_embeddings"] = settings["rope_parameters"][
        "original_max_position_embeddings"
    ]
    _older_keys(settings)


AS_RELEASED = "as released"
NO_INDEX = "cpu cannot run .*sparse attention"
MODELS = {
    "qwen2-moe": Model("Qwen2MoeForCausalLM", partial(_text, "Qwen2Moe", QWEN, SHARED, norm_topk_prob=False)),
    "qwen2-moe-dense": Model(
        "Qwen2MoeForCausalLM",
        partial(_text, "Qwen2Moe", QWEN, SHARED, mlp_only_layers=[1]),
        "a dense layer (`mlp_only_layers`)",
    ),
    "qwen3-moe": Model("Qwen3MoeForCausalLM", partial(_text, "Qwen3Moe", QWEN)),
    "qwen3-moe-dense": Model(
        "Qwen3MoeForCausalLM",
        partial(_text, "Qwen3Moe", QWEN, mlp_only_layers=[1]),
        "a dense layer (`mlp_only_layers`)",
    ),
    "qwen3-moe-step": Model(
        "Qwen3MoeForCausalLM",
        partial(_text, "Qwen3Moe", QWEN, decoder_sparse_step=2),
        "every second layer (`decoder_sparse_step`)",
    ),
    "qwen3-vl-moe": Model(
        "Qwen3VLMoeForConditionalGeneration",
        partial(_with_vision, "Qwen3VLMoe", VISION | {"deepstack_visual_indexes": [0]}, QWEN),
        "text",
    ),
    "internvl": Model(
        "InternVLForConditionalGeneration",
        partial(_with_vision, "InternVL", INTERN_VISION, QWEN, model_type="qwen3_moe"),
        "Qwen3-MoE, text",
    ),
    "qwen3-next": Model("Qwen3NextForCausalLM", partial(_text, "Qwen3Next", QWEN, SHARED, LINEAR)),
    "qwen3.5-moe": Model(
        "Qwen3_5MoeForConditionalGeneration",
        partial(_with_vision, "Qwen3_5Moe", VISION, QWEN, SHARED, LINEAR),
        "text",
    ),
    "mixtral": Model("MixtralForCausalLM", partial(_text, "Mixtral", MIXTRAL, sliding_window=None)),
    "mixtral-window": Model(
        "MixtralForCausalLM", partial(_text, "Mixtral", MIXTRAL, sliding_window=20), "sliding window"
    ),
    "phimoe": Model("PhiMoEForCausalLM", partial(_text, "Phimoe", PHI)),
    "phimoe-long": Model(
        "PhiMoEForCausalLM", partial(_text, "Phimoe", PHI, rope_parameters=LONG), "scaled rotary (`longrope`)"
    ),
    "deepseek-v2": Model(
        "DeepseekV2ForCausalLM",
        partial(_text, "DeepseekV2", LATENT, DENSE_FIRST, q_lora_rank=None, topk_method="greedy"),
        "greedy routing",
    ),
    "deepseek-v2-groups": Model(
        "DeepseekV2ForCausalLM",
        partial(
            _text,
            "DeepseekV2",
            LATENT,
            DENSE_FIRST,
            GROUPS,
            topk_method="group_limited_greedy",
            routed_scaling_factor=16.0,
        ),
        "group-limited routing",
    ),
    "deepseek-v3": Model(
        "DeepseekV3ForCausalLM", partial(_text, "DeepseekV3", LATENT, DENSE_FIRST, CORRECTED)
    ),
    "deepseek-v3.2": Model(
        "DeepseekV32ForCausalLM",
        partial(_text, "DeepseekV32", LATENT, DENSE_FIRST, CORRECTED, INDEX),
        refused=NO_INDEX,
    ),
    "glm4-moe": Model(
        "Glm4MoeForCausalLM",
        partial(_text, "Glm4Moe", GLM),
        "partial rotary, correction bias, norms of queries and keys",
    ),
    "glm4-moe-lite": Model("Glm4MoeLiteForCausalLM", partial(_text, "Glm4MoeLite", LATENT)),
    "glm-moe-dsa": Model(
        "GlmMoeDsaForCausalLM", partial(_text, "GlmMoeDsa", LATENT, DENSE_FIRST, INDEX), refused=NO_INDEX
    ),
    "gpt-oss": Model("GptOssForCausalLM", partial(_text, "GptOss", SINKS), "sinks, biases, sliding window"),
    "llama4": Model(
        "Llama4ForConditionalGeneration", partial(_with_vision, "Llama4", LLAMA_VISION, LLAMA), "text"
    ),
    "hy3": Model("HYV3ForCausalLM", partial(_text, "HYV3", HY)),
    "kimi-k2.5": Model(
        "Kimi_K25ForConditionalGeneration",
        partial(
            _with_vision, "Kimi_K25", KIMI_VISION, LATENT, DENSE_FIRST, CORRECTED, model_type="deepseek_v3"
        ),
        "text",
    ),
}
RELEASED = {
    "qwen3-vl-moe": _qwen3_vl_moe,
    "qwen3-next": _qwen3_next,
    "phimoe-long": _phimoe,
    "deepseek-v3": _deepseek_v3,
    "glm4-moe": _glm4_moe,
}
MODELS |= {
    f"{name}-released": replace(MODELS[name], what=AS_RELEASED, released=form)
    for name, form in RELEASED.items()
}
