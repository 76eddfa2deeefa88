"""What a request may contain: checked before it reaches the engine, so that none can end it.

Two checks, because LMDeploy has two ways in. `check_body` sees what a client sent, each field by its name, and also
those that LMDeploy would silently ignore. `check_generation` sees what any way in makes of it, token ids and a
GenerationConfig, just before the engine.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from epbackend.errors import ConfigError, did_you_mean

INT64 = 2**63
STOPS = 64
"""The most stop strings of a request: each is looked for in every part of an answer."""
STOP_LENGTH = 1000
"""The most characters of one."""
CHOICES = 4096
"""The most answers that one request may ask for: prompts, times `n`."""
ALMOST_ZERO = 1e-4
"""A temperature below it overflows the logits; its limit is the greedy answer."""
LONG = 20_000
"""Characters from which on texts are tokenized beside the event loop: so many take a tokenizer 12 ms, and handing them
over 0.5 ms."""


class BadRequestError(ValueError):
    """A request that cannot be served; `field` is the one at fault."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


@dataclass(frozen=True)
class Range:
    """Numbers that a field may have."""

    low: float
    high: float
    integer: bool = False
    above_low: bool = False
    """Whether `low` itself is excluded."""

    def check(self, field: str, value: Any, *, exact: bool = False) -> None:
        """Raises BadRequestError unless the value is such a number, by its JSON type too.

        Clients may write an integer as 5.0, which its schema converts; `exact` is for those that nobody converts.
        """
        kind = "an integer" if self.integer else "a finite number"
        if isinstance(value, bool) or not isinstance(value, int if exact and self.integer else int | float):
            raise BadRequestError(field, f"must be {kind}, not {_shown(value)}")
        if isinstance(value, float) and (not math.isfinite(value) or (self.integer and value % 1)):
            raise BadRequestError(field, f"must be {kind}, not {value}")
        if not self.low <= value <= self.high or (self.above_low and value == self.low):
            bracket = "(" if self.above_low else "["
            raise BadRequestError(field, f"must be in {bracket}{self.low}, {self.high}], not {_shown(value)}")


PENALTY = Range(-2, 2)
COUNT = Range(1, 2**31, integer=True)
COUNT_OR_NONE = Range(0, 2**31, integer=True)
SHOWN_LOGPROBS = Range(0, 20, integer=True)
RANGES = {
    "temperature": Range(0, 2),
    "top_p": Range(0, 1, above_low=True),
    "min_p": Range(0, 1),
    "top_k": COUNT_OR_NONE,
    "presence_penalty": PENALTY,
    "frequency_penalty": PENALTY,
    "repetition_penalty": Range(0, 100, above_low=True),
    "repetition_ngram_size": COUNT_OR_NONE,
    "repetition_ngram_threshold": COUNT_OR_NONE,
    "n": Range(1, 128, integer=True),
    "max_completion_tokens": COUNT,
    "max_output_tokens": COUNT,
    "min_new_tokens": COUNT_OR_NONE,
    "top_logprobs": SHOWN_LOGPROBS,
    "top_logprobs_num": COUNT_OR_NONE,
    "logprob_start_len": Range(-1, 2**31, integer=True),
    "seed": Range(-INT64, 2 * INT64 - 1, integer=True),
    "session_id": Range(-1, INT64 - 1, integer=True),
}
"""Field -> what it may be, whatever endpoint has it."""

WITHOUT_EFFECT = frozenset(
    {
        "model",
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)
"""Fields that clients send and that change no answer: where an endpoint does not know them, nothing is done."""

INSTEAD = {
    "guided_json": 'response_format {"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}',
    "guided_regex": 'response_format {"type": "regex_schema", "regex_schema": ...}',
    "guided_choice": 'response_format {"type": "regex_schema", "regex_schema": "one|other"}',
    "structured_outputs": "response_format",
    "min_tokens": "min_new_tokens",
    "best_of": "n",
    "functions": "tools",
    "function_call": "tool_choice",
}
"""Fields of other servers -> what says the same here."""

NEUTRAL = {"best_of": 1, "length_penalty": 1}
"""Fields of other servers -> the value that asks for nothing; so do null, false, 0 and what is empty, of any field."""

CALL_ARGUMENTS = frozenset(
    {
        "do_preprocess",
        "adapter_name",
        "tools",
        "reasoning_effort",
        "enable_thinking",
        "chat_template_kwargs",
        "media_io_kwargs",
        "mm_processor_kwargs",
        "stream_response",
        "multiplex",
    }
)
"""What a pipeline's call takes beside prompts, sessions and gen_config; `multiplex` comes from LMDeploy's `chat`."""

NESTING = 64
"""The most levels of a response format: to read 64 takes a grammar library 0.3 s, 400 of them minutes."""

MEDIA = frozenset(
    f"{medium}{form}"
    for medium in ("image", "video", "audio", "time_series")
    for form in ("", "_url", "_data")
) | {"input_audio", "source"}
"""Fields that hold a picture or sound, by its address or whole: they are no text of a prompt."""

OF_THE_SERVER = frozenset(
    {
        "chat_template",
        "conversation",
        "messages",
        "max_length",
        "padding",
        "prompt",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
"""Arguments of transformers' `apply_chat_template` that no client may set: a template of its own is a program, which
may loop without an end."""

DISAGGREGATION = ("migration_request", "with_cache", "preserve_cache")
"""Read by LMDeploy from the raw request, so no schema has them. In an engine that is not disaggregated (its role is
Hybrid) the first makes a request wait forever, and the last ends the engine."""

OPTIONS = {
    "temperature": RANGES["temperature"],
    "top_p": Range(0, 1),
    "min_p": RANGES["min_p"],
    "top_k": COUNT_OR_NONE,
    "repetition_penalty": RANGES["repetition_penalty"],
    "repetition_ngram_size": COUNT_OR_NONE,
    "repetition_ngram_threshold": COUNT_OR_NONE,
    "max_new_tokens": COUNT_OR_NONE,
    "min_new_tokens": COUNT_OR_NONE,
    "random_seed": Range(-math.inf, math.inf, integer=True),
    "logprobs": Range(-1, 2**31, integer=True),
    "logprob_start_len": RANGES["logprob_start_len"],
}
"""Option of a GenerationConfig -> what it may be. From Python, no schema has converted it."""

OPTIONAL = frozenset({"min_new_tokens", "random_seed", "logprobs"})
"""Those that may be None as the engine gets them."""


def check_body(
    body: Any,
    known: Collection[str] | None,
    session_len: int,
    token_length: int,
    *,
    disaggregated: bool = False,
) -> None:
    """Checks the JSON of a request by its fields' names.

    Args:
        body: what the client sent.
        known: the fields that the endpoint reads; None where others are accepted.
        session_len: the most tokens that a session may have.
        token_length: characters of the longest token. A text that is too long by that alone is not tokenized, which
            took more than a minute for 50 MB.
        disaggregated: whether the engine is one for prefill or decoding alone.

    Raises:
        BadRequestError: naming the field.
    """
    if not isinstance(body, dict):
        raise BadRequestError("body", f"must be a JSON object, not {_shown(body)}")
    most = session_len * token_length
    given = {field: value for field, value in body.items() if value is not None}
    for field, value in given.items():
        if field in DISAGGREGATION:
            _check_disaggregation(field, value, disaggregated)
        elif known is not None and field not in known:
            _refuse_unknown(field, value, known)
        if field in RANGES:
            RANGES[field].check(field, value)
    _check_lengths(given, session_len)
    _check_response_format(given.get("response_format"))
    _check_stop(given.get("stop"))
    # Token ids may stand for messages, as an empty list.
    if "messages" in given and not (given["messages"] == [] and "input_ids" in given):
        _check_messages(given["messages"], session_len, most)
    _check_template_options(given.get("chat_template_kwargs"))
    for field, value in given.items():
        for text in () if field in MEDIA else texts_in(value):
            _check_text(field, text, most)
    if given.get("suffix"):
        raise BadRequestError("suffix", "is not supported: it would be ignored; leave it out")


def check_generation(
    input_ids: Sequence[int], generation: Any, vocabulary: int | None, *, disaggregated: bool = False
) -> None:
    """Checks token ids and a GenerationConfig, as the engine would get them.

    `disaggregated`: whether the engine is one for prefill or decoding alone.

    Raises:
        BadRequestError: naming the field.
    """
    if len(input_ids) == 0:
        raise BadRequestError("prompt", "must not be empty")
    _check_ids("prompt", input_ids, vocabulary)
    for field in ("stop_token_ids", "bad_token_ids"):
        _check_ids(field, getattr(generation, field) or (), vocabulary)
    _check_stop(generation.stop_words)
    for field, allowed in OPTIONS.items():
        value = getattr(generation, field)
        if value is not None or field not in OPTIONAL:
            allowed.check(field, value, exact=True)
    if vocabulary is not None and (generation.logprobs or 0) > vocabulary:
        raise BadRequestError(
            "logprobs", f"must be at most {vocabulary}, the size of the vocabulary, not {generation.logprobs}"
        )
    for field in DISAGGREGATION:
        _check_disaggregation(field, getattr(generation, field), disaggregated)


def check_call(prompts: int, gen_config: Any, arguments: Collection[str], *, experts_told: bool) -> None:
    """Checks a call of a pipeline: what LMDeploy would ignore, or wait for without an end.

    `gen_config` is None, one GenerationConfig or a list of one a prompt; `arguments` are the names of the others.
    `experts_told`: the engine keeps which experts each token had (enable_return_routed_experts).

    Raises:
        ConfigError: naming the argument, or the field of the GenerationConfig.
    """
    for name in arguments:
        if name not in CALL_ARGUMENTS:
            raise ConfigError(
                f"{name}: is no argument of this call, and would be ignored{did_you_mean(name, CALL_ARGUMENTS)}; "
                "how to answer is said by gen_config=lmdeploy.GenerationConfig(...)"
            )
    each = gen_config if isinstance(gen_config, list) else [gen_config]
    if isinstance(gen_config, list) and len(gen_config) != prompts:
        raise ConfigError(
            f"gen_config: {len(gen_config)} of them for {prompts} prompts; give one, or one a prompt"
        )
    for generation in each:
        if generation is not None:
            _check_python_options(generation, experts_told)


def _check_python_options(generation: Any, experts_told: bool) -> None:
    if generation.n > 1:
        raise ConfigError(
            "GenerationConfig.n: the engine gives one answer a prompt; repeat the prompt n times"
        )
    for field in ("output_logits", "output_last_hidden_state"):
        if getattr(generation, field) is not None:
            raise ConfigError(
                f"GenerationConfig.{field}: the engine does not return it with an answer; leave it out "
                "(logprobs, or pipe.get_ppl, may serve)"
            )
    if generation.return_ppl:
        raise ConfigError("GenerationConfig.return_ppl: no answer holds it; use pipe.get_ppl")
    if generation.return_routed_experts and not experts_told:
        raise ConfigError(
            "GenerationConfig.return_routed_experts: the engine does not keep them; set "
            "engine.extra: {enable_return_routed_experts: true}"
        )


def check_adapter(name: str | None, adapters: Collection[str]) -> None:
    """Raises BadRequestError for a LoRA adapter that the engine does not have."""
    if name is not None and name not in adapters:
        has = f"it has {', '.join(sorted(adapters))}" if adapters else "it was started without any"
        raise BadRequestError("adapter_name", f"the engine has no adapter {name!r}; {has}")


def check_format(wanted: Any) -> None:
    """Raises BadRequestError for a response format that is none, or takes too long to read."""
    if not isinstance(wanted, dict):
        raise BadRequestError("response_format", "must be a dict such as {'type': 'json_object'}")
    level: list[Any] = [wanted]
    for _ in range(NESTING):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    if level:
        raise BadRequestError("response_format", f"must have at most {NESTING} levels of lists and objects")


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a JSON value or in LMDeploy's objects made of one, names of fields too, but for MEDIA."""
    rest = [value]
    while rest:  # the value may be nested more deeply than Python calls
        one = rest.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, list):
            rest.extend(each for each in one if not isinstance(each, int))  # token ids are many
        elif isinstance(one, dict):
            rest.extend(one)
            rest.extend(inner for name, inner in one.items() if name not in MEDIA)
        elif isinstance(one, BaseModel):
            rest.append(vars(one))


def is_long(value: Any) -> bool:
    """Whether all texts in it together are worth a thread; a chat template takes its time for each of them too."""
    return sum(len(text) + 1 for text in texts_in(value)) >= LONG


def is_disaggregated(engine_config: Any) -> bool:
    """Whether the engine of this configuration of LMDeploy's is one for prefill or decoding alone."""
    role = getattr(engine_config, "role", None)
    return role is not None and role.name != "Hybrid"


def within_vocabulary(top_k: int, vocabulary: int | None) -> int:
    """`top_k` as the engine can sort it: all tokens (0) where it asks for more than there are."""
    return 0 if vocabulary is not None and top_k >= vocabulary else top_k


def vocabulary_size(hf_config: Any) -> int | None:
    """Token ids that the model's embedding has; None where its config does not say."""
    text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    return getattr(text, "vocab_size", None)


def _refuse_unknown(field: str, value: Any, known: Collection[str]) -> None:
    if not value or field in WITHOUT_EFFECT or NEUTRAL.get(field) == value:
        return
    if field in INSTEAD:
        raise BadRequestError(field, f"is not supported: it would be ignored; use {INSTEAD[field]}")
    raise BadRequestError(
        field, f"is no field of this endpoint: it would be ignored; leave it out{did_you_mean(field, known)}"
    )


def _check_disaggregation(field: str, value: Any, disaggregated: bool) -> None:
    if value and not disaggregated:
        raise BadRequestError(
            field,
            "needs a disaggregated engine (role Prefill or Decode), which this one is not; leave it out",
        )
    if value and field == "migration_request":
        from lmdeploy.pytorch.disagg.conn.protocol import MigrationRequest

        try:
            MigrationRequest.model_validate(value)
        except ValidationError as error:
            raise BadRequestError(field, f"is not one of LMDeploy's: {error.errors()[0]['msg']}") from None


def _check_lengths(given: Mapping[str, Any], session_len: int) -> None:
    if "max_tokens" in given:
        # Only to read a prompt again can nothing be generated: with its echo, or its own log probabilities.
        reading = given.get("echo") or "logprob_start_len" in given
        (COUNT_OR_NONE if reading else COUNT).check("max_tokens", given["max_tokens"])
    for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if field in given and given[field] >= session_len:
            raise BadRequestError(
                field, f"must be less than the context length of {session_len}, not {given[field]}"
            )
    if "logprobs" in given and not isinstance(given["logprobs"], bool):
        SHOWN_LOGPROBS.check("logprobs", given["logprobs"])


def _check_response_format(wanted: Any) -> None:
    if not isinstance(wanted, dict):
        return  # an endpoint's schema says whether it may be anything else
    kind = wanted.get("type")
    if kind == "regex_schema" and not (isinstance(wanted.get(kind), str) and wanted[kind]):
        raise BadRequestError("response_format.regex_schema", "must be a regular expression")
    if kind == "json_schema":
        inner = wanted.get(kind)
        if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict | bool):
            raise BadRequestError("response_format.json_schema.schema", "must be a JSON schema")


def _check_stop(stop: Any) -> None:
    if stop is None:
        return
    words = [stop] if isinstance(stop, str) else stop
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise BadRequestError("stop", "must be a text or a list of texts, none of them empty")
    if len(words) > STOPS:
        raise BadRequestError("stop", f"must be at most {STOPS} texts, not {len(words)}")
    for word in words:
        _check_text("stop", word, STOP_LENGTH, why="")


def _check_template_options(options: Any) -> None:
    for name in options if isinstance(options, dict) else ():
        if name in OF_THE_SERVER:
            raise BadRequestError(
                f"chat_template_kwargs.{name}",
                "is the server's to say: variables of the model's chat template can be set; leave it out",
            )


def _check_messages(messages: Any, session_len: int, most: int) -> None:
    if not isinstance(messages, list):
        raise BadRequestError("messages", f"must be a list of messages, not {_shown(messages)}")
    if len(messages) > session_len:  # each has one token at least
        raise BadRequestError(
            "messages", f"must be at most {session_len} to fit the context length, not {len(messages)}"
        )
    says_something = False
    for place, message in enumerate(messages):
        where = f"messages.{place}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequestError(
                f"{where}.role", "must be a text: a message is {'role': ..., 'content': ...}"
            )
        content = message.get("content")
        calls = message.get("tool_calls")
        if content is None and not (message["role"] == "assistant" and calls):
            raise BadRequestError(f"{where}.content", "must not be empty")
        if content is not None and not isinstance(content, str | list):
            raise BadRequestError(f"{where}.content", "must be a text or a list of parts")
        if calls is not None and not _are_tool_calls(calls):
            raise BadRequestError(
                f"{where}.tool_calls", "must be a list of {'function': {'name': ..., 'arguments': ...}}"
            )
        if isinstance(content, str):
            _check_text(f"{where}.content", content, most)
        if isinstance(content, list):
            for part_place, part in enumerate(content):
                _check_part(f"{where}.content.{part_place}", part, most)
        says_something = says_something or bool(calls) or _is_said(content)
    if not says_something:
        raise BadRequestError("messages", "must not all be empty")


def _check_text(field: str, text: str, most: int, why: str = " to fit the context length") -> None:
    """`most` characters."""
    if len(text) > most:
        raise BadRequestError(field, f"must have at most {most} characters{why}, not {len(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape halves of surrogate pairs
        raise BadRequestError(field, "must be Unicode, without single surrogates") from error


def _is_said(content: Any) -> bool:
    if isinstance(content, list):
        return any(part["type"] != "text" or part["text"] for part in content)
    return bool(content)


def _check_part(where: str, part: Any, most: int) -> None:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise BadRequestError(f"{where}.type", "must be a text: a part is {'type': 'text', 'text': ...}")
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        raise BadRequestError(f"{where}.text", "must be a text")
    if part["type"] == "text":
        _check_text(f"{where}.text", part["text"], most)


def _are_tool_calls(calls: Any) -> bool:
    return isinstance(calls, list) and all(
        isinstance(call, dict)
        and isinstance(call.get("function"), dict)
        and isinstance(call["function"].get("name"), str)
        for call in calls
    )


def _check_ids(field: str, ids: Sequence[int], vocabulary: int | None) -> None:
    if len(ids) == 0:
        return
    array = np.asarray(ids)  # a long prompt has 100,000 of them
    if array.dtype.kind not in "iu":
        raise BadRequestError(field, "token ids must be integers of 64 bits")
    for each in (array.min(), array.max()):
        if each < 0 or (vocabulary is not None and each >= vocabulary):
            raise BadRequestError(field, f"token id {each} is not in the vocabulary of {vocabulary} tokens")


def _shown(value: Any) -> str:
    """A value as messages show it, shortened."""
    # Python writes no integer of more than 4,300 digits.
    text = f"about 2^{value.bit_length()}" if isinstance(value, int) and abs(value) > 10**40 else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
