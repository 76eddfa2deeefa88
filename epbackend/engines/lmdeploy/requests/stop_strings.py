"""Stop strings of any length: found in the text, across the borders of tokens and of streamed parts.

LMDeploy stops at single tokens. Here answers come part by part; a part is held back while its text could be the begin
of a stop string, so that nothing of one is ever sent.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    """Begin and end of the stop string that ends first, the longest of those; None where there is none.

    >>> first_stop("one two", ["two", "e t"])
    (2, 5)
    """
    found = [(place, place + len(stop)) for stop in stops if (place := text.find(stop)) >= 0]
    return min(found, key=lambda span: (span[1], span[0])) if found else None


def possible_begin(text: str, stops: Sequence[str]) -> int:
    """Where the text's end could become a stop string, the earliest place; its length where it could not.

    >>> possible_begin("one t", ["two"])
    4
    """
    longest = max(map(len, stops))
    for place in range(max(0, len(text) - longest + 1), len(text)):
        if any(stop.startswith(text[place:]) for stop in stops):
            return place
    return len(text)


async def until_stop(
    parts: AsyncIterator[Any], stops: Sequence[str], keep_stop: bool, min_new_tokens: int
) -> AsyncIterator[Any]:
    """The parts of an answer (LMDeploy's GenOut) up to the first stop string; then `parts` is closed.

    A part that begins inside the stop string is dropped, with its tokens and log probabilities. `keep_stop` ends the
    text with the stop string instead. Before `min_new_tokens` none is looked for.
    """
    held: list[Any] = []
    async with aclosing(parts):  # type: ignore[type-var]
        async for part in parts:
            held.append(part)
            text = "".join(each.response or "" for each in held)
            wanted = part.generate_token_len >= min_new_tokens
            if wanted and (span := first_stop(text, stops)):
                for each in _ended(held, span[1] if keep_stop else span[0]):
                    yield each
                return
            certain = possible_begin(text, stops) if wanted and part.finish_reason is None else len(text)
            while held and (certain >= len(held[0].response or "")):
                certain -= len(held[0].response or "")
                yield held.pop(0)


def _ended(held: list[Any], length: int) -> list[Any]:
    """The parts as far as `length` characters reach, the last one cut and finished."""
    kept, begin = [], 0
    for part in held:
        if begin >= length:
            break
        text = part.response or ""
        kept.append(replace(part, response=text[: length - begin], finish_reason=None))
        begin += len(text)
    if not kept:
        kept = [replace(held[0], response="", token_ids=[], logprobs=None)]
    kept[-1] = replace(kept[-1], finish_reason="stop", generate_token_len=held[-1].generate_token_len)
    return kept
