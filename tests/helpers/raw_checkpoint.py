"""Safetensors checkpoints of MoE models written and read by bytes: any type, any order, any form of header."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ITEM_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1, "I32": 4}


@dataclass(frozen=True)
class Stored:
    """A tensor: its type, shape and bytes."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes


def drawn(draw: np.random.Generator, dtype: str, *shape: int) -> Stored:
    return Stored(dtype, shape, draw.bytes(int(np.prod(shape)) * ITEM_BYTES[dtype]))


def fp8_blocks(draw: np.random.Generator, mlp: str, experts: int) -> dict[str, Stored]:
    """DeepSeek-V3's form: an expert by itself, FP8 with scales of blocks; its router has a correction bias."""
    found = {
        f"{mlp}.gate.weight": drawn(draw, "BF16", experts, 24),
        f"{mlp}.gate.e_score_correction_bias": drawn(draw, "F32", experts),
        f"{mlp}.shared_experts.down_proj.weight": drawn(draw, "F8_E4M3", 24, 8),
    }
    for expert in range(experts):
        found[f"{mlp}.experts.{expert}.down_proj.weight"] = drawn(draw, "F8_E4M3", 24, 8)
        found[f"{mlp}.experts.{expert}.down_proj.weight_scale_inv"] = drawn(draw, "F32", 1, 1)
    return found


def packed(draw: np.random.Generator, mlp: str, experts: int) -> dict[str, Stored]:
    """The form of AWQ and GPTQ: an expert by itself, packed."""
    found = {f"{mlp}.gate.weight": drawn(draw, "BF16", experts, 24)}
    for expert in range(experts):
        for part, dtype in (("qweight", "I32"), ("qzeros", "I32"), ("scales", "BF16")):
            found[f"{mlp}.experts.{expert}.down_proj.{part}"] = drawn(draw, dtype, 4, 3)
    return found


def stacked(draw: np.random.Generator, mlp: str, experts: int) -> dict[str, Stored]:
    """gpt-oss's form: all experts in one tensor, MXFP4 with scales and biases; its router has a bias."""
    return {
        f"{mlp}.router.weight": drawn(draw, "BF16", experts, 24),
        f"{mlp}.router.bias": drawn(draw, "BF16", experts),
        f"{mlp}.experts.down_proj_blocks": drawn(draw, "U8", experts, 24, 2, 4),
        f"{mlp}.experts.down_proj_scales": drawn(draw, "U8", experts, 24, 2),
        f"{mlp}.experts.down_proj_bias": drawn(draw, "BF16", experts, 24),
    }


def biased_by_block(draw: np.random.Generator, mlp: str, experts: int) -> dict[str, Stored]:
    """Ernie's form: the correction bias is a row, beside the router."""
    found = packed(draw, mlp, experts)
    return found | {f"{mlp}.moe_statics.e_score_correction_bias": drawn(draw, "F32", 1, experts)}


FORMS: dict[str, Callable[[np.random.Generator, str, int], dict[str, Stored]]] = {
    "fp8-blocks": fp8_blocks,
    "packed": packed,
    "stacked": stacked,
    "biased-by-block": biased_by_block,
}


def model_of(form: str, layers: int, experts: int, seed: int = 0) -> dict[str, Stored]:
    """The tensors of a model whose first layer is dense, with a draft layer at the end."""
    draw = np.random.default_rng(seed)
    found = {
        "model.embed_tokens.weight": drawn(draw, "BF16", 16, 24),
        "model.layers.0.mlp.gate_proj.weight": drawn(draw, "BF16", 8, 24),
    }
    for layer in range(1, layers + 1):
        found[f"model.layers.{layer}.input_layernorm.weight"] = drawn(draw, "BF16", 24)
        found |= FORMS[form](draw, f"model.layers.{layer}.mlp", experts)
    return found


def write_model(
    folder: Path,
    tensors: dict[str, Stored],
    *,
    experts: int,
    layers: int,
    files: int = 1,
    seed: int = 0,
    indent: int | None = None,
    padding: int = 0,
) -> Path:
    """Writes a checkpoint; tensors come in a random order and file. `padding` are bytes at the end of each header."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    names = [str(name) for name in draw.permutation(list(tensors))]
    file_of = {name: int(draw.integers(files)) for name in names}
    used = sorted(set(file_of.values()))
    titles = {
        number: "model.safetensors" if files == 1 else f"model-{number:05}-of-{files:05}.safetensors"
        for number in used
    }
    for number, title in titles.items():
        header: dict[str, object] = {"__metadata__": {"format": "pt", "note": 'experts.0 "x": {'}}
        content = b""
        for name in (name for name in names if file_of[name] == number):
            stored = tensors[name]
            ends = [len(content), len(content) + len(stored.content)]
            header[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": ends}
            content += stored.content
        text = json.dumps(header, indent=indent).encode() + b" " * padding
        (folder / title).write_bytes(struct.pack("<Q", len(text)) + text + content)
    if files > 1:
        weight_map = {name: titles[file_of[name]] for name in sorted(names)}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {"num_experts": experts, "num_hidden_layers": layers, "first_k_dense_replace": 1}
    config |= {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "figures").mkdir()
    (folder / "figures" / "note.txt").write_text("kept")
    return folder


def read_model(folder: Path) -> dict[str, Stored]:
    """Every tensor, found by the index where there is one, else in the one file."""
    index = folder / "model.safetensors.index.json"
    found: dict[str, Stored] = {}
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        (length,) = struct.unpack_from("<Q", content)
        for name, entry in json.loads(content[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                assert name not in found
                found[name] = Stored(entry["dtype"], tuple(entry["shape"]), content[start:end])
                assert not index.exists() or json.loads(index.read_text())["weight_map"][name] == file.name
    return found


def all_bytes(folder: Path) -> dict[str, bytes]:
    """File -> its content, folders too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
