"""LMDeploy's OpenAI server: a request's fields are checked, errors have OpenAI's form, answers what was asked for."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from lmdeploy.serve.core.exceptions import ErrorCode, RequestError
from lmdeploy.serve.openai.errors import create_error_response, create_request_error_response
from lmdeploy.serve.openai.protocol import (
    ChatCompletionRequest,
    EncodeRequest,
    GenerateReqInput,
    PoolingRequest,
    PPLRequest,
)
from lmdeploy.serve.utils.server_utils import protocol_error_response
from starlette.responses import JSONResponse

from epbackend.engines.lmdeploy.patching import Patch, patch
from epbackend.engines.lmdeploy.requests import completions, tokenizing
from epbackend.engines.lmdeploy.requests.checks import BadRequestError, check_body, is_disaggregated
from epbackend.engines.lmdeploy.requests.logits_processors import logit_bias, output_penalties
from epbackend.engines.lmdeploy.requests.token_logprobs import chat_logprobs, showing

_SERVER = "lmdeploy.serve.openai.api_server"
_CHAT = "lmdeploy.serve.openai.chat_completions.serving"

FIELD_FIRST = re.compile(r"([a-z_]+)[\w.]*: ")
"""How messages of our checks begin, whatever way they come."""

FIELDS: dict[str, frozenset[str] | None] = {
    "/v1/completions": frozenset(completions.CompletionRequest.model_fields),
    "/v1/chat/completions": frozenset(ChatCompletionRequest.model_fields),
    "/generate": frozenset(GenerateReqInput.model_fields),
    "/v1/messages": None,
    "/v1/messages/count_tokens": None,
    "/v1/responses": None,
    "/v1/encode": frozenset(EncodeRequest.model_fields),
    "/get_ppl": frozenset(PPLRequest.model_fields),
    "/pooling": frozenset(PoolingRequest.model_fields),
}
"""Endpoints that take texts -> the fields that they read; None where what they ignore is their protocol's affair."""


@patch(
    "lmdeploy.serve.openai.errors:JSONResponse",
    why="its errors have not OpenAI's form, {'error': ...}",
    when="server",
)
def errors_in_openai_form(original: type[JSONResponse]) -> Callable:
    def response(content: dict[str, Any], status_code: int = 200) -> JSONResponse:
        if content["param"] is None and (field := FIELD_FIRST.match(content["message"])):
            content = content | {"param": field[1]}
        return original({"error": content}, status_code=status_code)

    return response


@patch(
    f"{_SERVER}:validation_exception_handler",
    why="its errors do not name the field in `param`",
    when="server",
    fingerprint="d12a406cfcd4",
)
def errors_name_their_field(original: Callable) -> Callable:
    async def validation_exception_handler(request: Request, error: RequestValidationError) -> Any:
        first: Any = next(iter(error.errors()), {})
        if not isinstance(first, dict):
            return await original(request, error)
        place = [str(part) for part in first.get("loc", ()) if part != "body"]
        said = first.get("msg", "Invalid request body.")
        if first.get("type") == "json_invalid":  # its place is a character of the body
            place, said = [], f"{said} at character {place[0]}: {first.get('ctx', {}).get('error')}"
        refused = RequestError(ErrorCode.INVALID_REQUEST, f"{'.'.join(place)}: {said}" if place else said)
        if request.url.path.startswith(("/v1/messages", "/v1/responses")):
            return protocol_error_response(request.url.path, refused)
        return create_request_error_response(refused, param=place[0] if place else None)

    return validation_exception_handler


@functools.cache
def token_length(tokenizer: Any) -> int:
    """Characters of the longest token."""
    return max(map(len, tokenizer.get_vocab()))


def check_session(body: Any, sessions: Any) -> None:
    """Raises BadRequestError for a session of another request, which LMDeploy takes for an error of its own."""
    session_id = body.get("session_id") if isinstance(body, dict) else None
    if isinstance(session_id, int) and session_id in sessions.user_session_id_map:
        raise BadRequestError(
            "session_id", f"{session_id} has a request already; take another, or leave it out"
        )


def _checked(name: str, fingerprint: str) -> Patch:
    """The endpoints of one of its routers, behind the check of their requests."""

    def build(original: Callable) -> Callable:
        @functools.wraps(original)
        def create_router(context: Any) -> APIRouter:
            async def check(request: Request) -> None:
                path = request.scope["route"].path
                if path not in FIELDS:
                    return
                try:
                    body = await request.json()
                except (ValueError, RecursionError):
                    return  # FastAPI refuses it
                engine = context.async_engine
                longest = token_length(engine.tokenizer.model.model)
                try:
                    check_session(body, context.session_manager)
                    check_body(
                        body,
                        FIELDS[path],
                        engine.session_len,
                        longest,
                        disaggregated=is_disaggregated(context.engine_config),
                    )
                except BadRequestError as error:
                    place = ("body", *error.field.split("."))
                    raise RequestValidationError(
                        [{"loc": place, "msg": error.reason, "type": "value_error"}]
                    ) from error

            router = APIRouter()
            router.include_router(original(context), dependencies=[Depends(check)])
            return router

        return create_router

    return Patch(
        f"fields-are-checked-{name.split('_')[1]}",
        f"{_SERVER}:{name}",
        "what a client sends is not checked, and fields that it does not know are ignored",
        "server",
        build,
        fingerprint,
    )


@patch(
    "lmdeploy.serve.openai.endpoints.distserve:register",
    why="any client could end the sessions of others, by their numbers, where no engine is disaggregated",
    when="server",
    fingerprint="8f139cae4169",
)
def distserve_where_disaggregated(original: Callable) -> Callable:
    def register(router: APIRouter, context: Any) -> None:
        if is_disaggregated(context.engine_config):
            original(router, context)
            return

        @router.api_route("/distserve/{rest:path}", methods=["GET", "POST"], include_in_schema=False)
        async def refuse(rest: str) -> JSONResponse:
            return create_error_response(
                HTTPStatus.NOT_IMPLEMENTED,
                f"/distserve/{rest}: needs a disaggregated engine, whose role is Prefill or Decode; this one's is not",
                "not_implemented_error",
            )

    return register


@patch(
    "lmdeploy.serve.openai.endpoints.completions:register",
    why="it ignores n, echo, logprobs, token ids, logit_bias, response_format and penalties",
    when="server",
    fingerprint="11829ad35e73",
)
def completions_as_openai(original: Callable) -> Callable:
    return functools.partial(completions.register, theirs=original)


@patch(
    "lmdeploy.serve.openai.endpoints.auxiliary:register",
    why="a server answers nobody while these tokenize long texts",
    when="server",
    fingerprint="289a45a1bbad",
)
def texts_off_the_loop(original: Callable) -> Callable:
    return functools.partial(tokenizing.register, theirs=original)


@patch(
    "lmdeploy.serve.anthropic.endpoints.messages_count_tokens:register",
    why="a server answers nobody while it counts a long text",
    when="server",
    fingerprint="cd245391b6b8",
)
def counts_off_the_loop(original: Callable) -> Callable:
    return functools.partial(tokenizing.register_count, theirs=original)


@patch(
    "lmdeploy.serve.core.chat_runner:_build_runner_generation_config",
    why="it ignores presence_penalty and frequency_penalty",
    when="server",
    fingerprint="3d75245ccb6d",
)
def chats_have_penalties(original: Callable) -> Callable:
    @functools.wraps(original)
    def build_runner_generation_config(request: Any, context: Any, settings: dict[str, Any]) -> Any:
        generation = original(request, context, settings)
        penalties = output_penalties(request.presence_penalty, request.frequency_penalty)
        generation.logits_processors = [*(generation.logits_processors or ()), *penalties] or None
        return generation

    return build_runner_generation_config


@patch(
    "lmdeploy.serve.core.chat_runner:ChatRunner.prepare",
    why="it answers with as many log probabilities as the engine happens to give",
    when="server",
    fingerprint="c831a9bb1b43",
)
def chats_show_what_was_asked(original: Callable) -> Callable:
    @functools.wraps(original)
    async def prepare(cls: type, *args: Any, **kwargs: Any) -> Any:
        runner = await original(cls, *args, **kwargs)
        runner.result_generator = _shown(runner.result_generator, runner.request.top_logprobs or 0)
        return runner

    return prepare


async def _shown(parts: Any, count: int) -> Any:
    try:
        async for part in parts:
            part.logprobs = showing(part.logprobs, count)
            yield part
    finally:
        await parts.aclose()


@patch(
    f"{_CHAT}:_create_chat_completion_logprobs",
    why="it lists one top_logprob less than asked for",
    when="server",
    fingerprint="d6a02efdf84e",
)
def chat_logprobs_are_listed(original: Callable) -> Callable:
    return chat_logprobs


@patch(
    f"{_CHAT}:logit_bias_logits_processor",
    why="its processor is a local function, which cannot be sent to a rank",
    when="server",
    fingerprint="d2b5123f817a",
)
def logit_bias_can_be_sent(original: Callable) -> Callable:
    def processor(bias: dict[str, float], tokenizer: Any) -> Any:
        return logit_bias(bias, len(tokenizer))

    return processor


@patch(
    "lmdeploy.serve.core.async_engine:AsyncEngine.async_get_reward_score",
    why="what it refuses is an error 500",
    when="server",
    fingerprint="8b7bc44c4fde",
)
def scores_are_refused(original: Callable) -> Callable:
    @functools.wraps(original)
    async def async_get_reward_score(self: Any, input_ids: list) -> list[float]:
        try:
            return await original(self, input_ids)
        except (ValueError, AssertionError) as error:
            raise RequestValidationError(
                [{"loc": ("body", "model"), "msg": str(error), "type": "value_error"}]
            ) from error

    return async_get_reward_score


@patch(
    "lmdeploy.serve.anthropic.endpoints.messages_count_tokens:to_lmdeploy_messages",
    why="system messages without a text leave nothing to count, which is an error of the server's",
    when="server",
    fingerprint="198f31f0775c",
)
def counted_messages_have_text(original: Callable) -> Callable:
    @functools.wraps(original)
    def to_lmdeploy_messages(*args: Any, **kwargs: Any) -> list[dict[str, str]]:
        messages = original(*args, **kwargs)
        if not messages:
            raise ValueError("messages: must not all be empty; system messages are their parts of type text")
        return messages

    return to_lmdeploy_messages


PATCHES = (
    errors_in_openai_form,
    errors_name_their_field,
    _checked("create_openai_router", "4dee79f2d847"),
    _checked("create_anthropic_router", "934d423ab90b"),
    _checked("create_responses_router", "785a191fbef0"),
    distserve_where_disaggregated,
    completions_as_openai,
    texts_off_the_loop,
    counts_off_the_loop,
    chats_have_penalties,
    chats_show_what_was_asked,
    chat_logprobs_are_listed,
    logit_bias_can_be_sent,
    scores_are_refused,
    counted_messages_have_text,
)
