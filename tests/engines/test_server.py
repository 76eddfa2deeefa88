"""LMDeploy's OpenAI server with expert parallelism: answers, refuses a port in use, leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from transformers import AutoTokenizer

from epbackend.engines.lmdeploy import serve
from epbackend.engines.lmdeploy.processes import LOOPBACK, free_port
from epbackend.errors import ConfigError
from tests.helpers.engine_models import prompts
from tests.helpers.engines import await_model, complete, config
from tests.helpers.patience import PATIENCE_S

SERVE = """
import sys
from epbackend import EPConfig
from epbackend.engines.lmdeploy import serve
from tests.helpers.patience import PATIENCE_S

if __name__ == "__main__":
    model, config, port = sys.argv[1:]
    serve(model, EPConfig.from_json(config), port=int(port), model_name="tiny", drain_seconds=PATIENCE_S)
"""


@pytest.mark.parametrize(
    ("engine", "ending", "ready"),
    [
        ({}, signal.SIGTERM, "Application startup complete"),
        pytest.param({}, signal.SIGINT, "Application startup complete", marks=pytest.mark.slow),
        pytest.param({"dp": 2}, signal.SIGINT, "", marks=pytest.mark.slow),
        pytest.param({}, signal.SIGHUP, "Application startup complete", marks=pytest.mark.slow),
        pytest.param({}, signal.SIGKILL, "Application startup complete", marks=pytest.mark.slow),
    ],
    ids=["dp1-sigterm", "dp1-sigint", "dp2-sigint", "dp1-sighup", "dp1-sigkill"],
)
def test_a_server_answers_and_leaves_no_process_behind(
    engine, ending, ready, checkpoint, reference, start_process
):
    model, port = checkpoint("qwen3-moe"), free_port()
    settings = config(engine, ep_size=2, ep_level=2)
    running = start_process(SERVE, str(model), settings.to_json(), str(port), ready=ready)
    await_model(port)
    running.look()

    texts = prompts()[:4]
    answers = [complete(port, text) for text in texts]
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = [tokenizer.decode(tokens) for tokens in reference("qwen3-moe")[:4]]
    # The server holds back bytes that are no whole character yet; random models end in the middle of one.
    assert [answer.strip("\ufffd") for answer in answers] == [text.strip("\ufffd") for text in expected]

    _sleeps_and_wakes(port, texts[0], answers[0])

    listening = {address for each in running.family for address in _listening(each)}
    assert (LOOPBACK, port) in listening
    killed = ending is signal.SIGKILL
    if killed:
        running.process.kill()
    else:
        _ends_after_the_answer(running, port, texts[0], ending)
    assert running.process.wait(timeout=PATIENCE_S) == (-signal.SIGKILL if killed else 0)
    running.assert_nothing_left()


def test_a_port_in_use_is_refused_before_anything_loads(checkpoint):
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} .*in use.*another"):
            serve(str(checkpoint("qwen3-moe")), config(ep_size=2), port=port)


def test_an_engine_that_cannot_start_says_why(checkpoint, start_process):
    settings = config({"cache_gb": 1e-5}).to_json()
    said = "WorkerError: the engine failed: ConfigError: engine.cache_gb: 1e-05 GiB"
    running = start_process(SERVE, str(checkpoint("qwen3-moe")), settings, str(free_port()), ready=said)
    assert running.process.wait(timeout=PATIENCE_S) == 1
    running.assert_nothing_left()


def _ends_after_the_answer(running, port: int, text: str, ending: signal.Signals) -> None:
    """Also where every process gets the signal: by Ctrl-C, a terminal that closes, systemd's default."""
    request = {"model": "tiny", "prompt": text, "max_tokens": 100, "ignore_eos": True, "stream": True}
    url = f"http://{LOOPBACK}:{port}/v1/completions"
    with requests.post(url, json=request, timeout=PATIENCE_S, stream=True) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.killpg(running.process.pid, ending)
        assert [line for line in lines if line][-1] == b"data: [DONE]"


def _sleeps_and_wakes(port: int, text: str, answer: str) -> None:
    """It says so, keeps no output of before, and gives the same tokens afterwards."""
    url = f"http://{LOOPBACK}:{port}"
    request = {"model": "tiny", "prompt": text, "max_tokens": 200, "ignore_eos": True}
    load = requests.get(f"{url}/epbackend/status", timeout=PATIENCE_S).json()
    with ThreadPoolExecutor() as pool:
        under_way = pool.submit(requests.post, f"{url}/v1/completions", json=request, timeout=PATIENCE_S)
        assert requests.post(f"{url}/sleep", json={}, timeout=PATIENCE_S).status_code == 200
        assert under_way.result().status_code in (200, 503)  # cut off, or not let in any more
    assert requests.post(f"{url}/v1/completions", json=request, timeout=PATIENCE_S).status_code == 503
    assert requests.get(f"{url}/ready", timeout=PATIENCE_S).json()["status"] == "sleeping"
    assert requests.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200
    assert requests.post(f"{url}/wakeup", json={}, timeout=PATIENCE_S).status_code == 200
    assert complete(port, text) == answer
    # The warm-up after it is no load, and none of before is forgotten.
    assert requests.get(f"{url}/epbackend/status", timeout=PATIENCE_S).json()["steps"] > load["steps"]
    refused = requests.post(f"{url}/sleep?level=2", json={}, timeout=PATIENCE_S)
    assert (refused.status_code, "level 1" in refused.text) == (501, True)


def _listening(process) -> set[tuple[str, int]]:
    return {tuple(each.laddr) for each in process.net_connections("tcp") if each.status == "LISTEN"}
