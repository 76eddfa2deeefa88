"""Ranks on two machines, by Ray: the same tokens as on one; a machine that is cut off is an error, not a stall."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from subprocess import Popen

import pytest

import epbackend
from epbackend import EPConfig
from epbackend.engines.lmdeploy.workers.ray_executor import CPU_RESOURCE
from epbackend.errors import EPError
from epbackend.models import resolve
from tests.helpers.engine_models import TOP_K, greedy_tokens
from tests.helpers.engines import GREEDY, config
from tests.helpers.patience import PATIENCE_S
from tests.helpers.two_hosts import Host, start_ray, two_hosts, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.engine,
    pytest.mark.skipif(why_not() is not None, reason=f"two machines in one: {why_not()}"),
]
PROMPTS = ["the quick", "a river", "in the", "one two three"]
TIMEOUT_S = 20


def run_pipeline(model: str, settings: str) -> None:
    """What the user's script does on the first machine: the same requests until there is an error."""
    try:
        with epbackend.pipeline(model, EPConfig.from_json(settings)) as pipe:
            answers = pipe(PROMPTS, gen_config=GREEDY)
            print("TOKENS", json.dumps([each.token_ids for each in answers]), flush=True)
            tokens_RYE = pipe.load().tokens_RYE
            fed = sum(each.input_token_len + each.generate_token_len - 1 for each in answers)
            told = {"of_ranks": tokens_RYE.sum((1, 2)).tolist(), "of_layers": tokens_RYE.sum((0, 2)).tolist()}
            print("LOAD", json.dumps(told | {"fed": fed}), flush=True)
            while True:
                pipe(PROMPTS, gen_config=GREEDY)
    except EPError as error:
        print("ERROR", json.dumps(str(error)), flush=True)


@pytest.mark.parametrize(("dp", "ep_size"), [(1, 2), (2, 4)])
def test_ranks_on_two_machines_give_the_tokens_of_one_and_notice_when_it_is_cut_off(dp, ep_size):
    model = resolve("tiny-qwen3-moe")
    expected = greedy_tokens(Path(model), PROMPTS)
    with two_hosts() as (first, second):
        start_ray(first, {CPU_RESOURCE: ep_size // 2})
        start_ray(second, {CPU_RESOURCE: ep_size // 2}, head=first)

        if dp == 1:
            error = json.loads(_read_until(_start(first, model, dp, 2 * ep_size), "ERROR"))
            assert f"the cluster at RAY_ADDRESS has {ep_size} {CPU_RESOURCE}" in error

        script = _start(first, model, dp, ep_size)
        assert json.loads(_read_until(script, "TOKENS")) == expected
        load = json.loads(_read_until(script, "LOAD"))
        assert all(load["of_ranks"]), "the second machine's ranks are reported too"
        # The last new token of a prompt may be fed back or not.
        for routed in load["of_layers"]:
            assert load["fed"] * TOP_K <= routed <= (load["fed"] + len(PROMPTS)) * TOP_K
        second.cut_off()
        began = time.monotonic()
        error = json.loads(_read_until(script, "ERROR"))
        print(f"told {time.monotonic() - began:.1f} s after the cut: {error}")
        assert "rank" in error
        script.communicate(timeout=PATIENCE_S)


def test_a_first_machine_without_ranks_is_told_before_they_are_waited_for():
    """Where the command runs, the ranks meet."""
    with two_hosts() as (first, second):
        start_ray(first, {})
        start_ray(second, {CPU_RESOURCE: 2}, head=first)
        for dp in (1, 2):
            error = json.loads(_read_until(_start(first, resolve("tiny-qwen3-moe"), dp, 2), "ERROR"))
            assert f"its Ray offers 0 {CPU_RESOURCE}: run this command on a machine of the cluster" in error


def _start(host: Host, model: str, dp: int, ep_size: int) -> Popen[str]:
    settings = config({"dp": dp, "executor": "ray", "dtype": "float32"}, ep_size=ep_size, timeout_s=TIMEOUT_S)
    script = (
        "import sys; from tests.engines.test_two_machines import run_pipeline; run_pipeline(*sys.argv[1:])"
    )
    return host.start(sys.executable, "-c", script, model, settings.to_json())


def _read_until(process: Popen[str], word: str) -> str:
    """The rest of the first line that begins with the word."""
    assert process.stdout
    seen = []
    for line in process.stdout:
        if line.startswith(word):
            return line.removeprefix(word)
        seen.append(line)
    raise AssertionError(f"it ended without {word}:\n{''.join(seen)}")
