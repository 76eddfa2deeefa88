"""Greedy answers with the log-probability of each token, and two engines' answers beside each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

import pytest
import torch
from lmdeploy import GenerationConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 16
GREEDY = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, ignore_eos=True, logprobs=1)
TEXTS = ["Once upon a time", "hello", "The little dog ran to the house and", "One day, a girl named Sue " * 9]


@dataclass(frozen=True)
class Answer:
    """To one text: the tokens chosen, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


def ask(pipe: Any, texts: list[str] = TEXTS) -> list[Answer]:
    answers = pipe(texts, gen_config=GREEDY, do_preprocess=False)
    return [
        Answer(each.token_ids, [of[token] for of, token in zip(each.logprobs, each.token_ids, strict=True)])
        for each in answers
    ]


@cache
def hugging_face(path: str, dtype: torch.dtype = torch.float32) -> list[Answer]:
    """What transformers answers with the checkpoint at `path`, on the CPU."""
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    answers = []
    for ids in _prompts(path):
        with torch.inference_mode():
            tokens = reference.generate(ids, **settings)[0, ids.shape[1] :].tolist()
        answers.append(Answer(tokens, _logprobs(reference, ids, tokens)))
    return answers


@dataclass(frozen=True)
class Rounding:
    """How far log-probabilities may be off."""

    most: float
    """Each one."""
    mean: float = math.inf
    """All of them on average, which shows a small mistake that a bound for each one hides."""


def rounding(
    path: str, dtype: torch.dtype, expected: list[Answer], change: Callable[[Any], None] = lambda model: None
) -> Rounding:
    """How far log-probabilities may be off in `dtype`: on average twice as far as those of transformers on a CPU are.

    Each one three times as far as its worst: where two experts are nearly as good, rounding may choose the other, which
    moves one token a lot. `expected` is what transformers answers in float32 with the same weights; it is asked for the
    same tokens. `change` makes its model round what the form of the checkpoint rounds besides.
    """
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    change(plain)
    off = [
        abs(rounded - exact)
        for ids, answer in zip(_prompts(path), expected, strict=True)
        for rounded, exact in zip(_logprobs(plain, ids, answer.tokens), answer.logprobs, strict=True)
    ]
    return Rounding(most=3 * max(off), mean=2 * fmean(off))


def _prompts(path: str) -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    return [tokenizer(text, return_tensors="pt").input_ids for text in TEXTS]


def _logprobs(model: Any, ids: torch.Tensor, tokens: list[int]) -> list[float]:
    """Of each token, behind the prompt and those before it."""
    answer = torch.tensor(tokens)
    with torch.inference_mode():
        logits = model(torch.cat([ids, answer[None]], 1)).logits[0, ids.shape[1] - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, answer[:, None])[:, 0].tolist()


def compare(found: list[Answer], expected: list[Answer], rounding: Rounding) -> None:
    """Fail unless the log-probabilities agree as long as the tokens do, and at the first one that differs.

    There both engines had the same text before them and chose the likeliest token: it is a near-tie, or a mistake.
    """
    off: list[float] = []
    for mine, theirs in zip(found, expected, strict=True):
        assert len(mine.tokens) == len(theirs.tokens) == NEW_TOKENS
        same = [a == b for a, b in zip(mine.tokens, theirs.tokens, strict=True)]
        until = same.index(False) + 1 if False in same else NEW_TOKENS
        assert mine.logprobs[:until] == pytest.approx(theirs.logprobs[:until], rel=0, abs=rounding.most)
        off += [abs(a - b) for a, b in zip(mine.logprobs[:until], theirs.logprobs[:until], strict=True)]
    assert len(off) >= len(TEXTS) * NEW_TOKENS / 2, "near-ties are rare"
    assert fmean(off) <= rounding.mean
