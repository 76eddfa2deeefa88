"""Log probabilities as OpenAI's answers list them, made of the engine's: a dict from token id to its value.

The dict has the chosen token and the most probable ones; how many of these a request wants to see is not in it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from lmdeploy.serve.openai.protocol import (
    ChatCompletionTokenLogprob,
    ChoiceLogprobs,
    LogProbs,
    TopLogprob,
)

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class ShownLogprobs(dict[int, float]):
    """One token's log probabilities, which knows how many of the most probable tokens the request asked for."""

    shown = 0


def showing(logprobs: Sequence[dict[int, float]] | None, shown: int) -> list[ShownLogprobs] | None:
    """The engine's log probabilities, marked."""
    if logprobs is None:
        return None
    marked = [ShownLogprobs(each) for each in logprobs]
    for each in marked:
        each.shown = shown
    return marked


def most_probable(logprobs: dict[int, float], count: int) -> list[tuple[int, float]]:
    """The `count` most probable tokens and their values, the first first."""
    return sorted(logprobs.items(), key=lambda item: (-item[1], item[0]))[:count]


def chat_logprobs(tokenizer: Any, token_ids: list[int] | None, logprobs: Any) -> ChoiceLogprobs | None:
    """LMDeploy's `_create_chat_completion_logprobs`: with as many top tokens as asked for, the chosen among them."""
    if token_ids is None or logprobs is None:
        return None
    content = []
    for token_id, tops in zip(token_ids, logprobs, strict=False):
        text, data = token_text(tokenizer, token_id)
        top_logprobs = []
        for each, value in most_probable(tops, getattr(tops, "shown", 0)):
            top_text, top_data = token_text(tokenizer, each)
            top_logprobs.append(TopLogprob(token=top_text, bytes=list(top_data), logprob=_finite(value)))
        content.append(
            ChatCompletionTokenLogprob(
                token=text, bytes=list(data), logprob=_finite(tops[token_id]), top_logprobs=top_logprobs
            )
        )
    return ChoiceLogprobs(content=content)


def completion_logprobs(
    tokenizer: Any,
    token_ids: Sequence[int],
    logprobs: Sequence[dict[int, float] | None],
    shown: int,
    offset: int,
) -> LogProbs:
    """The form of /v1/completions; None in `logprobs` is a token without one, the prompt's first.

    `offset` is how many characters of the answer come before the first token.
    """
    listed = LogProbs(top_logprobs=[] if shown else None)
    for token_id, values in zip(token_ids, logprobs, strict=True):
        text, _ = token_text(tokenizer, token_id)
        listed.tokens.append(text)
        listed.text_offset.append(offset)
        listed.token_logprobs.append(None if values is None else _finite(values[token_id]))
        if listed.top_logprobs is not None:
            listed.top_logprobs.append(
                None
                if values is None
                else {
                    token_text(tokenizer, each)[0]: _finite(value)
                    for each, value in most_probable(values, shown)
                }
            )
        offset += len(text)
    return listed


def token_text(tokenizer: Any, token_id: int) -> tuple[str, bytes]:
    """What a token stands for: its text and its bytes. A token of half a character is written as `bytes:\\xe2`."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    if isinstance(token, bytes):
        data = token
    elif token is None:  # the embedding has more rows than the tokenizer has tokens
        data = b""
    elif token_id in tokenizer.added_tokens_decoder:
        data = token.encode()
    elif tokenizer.convert_tokens_to_ids("\u0120") not in (None, tokenizer.unk_token_id):  # byte-level
        data = bytes(_byte_of()[letter] for letter in token)
    elif byte := BYTE_TOKEN.fullmatch(token):
        data = bytes.fromhex(byte[1])
    else:
        data = token.replace("\u2581", " ").encode()  # SentencePiece's space
    try:
        return data.decode(), data
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data


@functools.cache
def _byte_of() -> dict[str, int]:
    """The letter of each byte in byte-level vocabularies (GPT-2): the byte's own where it can be printed."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


def _finite(value: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for a token that could not come."""
    return max(value, -9999.0)
