"""Logits processors: those of requests' options, and a user's callables on their way to the ranks.

LMDeploy pickles the processors of a batch with every step. Letters of its own: I tokens of a sequence so far.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import cloudpickle
import torch
from torch import Tensor

from epbackend.engines.lmdeploy.requests.checks import BadRequestError

logger = logging.getLogger("lmdeploy")

NO_TOKEN = -1
"""Stands in a batch for places that hold no token, and at the end of an answer whose processor failed."""


@dataclass(frozen=True)
class LogitBias:
    """Adds to the logits of some tokens: OpenAI's `logit_bias`."""

    bias: tuple[tuple[int, float], ...]

    def __call__(self, ids_I: Tensor, logits_V: Tensor) -> Tensor:
        """Token ids so far and logits of the next one -> logits."""
        ids = torch.tensor([token for token, _ in self.bias], dtype=torch.long, device=logits_V.device)
        return logits_V.index_add(0, ids, logits_V.new_tensor([bias for _, bias in self.bias]))


def logit_bias(bias: Mapping[str, float], vocabulary: int) -> LogitBias:
    """The processor of a request's `logit_bias`; biases are cut to [-100, 100], as OpenAI does.

    Raises:
        BadRequestError: a key is no token id.
    """
    pairs = []
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 20 and int(key) < vocabulary):
            raise BadRequestError(
                "logit_bias", f"{key[:30]!r} is no id of the vocabulary of {vocabulary} tokens"
            )
        if value != value:
            raise BadRequestError("logit_bias", f"the bias of token {key} is not a number")
        pairs.append((int(key), min(100.0, max(-100.0, value))))
    return LogitBias(tuple(pairs))


@dataclass(frozen=True)
class OutputPenalties:
    """Lowers the logits of tokens that the answer has already: OpenAI's presence and frequency penalties."""

    presence: float
    frequency: float
    prompt_tokens: int = 0
    """How many of a sequence's tokens are not the answer's."""

    def __call__(self, ids_I: Tensor, logits_V: Tensor) -> Tensor:
        """Token ids so far and logits of the next one -> logits."""
        counts_V = torch.bincount(ids_I[self.prompt_tokens :], minlength=logits_V.shape[0])
        return logits_V - self.presence * (counts_V > 0) - self.frequency * counts_V


def output_penalties(presence: float | None, frequency: float | None) -> list[OutputPenalties]:
    """The processors of a request's penalties."""
    return [OutputPenalties(presence or 0.0, frequency or 0.0)] if presence or frequency else []


class Portable:
    """A user's callable that any process can unpickle: a lambda, a closure, a function of the script that runs.

    Pickled once; each process makes one object of it, so that what has a state keeps it.
    """

    def __init__(self, processor: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._pickled = cloudpickle.dumps(processor)

    def __call__(self, ids_I: Tensor, logits_V: Tensor) -> Tensor:
        """What the callable makes of token ids so far and logits of the next one."""
        return _unpickled(self._pickled)(ids_I, logits_V)


@functools.lru_cache(maxsize=256)
def _unpickled(pickled: bytes) -> Callable[[Tensor, Tensor], Tensor]:
    return cloudpickle.loads(pickled)


def for_ranks(processors: list[Any] | None, prompt_tokens: int) -> list[Any] | None:
    """Processors that can be sent to the ranks, for a prompt of so many tokens.

    Raises:
        BadRequestError: one of them cannot be pickled.
    """
    if not processors:
        return None
    ready: list[Any] = []
    for each in processors:
        if isinstance(each, OutputPenalties):
            ready.append(replace(each, prompt_tokens=prompt_tokens))
        elif isinstance(each, LogitBias | Portable):
            ready.append(each)
        else:
            try:
                ready.append(Portable(each))
            except Exception as error:  # whatever the object's own pickling raises
                raise BadRequestError("logits_processors", f"{each!r} cannot be pickled: {error}") from error
    return ready


failed_rows: set[int] = set()
"""Sequences of this rank's batch whose processor failed in the step that is being sampled."""


def apply_processors(processors: list[list[Any] | None], ids_BI: Tensor, logits_BV: Tensor) -> Tensor:
    """LMDeploy's `_apply_custom_logits_processors`: one that fails is noted in `failed_rows`, and fails no other."""
    for row, of_row in enumerate(processors):
        ids_I = ids_BI[row]
        try:
            for processor in of_row or ():
                logits_BV[row] = processor(ids_I[ids_I != NO_TOKEN], logits_BV[row])
        except Exception:
            logger.exception("a logits processor failed; its request ends with an error")
            failed_rows.add(row)
    return logits_BV


def end_failed(output: Any) -> None:
    """Ends the sequences in `failed_rows`: their last token becomes NO_TOKEN in what the engine is told."""
    if not failed_rows:
        return
    rows = sorted(failed_rows)
    failed_rows.clear()
    if output is not None:
        # The tokens themselves are the next step's input: LMDeploy may have begun it.
        output.next_token_ids, output.stopped = output.next_token_ids.clone(), output.stopped.clone()
        output.next_token_ids[rows] = NO_TOKEN
        output.stopped[rows] = True
