"""A tiny model in W8A8, as `lmdeploy lite smooth_quant` writes it: int8 values and a scale for each output.

LMDeploy's own command wants a data set to calibrate with. Without it nothing is smoothed, and the form is the same.

    python -m tests.helpers.w8a8_checkpoint tiny-qwen3-moe FOLDER     # FOLDER/w8a8 and FOLDER/float
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from epbackend.kernels.int8 import Int8Matrix
from epbackend.models import resolve

LINEAR = re.compile(
    r"\.(self_attn\.([qkvo]|q_[ab]|kv_b)_proj|self_attn\.kv_a_proj_with_mqa"
    r"|(mlp|experts\.\d+|shared_experts)\.(gate|up|down)_proj)\.weight$"
)
QUANTIZED = {"quant_method": "smooth_quant", "quant_dtype": "int8", "modules_to_not_convert": ["mlp.gate"]}


def write(model: str, folder: Path) -> tuple[Path, Path]:
    """The folders of the model in W8A8, and of the float32 model that those values stand for."""
    source = Path(resolve(model))
    int8, floats = folder / "w8a8", folder / "float"
    for each in (int8, floats):
        shutil.copytree(source, each, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((source / "config.json").read_text())
    (int8 / "config.json").write_text(json.dumps(settings | {"quantization_config": QUANTIZED}))
    weights = load_file(source / "model.safetensors")
    quantized, restored = {}, {}
    for name, weight in weights.items():
        if LINEAR.search(name):
            matrix = Int8Matrix.of(weight)
            quantized[name] = matrix.values_NK
            quantized[name.removesuffix("weight") + "scale"] = matrix.scale_N[:, None]
            restored[name] = matrix.values_NK * matrix.scale_N[:, None]
        else:
            quantized[name], restored[name] = weight, weight.float()
    save_file(quantized, int8 / "model.safetensors", {"format": "pt"})
    save_file(restored, floats / "model.safetensors", {"format": "pt"})
    return int8, floats


def round_rows(model: Any) -> None:
    """Make a model of transformers round the rows of its quantized matrices, as W8A8 does: int8, a scale each.

    What comes to the down matrices inside its experts is left as it is.
    """

    def rounded(_: torch.nn.Module, args: tuple) -> tuple:
        rows = args[0].float()
        scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
        return ((rows / scale).round() * scale).to(args[0].dtype), *args[1:]

    for name, module in model.named_modules():
        if LINEAR.search(f"{name}.weight") or name.endswith(".experts"):
            module.register_forward_pre_hook(rounded)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
