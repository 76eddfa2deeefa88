"""How a server ends after a signal: requests under way may finish, for so long, and a second signal does not wait."""

from __future__ import annotations

import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import requests

from epbackend.engines.lmdeploy.processes import LOOPBACK, free_port
from tests.helpers.patience import PATIENCE_S

GUARDED = """
import asyncio
import sys
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from epbackend.engines.lmdeploy.server.guard import Guard, signals_unwind

async def slow(request):
    print("ASKED", flush=True)
    await asyncio.sleep(float(request.query_params["seconds"]))
    return PlainTextResponse("done")

port, drain_seconds = int(sys.argv[1]), float(sys.argv[2])
with signals_unwind(), Guard(drain_seconds).in_place():
    uvicorn.run(Starlette(routes=[Route("/slow", slow)]), host="127.0.0.1", port=port)
"""


@pytest.mark.parametrize(
    ("drain_seconds", "request_seconds", "signals", "exit_code", "answered"),
    [(600, 2, 1, 0, 200), (1, 600, 1, 0, 503), (600, 600, 2, 128 + signal.SIGTERM, None)],
    ids=["a-request-finishes", "it-takes-too-long", "a-second-signal"],
)
def test_a_signal_waits_for_requests_as_long_as_it_may(
    drain_seconds, request_seconds, signals, exit_code, answered, start_process, tmp_path
):
    port = free_port()
    running = start_process(GUARDED, str(port), str(drain_seconds), ready="Application startup complete")
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(
            requests.get, f"http://{LOOPBACK}:{port}/slow?seconds={request_seconds}", timeout=PATIENCE_S
        )
        _await_line(tmp_path / "log", "ASKED")
        running.process.send_signal(signal.SIGTERM)
        if signals == 2:
            _await_line(tmp_path / "log", "Shutting down")
            running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=PATIENCE_S) == exit_code
        assert _status(asked) == answered


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
