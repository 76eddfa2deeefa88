"""A server as users start it, `python -m epbackend serve`, with the packaged tiny model on two ranks.

And what any server does: it sleeps and wakes, and it ends after its answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from epbackend.engines.lmdeploy.processes import LOOPBACK, free_port
from tests.helpers.patience import PATIENCE_S
from tests.helpers.processes import ROOT, Running

SESSION_LEN = 200


class Server:
    """What a client sees of it, and its processes."""

    def __init__(self, port: int, running: Running) -> None:
        self.url = f"http://{LOOPBACK}:{port}"
        self.model = ""
        self.running = running

    def post(self, path: str, body: Any) -> requests.Response:
        """The response to a JSON body, or to bytes as they are; `model` is filled in."""
        if isinstance(body, dict) and path.startswith("/v1"):
            body = {"model": self.model} | body
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "anthropic-version": "2023-06-01"}
        return requests.post(self.url + path, data=data, headers=headers, timeout=PATIENCE_S)

    def greedy(self) -> list[dict]:
        """An answer that only the model decides."""
        body = {"prompt": ["def main(", "The ship"], "max_tokens": 8, "temperature": 0}
        response = self.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        return response.json()["choices"]


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Server]:
    """The server, ready; it is stopped at the end. Its log is folder/log."""
    settings = {
        "device": "cpu",
        "ep_size": 2,
        "ep_level": 2,
        "engine": {"session_len": SESSION_LEN, "log_level": "ERROR", "dtype": "float32"},
    }
    (folder / "config.yaml").write_text(json.dumps(settings))
    port, log = free_port(), folder / "log"
    command = ["-m", "epbackend", "serve", "tiny-qwen3-moe", "--config", str(folder / "config.yaml")]
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *command, "--port", str(port), "--drain-seconds", str(PATIENCE_S)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    server = Server(port, Running(process, log))
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not server.model:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                server.model = requests.get(f"{server.url}/v1/models", timeout=5).json()["data"][0]["id"]
            time.sleep(0.2)
        server.running.look()
        yield server
    finally:
        server.running.look()
        process.send_signal(signal.SIGTERM)  # nothing, if it has ended
        try:
            process.wait(timeout=PATIENCE_S)
        finally:
            server.running.kill()


def sleeps_and_wakes(url: str, model: str, text: str) -> None:
    """It says so, keeps no output of before, and gives the same tokens afterwards."""
    greedy = {"model": model, "prompt": text, "max_tokens": 12, "temperature": 0, "ignore_eos": True}

    def complete(**options: Any) -> requests.Response:
        return requests.post(f"{url}/v1/completions", json=greedy | options, timeout=PATIENCE_S)

    answer = complete().json()["choices"]
    load = requests.get(f"{url}/epbackend/status", timeout=PATIENCE_S).json()
    with ThreadPoolExecutor() as pool:
        under_way = pool.submit(complete, max_tokens=150)
        assert requests.post(f"{url}/sleep", json={}, timeout=PATIENCE_S).status_code == 200
        assert under_way.result().status_code in (200, 503)  # cut off, or not let in any more
    assert complete().status_code == 503
    assert requests.get(f"{url}/ready", timeout=PATIENCE_S).json()["status"] == "sleeping"
    assert requests.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200
    assert requests.post(f"{url}/wakeup", json={}, timeout=PATIENCE_S).status_code == 200
    assert complete().json()["choices"] == answer
    # The warm-up after it is no load, and none of before is forgotten.
    assert requests.get(f"{url}/epbackend/status", timeout=PATIENCE_S).json()["steps"] > load["steps"]
    refused = requests.post(f"{url}/sleep?level=2", json={}, timeout=PATIENCE_S)
    assert (refused.status_code, "level 1" in refused.text) == (501, True)


def ends_after_the_answer(running: Running, url: str, model: str, text: str, ending: signal.Signals) -> None:
    """Also where every process gets the signal: by Ctrl-C, a terminal that closes, systemd's default."""
    request = {"model": model, "prompt": text, "max_tokens": 100, "ignore_eos": True, "stream": True}
    with requests.post(f"{url}/v1/completions", json=request, timeout=PATIENCE_S, stream=True) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.killpg(running.process.pid, ending)
        assert [line for line in lines if line][-1] == b"data: [DONE]"
