"""An engine in a process of its own, as `epbackend demo --balance` has two: it ends with the command."""

from __future__ import annotations

import signal

import pytest

from epbackend.cli.apart import EngineApart
from epbackend.errors import UnavailableError
from tests.helpers.engines import config
from tests.helpers.patience import PATIENCE_S

pytestmark = pytest.mark.slow

HOLDING = """
import sys, time
from epbackend import EPConfig
from epbackend.cli.apart import EngineApart

def answer(pipe, text):
    from lmdeploy import GenerationConfig
    return pipe([text], gen_config=GenerationConfig(max_new_tokens=2), do_preprocess=False)[0].text

if __name__ == "__main__":
    model, config = sys.argv[1:]
    with EngineApart(model, EPConfig.from_json(config)) as engine:
        assert isinstance(engine.call(answer, "the quick"), str)
        print("READY", flush=True)
        time.sleep(3600)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_it_ends_with_who_started_it_and_leaves_nothing(sent, checkpoint, start_process):
    running = start_process(HOLDING, str(checkpoint("qwen3-moe")), config(ep_size=2, ep_level=2).to_json())
    running.look()
    assert len(running.workers()) == 3  # the engine and its ranks
    running.process.send_signal(sent)
    running.process.wait(timeout=PATIENCE_S)
    running.assert_nothing_left()


def test_what_its_start_or_a_call_raises_is_raised_here(tmp_path, checkpoint):
    with (
        EngineApart(str(tmp_path), config(ep_size=2)) as engine,
        pytest.raises(UnavailableError, match=r"config\.json"),
    ):
        engine.wait()
    with (
        EngineApart(checkpoint("qwen3-moe"), config()) as engine,
        pytest.raises(AttributeError, match="has no"),
    ):
        engine.call(getattr, "no such name")
