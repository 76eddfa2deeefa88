"""LMDeploy's OpenAI server with expert parallelism: answers, refuses a port in use, leaves nothing behind."""

from __future__ import annotations

import signal
import socket

import pytest
from transformers import AutoTokenizer

from epbackend.engines.lmdeploy import serve
from epbackend.engines.lmdeploy.processes import LOOPBACK, free_port
from epbackend.errors import ConfigError
from tests.helpers.api import ends_after_the_answer, sleeps_and_wakes
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


@pytest.mark.slow  # the default run has one of them in test_api.py, on the server that is there for its answers
@pytest.mark.parametrize(
    ("engine", "ending", "ready"),
    [
        ({}, signal.SIGTERM, "Application startup complete"),
        ({}, signal.SIGINT, "Application startup complete"),
        ({"dp": 2}, signal.SIGINT, ""),
        ({}, signal.SIGHUP, "Application startup complete"),
        ({}, signal.SIGKILL, "Application startup complete"),
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

    url = f"http://{LOOPBACK}:{port}"
    sleeps_and_wakes(url, "tiny", texts[0])

    assert (LOOPBACK, port) in running.listening()
    killed = ending is signal.SIGKILL
    if killed:
        running.process.kill()
    else:
        ends_after_the_answer(running, url, "tiny", texts[0], ending)
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
