"""The public address of several engines: passes each request to the engine with the fewest, whole and unchanged.

LMDeploy's own proxy knows two endpoints, answers 200 whatever an engine said, lists a model once an engine, has no
health and keeps a dead engine for a minute and a half. Here status, headers and body are the engine's own, for every
endpoint, and an engine hears of a client that hangs up. Metrics are those of all engines; what concerns the whole
deployment goes to each (sleep, wake-up, abort), or is done here (its end).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from epbackend.engines.lmdeploy.server.front import (
    UNAVAILABLE,
    WHEN_UNAVAILABLE,
    asks_for_key,
    error_form,
)

ALL_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]
NOT_PASSED_ON = frozenset(
    ("connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-connection", "host")
)
"""Headers of one connection (RFC 9110, 7.6.1), which the next one has of its own."""
NOTHING: Mapping[str, str] = {}
FOR_ALL = ("/sleep", "/wakeup", "/abort_request")
HUNG_UP = 499
"""Status of an answer that nobody gets, as nginx has it."""


class ReverseProxy:
    """Requests under way at each engine."""

    def __init__(self, engines: Sequence[str], metrics: Collector | None = None) -> None:
        """`engines` are URLs, `metrics` are those of the whole deployment, which no engine has."""
        self._under_way = dict.fromkeys(engines, 0)
        self._own_metrics = metrics
        self._session: aiohttp.ClientSession | None = None

    def app(self, end: Callable[[], None] | None = None, api_keys: Sequence[str] = ()) -> Starlette:
        """The ASGI application. `end` is what a client may call, with one of `api_keys` if there are any."""
        whole = [Route(path, self._to_all, methods=["POST"]) for path in FOR_ALL]
        if end is not None:
            whole.append(
                Route("/terminate", _ending(end), methods=["GET"], middleware=asks_for_key(api_keys))
            )
        return Starlette(
            routes=[
                Route("/health", self._to_all),
                Route("/metrics", self._metrics),
                *whole,
                Route("/{path:path}", self._to_one, methods=ALL_METHODS),
            ],
            exception_handlers={ClientDisconnect: _nobody_waits},
            lifespan=self._connected,
        )

    @asynccontextmanager
    async def _connected(self, app: Starlette) -> AsyncIterator[None]:
        # Generating takes as long as it takes; who waits too long hangs up, and the engine sees that.
        timeout = aiohttp.ClientTimeout(total=None, sock_read=None)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            timeout=timeout, connector=connector, auto_decompress=False
        ) as self._session:
            yield

    async def _to_one(self, request: Request) -> Response:
        engine = min(self._under_way, key=lambda each: self._under_way[each])
        self._under_way[engine] += 1
        try:
            await request.body()
            answer = await _while_connected(request, self._send(request, engine))
        except BaseException as error:
            self._under_way[engine] -= 1
            if isinstance(error, aiohttp.ClientError):
                return _unreachable(engine, error)
            raise
        return StreamingResponse(
            self._body(engine, answer), status_code=answer.status, headers=_passed_on(answer.headers)
        )

    async def _body(self, engine: str, answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        try:
            async for part in answer.content.iter_any():
                yield part
        finally:
            self._under_way[engine] -= 1
            answer.close()

    async def _to_all(self, request: Request) -> Response:
        """The first answer that is an error, or else the first."""
        await request.body()
        answers = await self._ask_all(request)
        return next((each for each in answers if each.status_code >= 400), answers[0])

    async def _metrics(self, request: Request) -> Response:
        answers = await self._ask_all(request, {"accept-encoding": "identity"})
        texts = {
            engine: bytes(each.body).decode()
            for engine, each in enumerate(answers)
            if each.status_code == 200
        }
        if not texts:  # no key, or no metrics
            return answers[0]
        registry = CollectorRegistry()
        registry.register(_Merged(texts))
        if self._own_metrics is not None:
            registry.register(self._own_metrics)
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    async def _ask_all(self, request: Request, headers: Mapping[str, str] = NOTHING) -> list[Response]:
        """The answer of each engine to the request, with those headers in place of its own."""

        async def ask(engine: str) -> Response:
            try:
                async with await self._send(request, engine, headers) as answer:
                    return Response(await answer.read(), answer.status, _passed_on(answer.headers))
            except aiohttp.ClientError as error:
                return _unreachable(engine, error)

        return await asyncio.gather(*map(ask, self._under_way))

    async def _send(
        self, request: Request, engine: str, changed: Mapping[str, str] = NOTHING
    ) -> aiohttp.ClientResponse:
        assert self._session is not None, "the application runs"
        target = engine + request.url.path.removeprefix(request.scope.get("root_path", ""))
        if request.url.query:
            target += f"?{request.url.query}"
        headers = {**_passed_on(request.headers), **changed}
        if request.client is not None:
            headers["x-forwarded-for"] = request.client.host
        return await self._session.request(
            request.method, target, headers=headers, data=await request.body(), allow_redirects=False
        )


class _Merged:
    """A collector of what several engines report; a sample that does not say whose it is, gets the engine's number."""

    def __init__(self, texts: Mapping[int, str]) -> None:
        """`texts`: what each engine that has answered reports, by its number."""
        self._texts = texts

    def collect(self) -> list[Metric]:
        families: dict[str, Metric] = {}
        for engine, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                merged = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type, family.unit)
                )
                for each in family.samples:
                    merged.samples.append(each._replace(labels={"engine": str(engine), **each.labels}))
        return list(families.values())


async def _while_connected(
    request: Request, asking: Coroutine[Any, Any, aiohttp.ClientResponse]
) -> aiohttp.ClientResponse:
    """The engine's answer to a request whose body has been read.

    Raises:
        ClientDisconnect: the client has hung up, and so have we, which is how the engine hears of it.
    """
    asked, hung_up = asyncio.ensure_future(asking), asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({asked, hung_up}, return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            raise ClientDisconnect
        return await asked
    finally:
        asked.cancel()
        hung_up.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _nobody_waits(request: Request, error: Exception) -> Response:
    return Response(status_code=HUNG_UP)


def _ending(end: Callable[[], None]) -> Callable[[Request], Awaitable[Response]]:
    async def terminate(request: Request) -> Response:
        end()
        return Response()

    return terminate


def _passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in NOT_PASSED_ON}


def _unreachable(engine: str, error: Exception) -> Response:
    text = f"the engine at {engine} does not answer: {error}"
    return JSONResponse(error_form(text, UNAVAILABLE, "unreachable"), 503, WHEN_UNAVAILABLE)
