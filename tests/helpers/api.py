"""A server as users start it, `python -m epbackend serve`, with the packaged tiny model on two ranks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import requests

from epbackend.engines.lmdeploy.processes import LOOPBACK, free_port
from tests.helpers.patience import PATIENCE_S
from tests.helpers.processes import ROOT, descendants

SESSION_LEN = 200


class Server:
    """What a client sees of it."""

    def __init__(self, port: int) -> None:
        self.url = f"http://{LOOPBACK}:{port}"
        self.model = ""

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
        "engine": {"session_len": SESSION_LEN, "log_level": "ERROR", "dtype": "float32"},
    }
    (folder / "config.yaml").write_text(json.dumps(settings))
    server, log = Server(port := free_port()), folder / "log"
    command = ["-m", "epbackend", "serve", "tiny-qwen3-moe", "--config", str(folder / "config.yaml")]
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *command, "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not server.model:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                server.model = requests.get(f"{server.url}/v1/models", timeout=5).json()["data"][0]["id"]
            time.sleep(0.2)
        yield server
    finally:
        family = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=PATIENCE_S)
        finally:
            if process.poll() is None:
                process.kill()
            for each in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
