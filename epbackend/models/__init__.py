"""The packaged tiny models, found by name.

Both are trained MoE models of a few million parameters (README.md beside this file). Every command or function that
takes a model takes the names of `TINY_MODELS` too.
"""

from __future__ import annotations

from pathlib import Path

TINY_MODELS = ("tiny-qwen3-moe", "tiny-deepseek-v3")


def resolve(model: str) -> str:
    """The folder of a packaged model if `model` is one of `TINY_MODELS`, else `model` unchanged (a path)."""
    if model in TINY_MODELS:
        return str(Path(__file__).resolve().parent / model.replace("-", "_"))
    return model
