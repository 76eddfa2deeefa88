"""Records which experts tiny-qwen3-moe chooses, by topic: what `benchmarks.node_splits` and `.affinity` take as routes.

`python -m benchmarks.tiny_routes FOLDER`: writes prose.npz (this project's pages) and code.npz (Python's own library),
the array `topk_ids_TK` of the last layer.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.report import command_line
from epbackend.models import resolve

TOKENS, WINDOW = 40_960, 512
TOPICS = {
    "prose": sorted(Path(__file__).parents[1].glob("docs/*.md")),
    "code": sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")),
}


def routes(model: str, texts: list[Path]) -> np.ndarray:
    """topk_ids_TK of the last layer, of as many windows as make TOKENS tokens."""
    folder = resolve(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = "\n".join(path.read_text(errors="replace") for path in texts)[: 8 * TOKENS]
    ids = tokenizer(text, return_tensors="pt").input_ids[0, :TOKENS]
    windows_BT = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    with torch.inference_mode():
        logits_TE = torch.cat(
            [network(part_BT, output_router_logits=True).router_logits[-1] for part_BT in windows_BT.split(4)]
        )
    return logits_TE.topk(network.config.num_experts_per_tok).indices.numpy()


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args().folder
    chosen.mkdir(parents=True, exist_ok=True)
    for topic, texts in TOPICS.items():
        np.savez(chosen / f"{topic}.npz", topk_ids_TK=routes("tiny-qwen3-moe", texts))
        print(f"written: {chosen / topic}.npz")
