"""Small random models of transformers' architectures, and their answers on one rank of several."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from epbackend.config import EPConfig
from epbackend.dispatch.base import RankGroup
from epbackend.engines.load_report import LoadReport
from epbackend.engines.transformers import distributed_config, spread_experts
from epbackend.errors import CollectiveError, EPError

VOCABULARY, EXPERTS, TOP_K, LAYERS = 64, 8, 3, 3
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": EXPERTS,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
_MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [1]},
    "deepseek_v3": {**_DEEPSEEK, **_MLA},
    "mixtral": {"num_local_experts": EXPERTS},
    "olmoe": {},
    "glm4_moe": _DEEPSEEK,
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "sliding_window": 16,
        "layer_types": ["full_attention"] * LAYERS,
    },
    "qwen2_moe": {"decoder_sparse_step": 1, "shared_expert_intermediate_size": 16},
    "granitemoe": {"num_local_experts": EXPERTS},
    "dots1": _DEEPSEEK,
    "phimoe": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},  # its router knows two
    "ernie4_5_moe": {"moe_num_experts": EXPERTS, "moe_k": TOP_K, "moe_layer_start_index": 1},
    "minimax_m2": {"num_local_experts": EXPERTS},
    "nemotron_h": {"n_routed_experts": EXPERTS, "layers_block_type": ["moe", "attention", "moe"]},
}
"""transformers' model_type -> its settings beside COMMON."""


@dataclass(frozen=True)
class Answered:
    """What one rank answered, and what it held."""

    tokens: list[list[int]]
    load: LoadReport
    slots: list[int]
    """Of each layer with experts."""


def save(architecture: str, folder: Path) -> Path:
    """A checkpoint of random weights, the same each time."""
    path = folder / architecture
    config = AutoConfig.for_model(architecture, **{**COMMON, **ARCHITECTURES[architecture]})
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


def prompts(rank: int) -> torch.Tensor:
    """A rank's batch: each has another number of prompts, of another length."""
    chosen = torch.Generator().manual_seed(100 + rank)
    return torch.randint(3, VOCABULARY, (1 + rank % 3, 4 + rank), generator=chosen)


def continued(
    model: Any, batch: torch.Tensor, new_tokens: int, together: bool | None = False
) -> list[list[int]]:
    """Each prompt's next tokens, greedily; `together`: until all ranks have theirs, None: as transformers decides."""
    done = model.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        synced_gpus=together,
    )
    return done[:, batch.shape[1] :].tolist()


def whole(path: Path) -> Any:
    """The model in one process, as transformers computes it."""
    quiet()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def answer(
    groups: dict[int, RankGroup],
    path: str,
    settings: dict[str, Any],
    new_tokens: int,
    empty_rank: int | None = None,
) -> Answered:
    """On one rank: its own batch continued (engine.dp = ep_size), or all the same (engine.dp = 1).

    `empty_rank` has no prompt, and joins the others' steps.
    """
    quiet()
    config = EPConfig.load({"device": "cpu", **settings})
    asked = distributed_config(config, groups[1].group)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, distributed_config=asked)
    experts = spread_experts(model)
    rank = groups[1].rank
    if rank == empty_rank:
        tokens: list[list[int]] = []
        for _ in range(new_tokens):
            experts.join_step()
    else:
        tokens = continued(model, prompts(0 if config.engine.dp == 1 else rank), new_tokens)
    load = experts.load()
    experts.close()
    return Answered(tokens, load, [layer.load.rows_2L.shape[1] for layer in experts.layers])


def answer_unevenly(
    groups: dict[int, RankGroup], path: str, settings: dict[str, Any], rounds: list[list[int]]
) -> list[list[list[int]]]:
    """On one rank: its own batch continued in each round, by as many tokens as its number there; 0: it joins only."""
    quiet()
    asked = distributed_config(EPConfig.load({"device": "cpu", **settings}), groups[1].group)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, distributed_config=asked)
    experts, rank = spread_experts(model), groups[1].rank
    answers = []
    for new_tokens in rounds:
        if new_tokens[rank]:
            answers.append(continued(model, prompts(rank), new_tokens[rank], together=None))
        else:
            experts.join_generate()
            answers.append([])
    experts.close()
    return answers


def refusal(groups: dict[int, RankGroup], path: str, settings: dict[str, Any]) -> str:
    """What `answer` is refused for, on one rank."""
    try:
        answer(groups, path, settings, 1)
    except EPError as error:
        return str(error)
    return "nothing"


def quiet() -> None:
    """No bars and no hints among the tests' output."""
    disable_progress_bar()
    set_verbosity_error()


def told_late(groups: dict[int, RankGroup], path: str, timeout_s: float) -> str:
    """On one of two ranks: what the first is told when it asks whether one goes on, and the second does not answer."""
    quiet()
    own = dist.new_group([0, 1])  # no other test's, for it breaks
    config = EPConfig.load({"device": "cpu", "ep_size": 2, "engine": {"dp": 2}, "timeout_s": timeout_s})
    asked = distributed_config(config, own)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, distributed_config=asked)
    experts, said = spread_experts(model), ""
    if groups[1].rank == 0:
        try:
            experts.any_unfinished(False, True, torch.device("cpu"))
        except CollectiveError as error:
            said = str(error)
    dist.barrier(groups[1].group)
    experts.close()
    return said
