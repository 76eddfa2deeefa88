"""The public address of several engines: what an engine says is what the client gets."""

from __future__ import annotations

import asyncio
import gzip
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import requests
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from epbackend.engines.lmdeploy.processes import LOOPBACK, free_port, listens
from epbackend.engines.lmdeploy.server.guard import Guard
from epbackend.engines.lmdeploy.server.reverse_proxy import ReverseProxy
from tests.helpers.patience import PATIENCE_S


class Engine:
    """What an engine's server would answer, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.healthy = True
        self.release = threading.Event()

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/{path:path}", self.answer, methods=["GET", "POST"])])

    async def answer(self, request: Request) -> object:
        path = request.url.path
        self.asked.append(f"{path}?{request.url.query}")
        if path == "/health":
            status = "healthy" if self.healthy else "unhealthy"
            return JSONResponse({"status": status}, 200 if self.healthy else 503)
        if path == "/metrics":
            text = '# TYPE steps counter\nsteps_total 2.0\nsteps_total{engine="9"} 3.0\n'
            if "gzip" in request.headers["accept-encoding"]:  # as prometheus_client's own application does
                return Response(gzip.compress(text.encode()), headers={"content-encoding": "gzip"})
            return PlainTextResponse(text)
        if path == "/v1/models":
            return JSONResponse({"data": [{"id": "tiny"}]})
        if path == "/stream":
            return StreamingResponse(self.parts(), media_type="text/event-stream")
        sent = await request.body()
        return JSONResponse(
            {"path": path, "sent": sent.decode(), "key": request.headers.get("authorization")}, 400
        )

    async def parts(self):
        yield b"data: 1\n\n"
        while not self.release.is_set():
            await asyncio.sleep(0.01)
        yield b"data: [DONE]\n\n"


@contextmanager
def served(app: object) -> Iterator[str]:
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host=LOOPBACK, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + PATIENCE_S
    while not listens((LOOPBACK, port)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield f"http://{LOOPBACK}:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def deployment():
    engines = Engine(), Engine()
    guard = Guard(drain_seconds=1, end=lambda: None)
    with served(engines[0].app()) as one, served(engines[1].app()) as two:
        guard.app = ReverseProxy([one, two]).app()
        with served(guard) as url:
            yield url, engines, guard
            for each in engines:
                each.release.set()


def test_an_engines_answer_arrives_unchanged(deployment):
    url, engines, _ = deployment
    answer = requests.post(f"{url}/v1/completions?a=b", data="{}", headers={"Authorization": "Bearer k"})
    assert (answer.status_code, answer.json()) == (
        400,
        {"path": "/v1/completions", "sent": "{}", "key": "Bearer k"},
    )
    assert [each["id"] for each in requests.get(f"{url}/v1/models").json()["data"]] == ["tiny"]

    # While one engine streams, the other gets the next request; a part arrives before the whole is there.
    with requests.get(f"{url}/stream", stream=True) as stream:
        parts = stream.iter_lines()
        assert next(parts) == b"data: 1"
        busy = next(each for each in engines if "/stream?" in each.asked)
        requests.post(f"{url}/generate")
        assert "/generate?" not in busy.asked
        busy.release.set()
        assert b"data: [DONE]" in list(parts)

    requests.post(f"{url}/sleep?level=1")
    assert all("/sleep?level=1" in each.asked for each in engines)
    metrics = requests.get(f"{url}/metrics").text
    for line in ('steps_total{engine="0"} 2.0', 'steps_total{engine="1"} 2.0', 'steps_total{engine="9"} 3.0'):
        assert line in metrics


def test_health_is_that_of_all_and_a_failure_is_told(deployment):
    url, engines, guard = deployment
    assert requests.get(f"{url}/health").status_code == requests.get(f"{url}/ready").status_code == 200
    refused = requests.post(f"{url}/update_weights", json={})
    assert (refused.status_code, "packed" in refused.text) == (501, True)
    assert requests.post(f"{url}/sleep?level=2").status_code == 501

    engines[1].healthy = False
    assert requests.get(f"{url}/health").status_code == requests.get(f"{url}/ready").status_code == 503
    engines[1].healthy = True

    with requests.get(f"{url}/stream", stream=True) as stream:
        parts = stream.iter_lines()
        next(parts)
        guard.fail("rank 1 was killed by SIGKILL")
        assert any(b"rank 1 was killed" in part for part in parts)
    for path in ("/v1/models", "/health", "/ready"):
        answer = requests.get(url + path)
        assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
        assert "rank 1 was killed" in answer.text
