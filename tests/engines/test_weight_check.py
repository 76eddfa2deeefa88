"""A checkpoint that does not fill every parameter is refused by name, as LMDeploy itself would start with it.

The checkpoints are pickled ones, whose tensors cannot be known before they are loaded; see `test_checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import epbackend
from epbackend.errors import ConfigError, WorkerError
from tests.helpers.engines import config

pytestmark = [pytest.mark.cpu, pytest.mark.engine, pytest.mark.usefixtures("forked_ranks")]
LAYER = "model.layers.1.mlp"
EXPERT = f"{LAYER}.experts.5"

Tensors = dict[str, torch.Tensor]


def without(*names: str) -> Callable[[Tensors], None]:
    return lambda tensors: [tensors.pop(name) for name in names] and None


def narrower(tensors: Tensors) -> None:
    tensors[f"{EXPERT}.up_proj.weight"] = tensors[f"{EXPERT}.up_proj.weight"][:, 1:].contiguous()


def changed(path: Path, change: Callable[[Tensors], None], to: Path) -> str:
    """A copy of the checkpoint with other tensors, pickled."""
    to.mkdir()
    for file in path.glob("*.json"):
        (to / file.name).write_bytes(file.read_bytes())
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    torch.save(tensors, to / "pytorch_model.bin")
    return str(to)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            without(*(f"{EXPERT}.{matrix}_proj.weight" for matrix in ("gate", "up", "down"))),
            "layer 1, expert 5: gate weight, layer 1, expert 5: up weight, layer 1, expert 5: down weight",
        ),
        (without(f"{EXPERT}.up_proj.weight"), "layer 1, expert 5: up weight;"),
        (
            without(f"{LAYER}.gate.weight"),
            r"lacks model\.layers\.1\.mlp\.gate\.weight, which its other layers have",
        ),
        (
            without("model.layers.2.self_attn.k_proj.weight"),
            r"lacks model\.layers\.2\.self_attn\.qkv_proj\.weight k",
        ),
        (narrower, r"layer 1, expert 5: up weight, of shape \(32, 63\), cannot be loaded"),
    ],
    ids=["an expert", "a matrix", "a router", "the keys", "a shape"],
)
def test_what_a_checkpoint_lacks_is_named(checkpoint, tmp_path, change, said):
    path = changed(checkpoint("qwen3-moe"), change, tmp_path / "model")
    with pytest.raises(ConfigError, match=said):
        epbackend.pipeline(path, config())


def test_the_rank_that_needs_an_expert_tells_its_parent(checkpoint, tmp_path):
    path = changed(checkpoint("qwen3-moe"), without(f"{EXPERT}.down_proj.weight"), tmp_path / "model")
    with pytest.raises(WorkerError, match=r"rank 0 failed: .*ConfigError: .*layer 1, expert 5: down weight"):
        epbackend.pipeline(path, config(ep_size=2))
