"""Two engines (dp 2), each with its own prompts, on shared experts: by Ray, LMDeploy's only way."""

from __future__ import annotations

import pytest

import epbackend
from epbackend.engines.lmdeploy.dp_pipeline import ReplicatedPipeline
from epbackend.errors import ConfigError, WorkerError
from tests.helpers.engine_models import NEW_TOKENS, TOP_K, prompts
from tests.helpers.engines import GREEDY, config
from tests.helpers.patience import PATIENCE_S
from tests.helpers.processes import GENERATE


@pytest.mark.parametrize("name", ["chat", "session", "get_ppl", "get_reward_score", "batch_infer"])
def test_a_method_of_lmdeploys_that_it_lacks_is_named(name):
    pipe = ReplicatedPipeline.__new__(ReplicatedPipeline)  # starts no engine
    with pytest.raises(AttributeError, match=rf"engine\.dp > 1 has no {name}: .*dp: 1"):
        getattr(pipe, name)


def test_two_engines_give_the_tokens_of_one_with_uneven_and_empty_ranks(checkpoint, reference):
    """One prompt alone, while the other engine has nothing to do; then twelve of 1 to 150 words go round."""
    texts, expected = prompts(), reference("qwen3-moe")
    with epbackend.pipeline(str(checkpoint("qwen3-moe")), config({"dp": 2}, ep_size=2, ep_level=2)) as pipe:
        alone = pipe(texts[4], gen_config=GREEDY, do_preprocess=False)
        load_alone = pipe.load()
        crowd = pipe(texts, gen_config=GREEDY, do_preprocess=False)
        with pytest.raises(ConfigError, match=r"^sessions: "):
            pipe(texts, sessions=[])
        parts = list(pipe.stream_infer(texts[1:4], gen_config=GREEDY, do_preprocess=False))
        load = pipe.load()
        mine = [engine for engine in pipe._processes if engine.is_alive()]
    assert [answer.token_ids for answer in crowd] == expected
    assert alone.token_ids == expected[4]
    # What the other engine makes up, to take part, is no load. The last new token may be fed back or not.
    fed = alone.input_token_len + NEW_TOKENS - 1
    for routed in load_alone.tokens_RYE.sum(axis=(0, 2)):
        assert fed * TOP_K <= routed <= (fed + 1) * TOP_K
    for index in range(3):
        assert [token for part in parts if part.index == index for token in part.token_ids] == expected[
            1 + index
        ]
    assert len(parts) >= NEW_TOKENS
    assert len(mine) == 2
    assert all(tokens > 0 for tokens in load.tokens_per_rank)
    assert load.dispatchers["decode"]["name"] == "alltoall"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "settings"),
    [
        ("deepseek-v3", config({"dp": 2}, ep_size=4, ep_level=2)),
        ("deepseek-v2", config({"dp": 2}, ep_size=4, ep_level=1)),
        ("deepseek-v3", config({"dp": 2}, ep_size=2, ep_level=1)),
    ],
)
def test_two_engines_with_attention_ranks_give_the_tokens_of_one(form, settings, checkpoint, reference):
    """Among them the mixed form: two engines with two attention ranks each."""
    with epbackend.pipeline(str(checkpoint(form)), settings) as pipe:
        answers = pipe(prompts(), gen_config=GREEDY, do_preprocess=False)
    assert [answer.token_ids for answer in answers] == reference(form)


@pytest.mark.slow
def test_a_killed_engine_fails_the_call_by_name(checkpoint):
    with epbackend.pipeline(str(checkpoint("qwen3-moe")), config({"dp": 2}, ep_size=2)) as pipe:
        pipe._processes[1].kill()
        with pytest.raises(WorkerError, match="dp rank 1"):
            pipe(prompts(), gen_config=GREEDY, do_preprocess=False)


@pytest.mark.slow
def test_nothing_is_left_of_ray_when_the_parent_is_killed(checkpoint, start_process):
    settings = config({"dp": 2}, ep_size=2)
    running = start_process(GENERATE, str(checkpoint("qwen3-moe")), settings.to_json())
    running.process.kill()
    running.process.wait(timeout=PATIENCE_S)
    running.assert_nothing_left()
