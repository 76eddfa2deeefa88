"""The training loop: Muon and AdamW under a cosine, batches half prose and half Python, routers alive but uneven."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from .muon import Muon
from .routing import counted_loads, routers

WINDOW = 256  # tokens
BATCH = 2048  # tokens a step


@dataclass(frozen=True)
class Source:
    """Text to draw windows from."""

    stream: torch.Tensor
    starts: torch.Tensor
    """Where a window may begin."""

    @classmethod
    def anywhere(cls, stream: torch.Tensor) -> Source:
        return cls(stream, torch.arange(len(stream)))


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train."""

    steps: int
    window: int = WINDOW  # tokens
    warm_up: int = 100  # steps
    muon_rate: float = 0.02  # of the matrices inside the layers
    adam_rate: float = 4e-3  # of everything else
    balance: float = 4e-3  # weight of the auxiliary loss (Qwen3-MoE)
    bias_rate: float = 2e-3  # change of a router's correction bias a step (DeepSeek-V3)
    seed: int = 0


def train(model: PreTrainedModel, sources: list[Source], plan: Plan) -> None:
    """Train the model in place; each batch has as many windows of one source as of another."""
    draw = torch.Generator().manual_seed(plan.seed)
    optimizers = make_optimizers(model, plan)
    schedules = [LambdaLR(optimizer, lambda step: _rate(step, plan)) for optimizer in optimizers]
    started, average = time.monotonic(), math.log(model.config.vocab_size)
    count = BATCH // plan.window // len(sources)
    model.train()
    for step in range(1, plan.steps + 1):
        batch_BT = torch.cat([draw_windows(source, count, draw, plan.window) for source in sources])
        with counted_loads(model) as loads:
            answer = model(input_ids=batch_BT, labels=batch_BT, use_cache=False, output_router_logits=True)
        (answer.loss + balance_loss(model, answer.router_logits, plan.balance)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        revive(model, loads, plan.bias_rate)
        average += 0.02 * (answer.loss.item() - average)
        if step % 100 == 0:
            speed = step * batch_BT.numel() / (time.monotonic() - started)
            print(f"step {step}/{plan.steps}  loss {average:.3f}  {speed:.0f} tokens/s", flush=True)
    model.eval()


def make_optimizers(model: PreTrainedModel, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and expert stacks inside the layers; AdamW for embedding, head, routers and norms."""
    inside, other = [], []
    for name, weight in model.named_parameters():
        hidden = weight.dim() > 1 and ".layers." in name and not name.endswith("mlp.gate.weight")
        (inside if hidden else other).append(weight)
    adam = torch.optim.AdamW(other, lr=plan.adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [Muon(inside, lr=plan.muon_rate), adam]


def _rate(step: int, plan: Plan) -> float:
    """Share of the peak learning rate: a linear warm-up, then a cosine down to a twentieth."""
    progress = min(1.0, max(0, step - plan.warm_up) / max(1, plan.steps - plan.warm_up))
    return min(1.0, (step + 1) / plan.warm_up) * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)


def draw_windows(source: Source, count: int, draw: torch.Generator, window: int = WINDOW) -> torch.Tensor:
    """`count` random windows of a source, [count, window]."""
    starts = source.starts[source.starts < len(source.stream) - window]
    chosen = starts[torch.randint(len(starts), (count,), generator=draw)]
    return torch.stack([source.stream[start : start + window] for start in chosen.tolist()])


def balance_loss(
    model: PreTrainedModel, logits: tuple[torch.Tensor, ...], weight: float
) -> torch.Tensor | float:
    """Switch Transformer's auxiliary loss of each layer, weak: no expert dies, the text's own unevenness stays.

    transformers adds it for all layers pooled, which lets a layer live on a few experts that the others leave alone.
    Routers with a correction bias (DeepSeek-V3) need none.
    """
    pairs = zip(routers(model), logits, strict=True)
    return weight * sum(
        load_balancing_loss_func((logits_NE,), router.num_experts, router.top_k)
        for router, logits_NE in pairs
        if not hasattr(router, "e_score_correction_bias")
    )


def revive(model: PreTrainedModel, loads: list[torch.Tensor], rate: float) -> None:
    """Nudge the correction bias of starved and of flooded experts (DeepSeek-V3's aux-loss-free balance, section 2.1.2).

    Only experts outside a third to three times the mean load are touched: all stay alive, and what the text makes
    uneven stays uneven. Routers without the bias (Qwen3-MoE) have their auxiliary loss instead.
    """
    for router, loads_E in zip(routers(model), loads, strict=True):
        if hasattr(router, "e_score_correction_bias"):
            relative_E = loads_E / loads_E.float().mean()
            router.e_score_correction_bias += rate * ((relative_E < 1 / 3).float() - (relative_E > 3).float())
