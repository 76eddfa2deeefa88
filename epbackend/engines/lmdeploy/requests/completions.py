"""`/v1/completions` as OpenAI's clients know it: lists of prompts and of token ids, n, echo, logprobs, logit_bias.

LMDeploy's own endpoint knows one choice of each text. It still serves the requests of a disaggregated prefill.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import shortuuid
from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse
from lmdeploy.serve.core.exceptions import ErrorCode, RequestError
from lmdeploy.serve.openai.endpoints.common import build_serving_generation_config, validate_request
from lmdeploy.serve.openai.endpoints.completions import check_request
from lmdeploy.serve.openai.errors import (
    create_error_response,
    create_request_error_response,
    request_error_payload,
)
from lmdeploy.serve.openai.protocol import CompletionRequest as TheirRequest
from lmdeploy.serve.openai.protocol import (
    CompletionResponse,
    CompletionResponseChoice,
    CompletionResponseStreamChoice,
    CompletionStreamResponse,
    LogProbs,
    ResponseFormat,
    UsageInfo,
)
from lmdeploy.serve.utils.request_cleanup import cleanup_result_generators, with_request_cleanup
from lmdeploy.serve.utils.server_utils import validate_json_request
from pydantic import StrictInt

from epbackend.engines.lmdeploy.requests.checks import (
    CHOICES,
    DISAGGREGATION,
    BadRequestError,
    vocabulary_size,
)
from epbackend.engines.lmdeploy.requests.logits_processors import logit_bias, output_penalties
from epbackend.engines.lmdeploy.requests.token_logprobs import completion_logprobs

TokenIds = list[StrictInt]


class CompletionRequest(TheirRequest):
    """LMDeploy's, with what its engine can do as well."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    stop_token_ids: TokenIds | None = None
    min_new_tokens: int | None = None
    include_stop_str_in_output: bool | None = False


@dataclass
class Choice:
    """One answer, as far as it has come."""

    index: int
    prompt: str
    prompt_ids: list[int]
    session: Any
    parts: AsyncIterator[Any] | None
    """None where nothing is to be generated."""
    prompt_logprobs: list[dict[int, float] | None] = field(default_factory=list)
    length: int = 0
    """Characters given to the client so far: offsets count them."""
    tokens: int = 0
    finish_reason: str | None = None


def register(router: APIRouter, context: Any, theirs: Any) -> None:
    """Adds the endpoint; `theirs` is LMDeploy's function that adds its own."""
    their_router = APIRouter()
    theirs(their_router, context)
    (their_route,) = their_router.routes
    disaggregated: Any = their_route.endpoint  # type: ignore[attr-defined]

    @router.post("/v1/completions", dependencies=[Depends(validate_json_request)])
    async def completions_v1(request: CompletionRequest, raw_request: Request) -> Any:
        """OpenAI's completions: https://platform.openai.com/docs/api-reference/completions/create.

        - **prompt**: a text, token ids, or a list of either. Each gets **n** choices, numbered prompt by prompt.
        - **echo**: the answer begins with the prompt; with **logprobs** its tokens are listed as well, and
          **max_tokens** may be 0.
        - **logprobs**: as many most probable tokens at each place, 0 to 20.
        - **stop**: texts at which an answer ends, of any number of tokens; **stop_token_ids**: tokens likewise.
        - **response_format**, **logit_bias**, **presence_penalty**, **frequency_penalty**: as for chats.

        Of LMDeploy's own: **top_k**, **min_p**, **repetition_penalty**, **repetition_ngram_size**,
        **repetition_ngram_threshold**, **min_new_tokens**, **ignore_eos**, **skip_special_tokens**.
        """
        body = await raw_request.json()
        if any(body.get(name) for name in DISAGGREGATION):
            return await disaggregated(request, raw_request)
        request.n = 1 if request.n is None else request.n
        if (refused := validate_request(request, context, check_request)) is not None:
            return refused
        try:
            choices = await _begin(request, context)
        except BadRequestError as error:
            return create_error_response(HTTPStatus.BAD_REQUEST, str(error), param=error.field)
        except RequestError as error:
            return create_request_error_response(error)
        answer = Answer(request, context.async_engine, choices)
        sessions, streams = [each.session for each in choices], [each.parts for each in choices if each.parts]
        if request.stream:
            events = with_request_cleanup(answer.events(), streams, sessions, context.session_manager)
            return StreamingResponse(events, media_type="text/event-stream")
        try:
            return await answer.collected(raw_request)
        except RequestError as error:
            return create_request_error_response(error)
        finally:
            await cleanup_result_generators(streams, sessions, context.session_manager)


async def _begin(request: CompletionRequest, context: Any) -> list[Choice]:
    """The choices, all of them checked and none of them begun.

    Raises:
        BadRequestError, RequestError: one cannot be served.
    """
    engine = context.async_engine
    tokenizer = engine.tokenizer.model.model
    prompts = _prompts(request.prompt)
    count = request.n or 1
    _check_counts(request, len(prompts), count)
    processors = _logits_processors(request, vocabulary_size(engine.hf_cfg) or len(tokenizer))
    reads_only = request.max_tokens == 0 and request.max_completion_tokens is None  # with echo only
    choices: list[Choice] = []
    try:
        for prompt in prompts:
            prompt_logprobs: list[dict[int, float] | None] = []
            if request.echo and request.logprobs is not None:
                prepared = await _prepare(request, context, prompt, prompt_only=True)
                prompt_logprobs = await _read(engine, prepared)
            for _ in range(count):
                await asyncio.sleep(0)  # others are served meanwhile: nothing below waits
                seed = None if request.seed is None else request.seed + len(choices)
                prepared = await _prepare(request, context, prompt, seed, processors)
                ids = list(prepared.inputs["input_ids"])
                choices.append(
                    Choice(
                        len(choices),
                        prompt if isinstance(prompt, str) else tokenizer.decode(ids),
                        ids,
                        prepared.session,
                        None if reads_only else engine.generate(prepared),
                        prompt_logprobs,
                    )
                )
    except BaseException:
        for each in choices:
            context.session_manager.remove(each.session)
        raise
    return choices


async def _prepare(
    request: CompletionRequest,
    context: Any,
    prompt: str | list[int],
    seed: int | None = None,
    processors: list[Any] | None = None,
    prompt_only: bool = False,
) -> Any:
    """A prompt as the engine takes it, in a session of its own; `prompt_only`: for its log probabilities alone."""
    engine = context.async_engine
    config = build_serving_generation_config(
        request,
        context,
        stop_words=[request.stop] if isinstance(request.stop, str) else request.stop,
        logprobs=None if request.logprobs is None else max(1, request.logprobs),
        random_seed=seed,
        logits_processors=processors,
        **({"logprob_start_len": 0} if prompt_only else {}),
    )
    config.max_new_tokens = 0 if prompt_only else config.max_new_tokens or None
    text, ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
    adapter = request.model if request.model != engine.model_name else None
    session = context.create_session(request.session_id)
    return await engine.preprocess(
        text, session, gen_config=config, do_preprocess=False, adapter_name=adapter, input_ids=ids
    )


def _logits_processors(request: CompletionRequest, vocabulary: int) -> list[Any] | None:
    bias = [logit_bias(request.logit_bias, vocabulary)] if request.logit_bias else []
    return [*bias, *output_penalties(request.presence_penalty, request.frequency_penalty)] or None


def _check_counts(request: CompletionRequest, prompts: int, count: int) -> None:
    """Raises BadRequestError for more choices of these prompts than may be asked for at once, or than a session has."""
    if request.session_id not in (None, -1) and prompts * count > 1:
        raise BadRequestError("session_id", "can be given with one prompt and n: 1 only; leave it out")
    if prompts * count > CHOICES:
        raise BadRequestError(
            "prompt",
            f"{prompts} prompts with n: {count} ask for {prompts * count} choices; at most {CHOICES} may be "
            "asked for at once, so send several requests",
        )


def _prompts(prompt: Any) -> list[str | list[int]]:
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise BadRequestError("prompt", "must not be an empty list")
    return list(prompt)


async def _read(engine: Any, prepared: Any) -> list[dict[int, float] | None]:
    """The log probabilities of a prompt's tokens; the first has none."""
    rows: list[dict[int, float] | None] = []
    async for part in engine.generate(prepared):
        rows = part.logprobs or rows
    return [None, *rows]


class Answer:
    """The choices on their way to the client."""

    def __init__(self, request: CompletionRequest, engine: Any, choices: list[Choice]) -> None:
        self._request = request
        self._tokenizer = engine.tokenizer.model.model
        self._choices = choices
        self._common = {
            "id": f"cmpl-{shortuuid.random()}",
            "created": int(time.time()),
            "model": request.model,
        }

    async def collected(self, raw_request: Request) -> CompletionResponse:
        """The whole answer; its choices are generated at the same time.

        Raises:
            RequestError: the engine failed, or the client is gone.
        """
        tasks = [asyncio.create_task(self._collect(each, raw_request)) for each in self._choices]
        try:
            done = await asyncio.gather(*tasks)
        finally:
            await _cancelled(tasks)
        return CompletionResponse(choices=done, usage=self._usage(), **self._common)

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events, the choices' parts as they come."""
        queue: asyncio.Queue[tuple[Choice, str, LogProbs | None, bool] | BaseException | None] = (
            asyncio.Queue()
        )

        async def feed(choice: Choice) -> None:
            try:
                async for text, logprobs in self._parts(choice):
                    await queue.put((choice, text, logprobs, False))
                await queue.put((choice, "", None, True))
            except Exception as error:
                await queue.put(error)
            await queue.put(None)

        tasks = [asyncio.create_task(feed(each)) for each in self._choices]
        ended = 0
        with_usage = bool(self._request.stream_options and self._request.stream_options.include_usage)
        try:
            while ended < len(tasks):
                item = await queue.get()
                if item is None:
                    ended += 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    choice, text, logprobs, last = item
                    yield self._event(
                        [
                            CompletionResponseStreamChoice(
                                index=choice.index,
                                text=text,
                                logprobs=logprobs,
                                finish_reason=choice.finish_reason if last else None,
                            )
                        ],
                        None,
                        with_usage,
                    )
            if with_usage:
                yield self._event([], self._usage(), with_usage)
        except RequestError as error:
            yield f"data: {json.dumps({'error': request_error_payload(error)})}\n\n"
        finally:
            await _cancelled(tasks)
        yield "data: [DONE]\n\n"

    async def _collect(self, choice: Choice, raw_request: Request) -> CompletionResponseChoice:
        text = ""
        logprobs: LogProbs | None = None
        async for more, of_more in self._parts(choice):
            if await raw_request.is_disconnected():
                raise RequestError(ErrorCode.REQUEST_CANCELLED)
            text += more
            logprobs = _joined(logprobs, of_more)
        return CompletionResponseChoice(
            index=choice.index,
            text=text,
            logprobs=logprobs,
            finish_reason=choice.finish_reason,
        )

    async def _parts(self, choice: Choice) -> AsyncIterator[tuple[str, LogProbs | None]]:
        """The texts of a choice, one after the other, each with its log probabilities where asked for."""
        if self._request.echo:
            yield choice.prompt, self._listed(choice, choice.prompt_ids, choice.prompt_logprobs)
            choice.length += len(choice.prompt)
        if choice.parts is None:
            choice.finish_reason = "length"
            return
        async for part in choice.parts:
            choice.finish_reason, choice.tokens = part.finish_reason, part.generate_token_len
            text = part.response or ""
            logprobs = self._listed(choice, part.token_ids or [], part.logprobs or [])
            if text or logprobs:
                yield text, logprobs
            choice.length += len(text)

    def _listed(self, choice: Choice, token_ids: list[int], values: list[Any]) -> LogProbs | None:
        shown = self._request.logprobs
        if shown is None or not values:
            return None
        return completion_logprobs(self._tokenizer, token_ids[: len(values)], values, shown, choice.length)

    def _usage(self) -> UsageInfo:
        """A prompt counts once, however many choices it has."""
        count = self._request.n or 1
        return UsageInfo.build(
            prompt_tokens=sum(len(each.prompt_ids) for each in self._choices[::count]),
            completion_tokens=sum(each.tokens for each in self._choices),
        )

    def _event(
        self, choices: list[CompletionResponseStreamChoice], usage: UsageInfo | None, with_usage: bool
    ) -> str:
        event = CompletionStreamResponse(choices=choices, usage=usage, **self._common)
        fields = event.model_dump(mode="json", exclude_none=True)
        if with_usage and usage is None:
            fields["usage"] = None
        return f"data: {json.dumps(fields)}\n\n"


async def _cancelled(tasks: list[asyncio.Task]) -> None:
    """Ends those that still run: where one choice failed the others are not waited for."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _joined(first: LogProbs | None, second: LogProbs | None) -> LogProbs | None:
    if first is None or second is None:
        return first or second
    return LogProbs(
        text_offset=first.text_offset + second.text_offset,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        tokens=first.tokens + second.tokens,
        top_logprobs=None if first.top_logprobs is None else first.top_logprobs + (second.top_logprobs or []),
    )
