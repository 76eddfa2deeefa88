"""Endpoints that only tokenize, or do so before the engine: beside the event loop, which serves others meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, Request
from lmdeploy.serve.anthropic.protocol import CountTokensRequest
from lmdeploy.serve.openai.protocol import EncodeRequest, PoolingRequest, PPLRequest
from lmdeploy.serve.utils.server_utils import validate_json_request

from epbackend.engines.lmdeploy.requests.checks import is_long
from epbackend.engines.lmdeploy.workers.ring import off_loop


def register(router: APIRouter, context: Any, theirs: Callable) -> None:
    """Adds /v1/encode, /get_ppl and /pooling; `theirs` is LMDeploy's function that adds its own, and /v1/embeddings."""
    routes, endpoints = _added_by(theirs, context)
    tokenizer = context.async_engine.tokenizer
    as_json = [Depends(validate_json_request)]

    @router.post("/v1/encode", dependencies=as_json)
    async def encode(request: EncodeRequest) -> Any:
        """The token ids of **input**, a text or a list of texts: with a BOS token if **add_bos**, as a user's message
        of a chat if **do_preprocess**."""
        endpoint = endpoints["/v1/encode"]
        if not is_long(request.input):
            return await endpoint(request)
        return await off_loop(lambda: asyncio.run(endpoint(request)))  # it awaits nothing itself

    @router.post("/get_ppl", dependencies=as_json)
    async def get_ppl(request: PPLRequest) -> Any:
        """The perplexity of **input**, a text or token ids."""
        text = request.input
        if isinstance(text, str) and is_long(text):
            request.input = await off_loop(lambda: tokenizer.encode(text))
        return await endpoints["/get_ppl"](request)

    @router.post("/pooling", dependencies=as_json)
    async def pooling(request: PoolingRequest) -> Any:
        """A reward model's score of **input**: a text, token ids, or a list of either."""
        texts: Any = [request.input] if isinstance(request.input, str) else request.input
        if is_long(texts):
            request.input = await off_loop(lambda: [tokenizer.encode(text) for text in texts])
        return await endpoints["/pooling"](request)

    router.routes.extend(route for route in routes if route.path == "/v1/embeddings")


def register_count(router: APIRouter, context: Any, theirs: Callable, **options: Any) -> None:
    """Adds /v1/messages/count_tokens; `theirs` is LMDeploy's function that adds its own, with these options."""
    _, endpoints = _added_by(theirs, context, **options)
    endpoint = endpoints["/v1/messages/count_tokens"]

    @router.post("/v1/messages/count_tokens", dependencies=[Depends(validate_json_request)])
    async def count_tokens(request: CountTokensRequest, raw_request: Request) -> Any:
        """How many tokens **messages** have in the model's chat template."""
        if not is_long(request):
            return await endpoint(request, raw_request)
        return await off_loop(lambda: asyncio.run(endpoint(request, raw_request)))  # it awaits nothing itself


def _added_by(theirs: Callable, context: Any, **options: Any) -> tuple[list[Any], dict[str, Any]]:
    """The routes that a function of LMDeploy's adds, and their endpoints by path."""
    router = APIRouter()
    theirs(router, context, **options)
    routes: list[Any] = router.routes
    return routes, {route.path: route.endpoint for route in routes}
