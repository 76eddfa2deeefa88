"""The public address of several engines: what an engine says is what the client gets."""

from __future__ import annotations

import asyncio
import gzip
import multiprocessing
import os
import socket
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

from epbackend.engines.lmdeploy.processes import LOOPBACK
from epbackend.engines.lmdeploy.server.guard import Guard, looking_out
from epbackend.engines.lmdeploy.server.reverse_proxy import ReverseProxy
from tests.helpers.patience import PATIENCE_S


class Engine:
    """What an engine's server would answer, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.healthy = True
        self.release = threading.Event()
        self.hung_up = threading.Event()

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/{path:path}", self.answer, methods=["GET", "POST"])])

    async def answer(self, request: Request) -> object:
        path = request.url.path
        self.asked.append(f"{path}?{request.url.query}")
        if path == "/health":
            status = "healthy" if self.healthy else "unhealthy"
            return JSONResponse({"status": status}, 200 if self.healthy else 503)
        if path == "/metrics" and not self.healthy:
            return PlainTextResponse("", 500)
        if path == "/metrics":
            text = '# TYPE steps counter\nsteps_total 2.0\nsteps_total{engine="9"} 3.0\n'
            if "gzip" in request.headers["accept-encoding"]:  # as prometheus_client's own application does
                return Response(gzip.compress(text.encode()), headers={"content-encoding": "gzip"})
            return PlainTextResponse(text)
        if path == "/v1/models":
            return JSONResponse({"data": [{"id": "tiny"}]})
        if path == "/thinks":  # as LMDeploy does before the whole answer is there
            await request.body()
            while not await request.is_disconnected():
                await asyncio.sleep(0.01)
            self.hung_up.set()
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
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(
        (LOOPBACK, 0)
    ) as listening:  # who connects before the server runs is answered then
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://{LOOPBACK}:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def ended():
    """One entry for each time that a client has ended the deployment."""
    return []


@pytest.fixture
def deployment(ended):
    engines = Engine(), Engine()
    guard = Guard(drain_seconds=1, end=lambda: None)
    with served(engines[0].app()) as one, served(engines[1].app()) as two:
        guard.app = ReverseProxy([one, two]).app(lambda: ended.append("now"), ["k"])
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

    # An engine keeps its number where another does not answer.
    engines[0].healthy = False
    metrics = requests.get(f"{url}/metrics").text
    assert 'steps_total{engine="1"} 2.0' in metrics
    assert 'engine="0"' not in metrics


def test_an_engine_hears_that_a_client_has_hung_up(deployment):
    url, engines, _ = deployment
    port = int(url.rpartition(":")[2])
    with socket.create_connection((LOOPBACK, port)) as client:
        client.sendall(b"POST /thinks HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}")
        deadline = time.monotonic() + PATIENCE_S
        while not any("/thinks?" in each.asked for each in engines):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    asked = next(each for each in engines if "/thinks?" in each.asked)
    assert asked.hung_up.wait(PATIENCE_S)
    # Nothing is under way there any more: of engines with equally many requests the first gets the next.
    requests.post(f"{url}/generate")
    assert asked is engines[0]
    assert asked.asked[-1] == "/generate?"


def test_a_client_ends_the_whole_and_not_one_engine(deployment, ended):
    url, engines, _ = deployment
    assert requests.get(f"{url}/terminate").status_code == 401
    assert ended == []
    assert requests.get(f"{url}/terminate", headers={"Authorization": "Bearer k"}).status_code == 200
    assert ended == ["now"]
    assert not any("/terminate" in path for each in engines for path in each.asked)


def test_an_engine_that_ends_before_it_is_watched_is_a_failure():
    """Whoever looks at the children of a process reaps those that have ended."""
    process = multiprocessing.get_context("fork").Process(target=os._exit, args=(9,), name="mp_engine_proc")
    process.start()
    process.join()
    guard = Guard(drain_seconds=1, end=lambda: None)
    guard.app = Engine().app()
    with looking_out(guard, None, lambda: None, PATIENCE_S, None), served(guard) as url:
        deadline = time.monotonic() + PATIENCE_S
        while (answer := requests.get(f"{url}/health")).status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert "process ended as soon as" in answer.text


def test_health_is_that_of_all_and_a_failure_is_told(deployment):
    url, engines, guard = deployment
    assert requests.get(f"{url}/health").status_code == requests.get(f"{url}/ready").status_code == 200
    refused = requests.post(f"{url}/update_weights", json={})
    assert (refused.status_code, "packed" in refused.text) == (501, True)
    for level in ("2", "02", "+2", "%32", "%EF%BC%92", "1&level=2"):
        assert requests.post(f"{url}/sleep?level={level}").status_code == 501, level

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
