"""Endpoints that only tokenize, or do so before the engine: beside the event loop, which serves others meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends
from lmdeploy.serve.openai.protocol import EncodeRequest, PoolingRequest, PPLRequest
from lmdeploy.serve.utils.server_utils import validate_json_request

from epbackend.engines.lmdeploy.requests.checks import texts_in
from epbackend.engines.lmdeploy.workers.ring import off_loop

LONG = 20_000
"""Characters from which on it pays: so many take a tokenizer 12 ms, and handing them over 0.5 ms."""


def is_long(value: Any) -> bool:
    """Whether all texts in it together are worth a thread; a chat template takes its time for each of them too."""
    return sum(len(text) + 1 for text in texts_in(value)) >= LONG


def register(router: APIRouter, context: Any, theirs: Callable) -> None:
    """Adds /v1/encode, /get_ppl and /pooling; `theirs` is LMDeploy's function that adds its own, and /v1/embeddings."""
    their_router = APIRouter()
    theirs(their_router, context)
    endpoints: dict[str, Any] = {route.path: route.endpoint for route in their_router.routes}  # type: ignore
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

    router.routes.extend(route for route in their_router.routes if route.path == "/v1/embeddings")  # type: ignore
