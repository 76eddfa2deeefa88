"""How a server ends after a signal: requests under way may finish, for so long, and a second signal does not wait."""

from __future__ import annotations

import signal
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import requests

from epbackend.engines.lmdeploy.processes import LOOPBACK, free_port
from epbackend.engines.lmdeploy.server.guard import LARGEST_BODY, TOGETHER_S, TOO_LARGE
from tests.helpers.patience import PATIENCE_S

GUARDED = """
import asyncio
import sys
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from epbackend.engines.lmdeploy.server.guard import Guard, signals_unwind

async def slow(request):
    print("ASKED", flush=True)
    await asyncio.sleep(float(request.query_params["seconds"]))
    return PlainTextResponse("done")

states = iter(["initializing", "initializing"])

async def health(request):
    state = next(states, "healthy")
    return JSONResponse({"status": state}, 200 if state == "healthy" else 503)

async def length(request):
    return PlainTextResponse(str(len(await request.body())))

port, drain_seconds = int(sys.argv[1]), float(sys.argv[2])
tls = dict(zip(("ssl_keyfile", "ssl_certfile"), sys.argv[3:]))
with signals_unwind(), Guard(drain_seconds).in_place():
    routes = [Route("/slow", slow), Route("/length", length, methods=["POST"]), Route("/health", health)]
    uvicorn.run(Starlette(routes=routes), host="127.0.0.1", port=port, **tls)
"""

ENDED_BY_A_CLIENT = """
import sys
from types import SimpleNamespace
import uvicorn
from fastapi import APIRouter, FastAPI
from lmdeploy.serve.openai.endpoints import management
from epbackend.engines.lmdeploy.server.guard import Guard
from epbackend.engines.lmdeploy.workers.process_guard import guard_process

guard_process(in_its_own_time=True)
router, app = APIRouter(), FastAPI()
management.register(router, SimpleNamespace(allow_terminate_by_client=True))
app.include_router(router)
with Guard(drain_seconds=1).in_place():
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("drain_seconds", "request_seconds", "ending", "again", "exit_code", "answered"),
    [
        (600, 2, signal.SIGTERM, False, 0, 200),
        (1, 600, signal.SIGTERM, False, 0, 503),
        (600, 600, signal.SIGTERM, True, 128 + signal.SIGTERM, None),
        (600, 4, signal.SIGHUP, True, 0, 200),
    ],
    ids=["a-request-finishes", "it-takes-too-long", "a-second-signal", "a-terminal-closes"],
)
def test_a_signal_waits_for_requests_as_long_as_it_may(
    drain_seconds, request_seconds, ending, again, exit_code, answered, start_process, tmp_path
):
    port = free_port()
    running = start_process(GUARDED, str(port), str(drain_seconds), ready="Application startup complete")
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(
            requests.get, f"http://{LOOPBACK}:{port}/slow?seconds={request_seconds}", timeout=PATIENCE_S
        )
        _await_line(tmp_path / "log", "ASKED")
        running.process.send_signal(ending)
        running.process.send_signal(
            ending
        )  # at once: some programs that start it hand on what it has got already
        if again:
            _await_line(tmp_path / "log", "Shutting down")
            time.sleep(2 * TOGETHER_S)
            running.process.send_signal(ending)
        assert running.process.wait(timeout=PATIENCE_S) == exit_code
        assert _status(asked) == answered


def test_an_idle_client_does_not_hold_the_end_up(certificate, start_process):
    """It keeps its connection, and TLS waits for its consent to an end: here longer than the test does."""
    key, cert = certificate
    port = free_port()
    patient = f"import asyncio.constants; asyncio.constants.SSL_SHUTDOWN_TIMEOUT = {10 * PATIENCE_S}\n"
    running = start_process(
        patient + GUARDED,
        str(port),
        str(5 * PATIENCE_S),
        str(key),
        str(cert),
        ready="Application startup complete",
    )
    with requests.Session() as client:
        url = f"https://{LOOPBACK}:{port}/slow?seconds=0"
        assert client.get(url, timeout=PATIENCE_S, verify=str(cert)).status_code == 200
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=PATIENCE_S) == 0


@pytest.mark.parametrize("path", ["health", "ready"])
def test_a_server_that_has_just_started_is_asked_again(path, start_process):
    """LMDeploy says 503 until it has asked its engine for the first time, in which nothing is wrong."""
    port = free_port()
    start_process(GUARDED, str(port), "1", ready="Application startup complete")
    assert requests.get(f"http://{LOOPBACK}:{port}/{path}", timeout=PATIENCE_S).status_code == 200


def test_a_body_without_a_bound_is_refused(start_process):
    """Whether its length comes first or not."""
    port = free_port()
    start_process(GUARDED, str(port), "1", ready="Application startup complete")
    url = f"http://{LOOPBACK}:{port}/length"

    def sent(size: int, *, told: bool) -> requests.Response:
        part = bytes(2**20)
        body = bytes(size) if told else (part[: size - at] for at in range(0, size, len(part)))
        return requests.post(url, data=body, timeout=PATIENCE_S)

    for told in (True, False):
        assert sent(LARGEST_BODY, told=told).text == str(LARGEST_BODY)
        refused = sent(LARGEST_BODY + 1, told=told)
        assert (refused.status_code, refused.json()["error"]["type"]) == (413, TOO_LARGE)


def test_a_port_that_is_taken_meanwhile_is_named(start_process, tmp_path):
    """It was free when the server was asked for, and lost while the model was loaded."""
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        running = start_process(GUARDED, str(port), "1", ready=f"port {port} of {LOOPBACK} cannot be used")
        assert running.process.wait(timeout=PATIENCE_S) == 1


def test_a_client_ends_a_server_that_has_a_parent(start_process):
    """By LMDeploy's own endpoint, whose SIGTERM such a server ignores."""
    port = free_port()
    running = start_process(ENDED_BY_A_CLIENT, str(port), ready="Application startup complete")
    assert requests.get(f"http://{LOOPBACK}:{port}/terminate", timeout=PATIENCE_S).status_code == 200
    assert running.process.wait(timeout=PATIENCE_S) == 0


def _await_line(log, line: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while line not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def _status(asked: Future) -> int | None:
    """What the request was answered; None: its connection was closed."""
    try:
        return asked.result().status_code
    except requests.ConnectionError:
        return None
