"""The server as its clients use it: what it refuses, what its answers hold, beside Hugging Face's, how it ends."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import openai
import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from epbackend.cli import app as command
from epbackend.engines.lmdeploy.requests.checks import LONG
from epbackend.engines.lmdeploy.server.guard import NOT_IMPLEMENTED
from epbackend.models import resolve
from tests.helpers.api import SESSION_LEN, Server, ends_after_the_answer, served, sleeps_and_wakes
from tests.helpers.patience import PATIENCE_S

PROMPTS = ["def main(", "The ship was", "for index, book in"]
TOKENS = 12

COMPLETE = {"prompt": "def main(", "max_tokens": 4}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
GENERATE = {"prompt": "def main(", "max_tokens": 4}
ANY_SAMPLING = [
    ("temperature", -1),
    ("temperature", 3),
    ("temperature", "NaN"),
    ("temperature", float("nan")),
    ("top_p", 0),
    ("top_p", float("inf")),
    ("top_k", -1),
    ("top_k", 10**30),
    ("min_p", 5),
    ("repetition_penalty", 0),
    ("repetition_penalty", float("nan")),
    ("repetition_ngram_size", 10**12),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", SESSION_LEN),
    ("max_tokens", 10**30),
    ("session_id", 2**64),
    ("stop", ""),
    ("stop", [""]),
    ("stop", {"a": 1}),
    ("stop", ["a"] * 100),
    ("guided_regex", "a"),
    ("no_such_option", 1),
]
OPENAI_SAMPLING = [
    ("n", 0),
    ("n", 1000),
    ("seed", 10**30),
    ("presence_penalty", 3),
    ("frequency_penalty", float("nan")),
    ("logit_bias", {"2048": 1}),
    ("logit_bias", {"x": 1}),
    ("response_format", {"type": "regex_schema", "regex_schema": None}),
    ("response_format", {"type": "regex_schema", "regex_schema": "("}),
    ("response_format", {"type": "json_schema"}),
    ("min_new_tokens", 10**30),
]
BAD = [
    *[
        ("/v1/completions", COMPLETE | {field: value}, field)
        for field, value in ANY_SAMPLING + OPENAI_SAMPLING
    ],
    *[
        ("/v1/chat/completions", CHAT | {field: value}, field)
        for field, value in ANY_SAMPLING + OPENAI_SAMPLING
    ],
    *[("/generate", GENERATE | {field: value}, field) for field, value in ANY_SAMPLING],
    *[
        ("/v1/completions", COMPLETE | {"prompt": prompt}, "prompt")
        for prompt in (
            "",
            ["a", ""],
            [],
            [[]],
            [[1], []],
            [2048],
            [-1],
            [[1], [10**30]],
            [1.5],
            ["a", 1],
            "\ud800",
            5,
        )
    ],
    *[
        ("/v1/chat/completions", CHAT | {"messages": messages}, "messages")
        for messages in (
            [{"role": "user", "content": ""}],
            [{"role": "user", "content": None}],
            [{"role": "user", "content": []}],
            [{"role": "user", "content": [{"type": "text", "text": ""}]}],
            [{"role": "user", "content": [{}]}],
            [{"role": "user", "content": "\ud800"}],
            [{"role": "user"}],
            [{"content": "a"}],
            ["a"],
            "a",
            [],
        )
    ],
    ("/v1/chat/completions", {"max_tokens": 4}, "messages"),
    ("/v1/chat/completions", CHAT | {"top_logprobs": 99, "logprobs": True}, "top_logprobs"),
    ("/v1/chat/completions", CHAT | {"functions": [{"name": "f"}]}, "functions"),
    ("/v1/completions", COMPLETE | {"logprobs": 99}, "logprobs"),
    ("/v1/completions", COMPLETE | {"suffix": "a"}, "suffix"),
    ("/v1/completions", COMPLETE | {"best_of": 2}, "best_of"),
    ("/v1/completions", COMPLETE | {"prompt": ["a"] * 100, "n": 100}, "prompt"),
    (
        "/v1/chat/completions",
        CHAT | {"chat_template_kwargs": {"chat_template": "{{ messages }}"}},
        "chat_template_kwargs",
    ),
    ("/v1/completions", COMPLETE | {"stop_token_ids": [2048]}, "stop_token_ids"),
    *[
        (path, body | {field: value}, field)
        for path, body in (("/v1/completions", COMPLETE), ("/v1/chat/completions", CHAT))
        for field, value in (("preserve_cache", True), ("with_cache", True), ("migration_request", 1))
    ],
    ("/generate", {"input_ids": [999999]}, "prompt"),
    ("/generate", {"input_ids": [-1]}, "prompt"),
    ("/generate", GENERATE | {"stop_token_ids": [-5]}, "stop_token_ids"),
    ("/generate", GENERATE | {"return_logprob": True, "top_logprobs_num": 4000}, "logprobs"),
]
UNNAMED = [
    ("/v1/completions", COMPLETE | {"prompt": "a b " * 500}),
    ("/v1/completions", b""),
    ("/v1/completions", b"[]"),
    ("/v1/completions", b'{"model"'),
    ("/generate", {}),
    ("/generate", GENERATE | {"logprob_start_len": 9, "return_logprob": True, "max_tokens": 1}),
    ("/v1/chat/completions", CHAT | {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    ("/pooling", {"input": "a"}),
    ("/pooling", {"input": [999999]}),
    ("/pooling", {"input": ["\ud800"]}),
    ("/v1/encode", {"input": "\ud800"}),
    ("/v1/encode", {"input": ["a" * 20_000]}),
    ("/v1/encode", {"input": "a", "add_special_tokens": True}),
    ("/get_ppl", {"input": "\ud800"}),
    ("/get_ppl", {"input": ""}),
    ("/get_ppl", {"input": [1, 999999]}),
    ("/v1/messages", {"messages": [{"role": "user", "content": ""}], "max_tokens": 4}),
    ("/v1/messages/count_tokens", {"messages": []}),
    (
        "/v1/messages/count_tokens",
        {"messages": [{"role": "system", "content": [{"type": "odd"}]}]},
    ),
    ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "system", "content": [{"type": "odd"}]}]}),
    ("/v1/responses", {"input": ""}),
    ("/v1/responses", {"input": "a", "temperature": float("nan")}),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(resolve("tiny-qwen3-moe"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve("tiny-qwen3-moe"))


@pytest.fixture(scope="module")
def answers(model, tokenizer) -> list[str]:
    """Hugging Face's greedy answers to PROMPTS."""
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        whole = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
        texts.append(tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def test_bad_requests_are_refused_by_field_and_disturb_nobody(server):
    """Streamed or not: a stream does not begin."""
    before = server.greedy()
    wrong = []
    for place, (path, body, field) in enumerate(BAD):
        response = server.post(path, body | {"stream": place % 2 == 1})
        error = (
            response.json().get("error") if response.headers["content-type"] == "application/json" else None
        )
        if response.status_code != 400 or error is None or error["param"] != field:
            wrong.append((path, field, body.get(field), response.status_code, response.text[:200]))
    for path, body in UNNAMED:
        response = server.post(path, body)
        if response.status_code != 400 or "message" not in response.json().get("error", {}):
            wrong.append((path, body, response.status_code, response.text[:200]))
    assert not wrong, "\n".join(map(str, wrong))
    error = server.post("/v1/completions", b'{"model": x}').json()["error"]
    assert (error["message"], error["param"]) == ("JSON decode error at character 10: Expecting value", None)
    refused = server.post("/v1/embeddings", {"input": "a"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (501, NOT_IMPLEMENTED)
    response = server.post("/v1/completions", COMPLETE | {"model": "another"})
    assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found_error")
    assert server.greedy() == before


def test_no_spelling_of_a_request_escapes_its_check(server):
    for kind in ("application/JSON", "Application/json; charset=utf-8"):
        body = json.dumps(COMPLETE | {"model": server.model, "preserve_cache": True})
        response = requests.post(
            f"{server.url}/v1/completions", data=body, headers={"Content-Type": kind}, timeout=PATIENCE_S
        )
        assert (response.status_code, response.json()["error"]["param"]) == (400, "preserve_cache"), kind


def test_only_disaggregated_engines_have_a_distserve(server):
    for path in ("free_cache", "p2p_drop_connect", "engine_info"):
        response = server.post(f"/distserve/{path}", {"remote_engine_id": "a", "remote_session_id": 1})
        assert (response.status_code, "disaggregated" in response.text) == (501, True)


def test_texts_are_encoded_and_weighed(server, tokenizer):
    long = "the quick brown fox " * 300
    texts = [long] * (LONG // len(long) + 1)
    for given in ("a b", texts):
        encoded = server.post("/v1/encode", {"input": given}).json()["input_ids"]
        assert encoded == tokenizer(given).input_ids
    for count in (1, len(texts)):
        messages = count * [{"role": "user", "content": long}]
        counted = server.post("/v1/messages/count_tokens", {"messages": messages}).json()["input_tokens"]
        assert 0 <= counted - count * len(tokenizer(long).input_ids) < 10 * count  # what frames each
    by_ids = server.post("/get_ppl", {"input": tokenizer(PROMPTS[2]).input_ids}).json()["ppl"]
    assert server.post("/get_ppl", {"input": PROMPTS[2]}).json()["ppl"] == by_ids


def test_what_is_large_or_unusual_is_served(server):
    for body in (
        {"top_k": 5000, "temperature": 1},
        {"temperature": 1e-30},
        {"seed": -1, "temperature": 1},
        {"n": None, "stop": None, "logprobs": None},
        {"user": "me", "metadata": {"a": "b"}, "best_of": 1, "use_beam_search": False},
    ):
        response = server.post("/v1/completions", COMPLETE | body)
        assert response.status_code == 200, (body, response.text)


def test_lists_of_texts_and_of_token_ids_are_answered_as_hugging_face_does(
    server, client, tokenizer, answers
):
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    for prompt in (PROMPTS, ids):
        options = {"model": server.model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "n": 2}
        whole = client.completions.create(**options)
        assert [each.index for each in whole.choices] == [0, 1, 2, 3, 4, 5]
        assert [each.text for each in whole.choices] == [text for text in answers for _ in range(2)]
        assert whole.usage.prompt_tokens == sum(map(len, ids))
        assert whole.usage.completion_tokens == 6 * TOKENS
        assert _streamed(client, **options) == [each.text for each in whole.choices]
    one = client.completions.create(model=server.model, prompt=ids[1], max_tokens=TOKENS, temperature=0)
    assert [each.text for each in one.choices] == [answers[1]]


def test_choices_differ_by_seed_and_are_the_same_again(server, client):
    options = {"max_tokens": 8, "temperature": 1.5, "n": 3, "seed": 7, "model": server.model}
    texts = [
        [each.text for each in client.completions.create(prompt="The", **options).choices] for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1
    messages = [{"role": "user", "content": "The"}]
    chat = client.chat.completions.create(messages=messages, **options)
    assert len({each.message.content for each in chat.choices}) > 1


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_answers_stop_before_a_stop_string_of_several_tokens(endpoint, server, client, answers):
    if endpoint == "completions":
        options = {"model": server.model, "prompt": PROMPTS[1], "max_tokens": TOKENS, "temperature": 0}
        create, text = client.completions.create, answers[1]
    else:
        messages = [{"role": "user", "content": PROMPTS[1]}]
        options = {"model": server.model, "messages": messages, "max_tokens": TOKENS, "temperature": 0}
        create = client.chat.completions.create
        text = create(**options).choices[0].message.content
    # Begins in the middle of one token and ends in the middle of another.
    stop = text[3 : len(text) - 3]
    assert len(stop) > 6
    for stops in (stop, ["no such text", stop]):
        (choice,) = create(**options, stop=stops).choices
        got = choice.text if endpoint == "completions" else choice.message.content
        assert (got, choice.finish_reason) == (text[: text.index(stop)], "stop")
        assert _streamed(client, stop=stops, **options) == [text[: text.index(stop)]]


@torch.inference_mode()
def test_log_probabilities_are_the_models(server, client, model, tokenizer, answers):
    """Of the answer, with `echo` of the prompt too, and in chats; as many as asked for, the chosen token among them."""
    options = {"model": server.model, "prompt": PROMPTS[1], "max_tokens": TOKENS, "temperature": 0}
    (choice,) = client.completions.create(**options, logprobs=3, echo=True).choices
    ids = tokenizer(PROMPTS[1] + answers[1], return_tensors="pt").input_ids
    expected = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
    listed = choice.logprobs
    assert choice.text == PROMPTS[1] + answers[1] == "".join(listed.tokens)
    assert [listed.token_logprobs[0], listed.top_logprobs[0]] == [None, None]
    assert listed.token_logprobs[1:] == pytest.approx(expected, abs=1e-3)
    assert [choice.text.startswith(*at) for at in zip(listed.tokens, listed.text_offset, strict=True)] == [
        True
    ] * len(listed.tokens)
    assert {len(each) for each in listed.top_logprobs[1:]} == {3}
    read = client.completions.create(**options | {"max_tokens": 0}, logprobs=3, echo=True).choices[0]
    assert (read.text, read.finish_reason) == (PROMPTS[1], "length")
    assert read.logprobs.token_logprobs[1:] == pytest.approx(
        expected[: len(read.logprobs.tokens) - 1], abs=1e-3
    )
    plain = client.completions.create(**options, logprobs=0).choices[0]
    assert plain.logprobs.token_logprobs == pytest.approx(expected[-TOKENS:], abs=1e-3)

    messages = [{"role": "user", "content": "hello"}]
    chat = {"model": server.model, "messages": messages, "max_tokens": 4, "temperature": 0, "logprobs": True}
    for shown in (None, 2, 5):
        (choice,) = client.chat.completions.create(**chat, top_logprobs=shown).choices
        assert [len(each.top_logprobs) for each in choice.logprobs.content] == [shown or 0] * 4
        assert (
            b"".join(bytes(each.bytes) for each in choice.logprobs.content).decode() == choice.message.content
        )
        for each in choice.logprobs.content:
            assert not shown or each.top_logprobs[0].logprob == each.logprob
        assert math.isfinite(sum(each.logprob for each in choice.logprobs.content))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_option_takes_effect(path, server):
    """On both endpoints, beside the same request without the option."""

    def text(**options):
        response = server.post(
            path, (COMPLETE if "chat" not in path else CHAT) | {"temperature": 0, **options}
        )
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        return choice.get("text") or choice["message"]["content"]

    plain = text(max_tokens=12)
    assert text(logit_bias={"5": 100}, max_tokens=3) == 3 * text(logit_bias={"5": 100}, max_tokens=1)
    assert text(response_format={"type": "regex_schema", "regex_schema": "[0-9]{3}"}).isdigit()
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 1.8}):
        assert text(**penalty, max_tokens=12) != plain


def _streamed(client, **options) -> list[str]:
    """The texts of the choices, put together from the events; each choice ends once."""
    create = client.chat.completions.create if "messages" in options else client.completions.create
    texts: dict[int, str] = {}
    ended = []
    for event in create(stream=True, **options):
        for choice in event.choices:
            more = choice.text if "prompt" in options else choice.delta.content
            texts[choice.index] = texts.get(choice.index, "") + (more or "")
            ended += [choice.index] if choice.finish_reason else []
    assert sorted(ended) == sorted(texts)
    return [texts[index] for index in sorted(texts)]


def test_the_server_shows_what_its_experts_do(server):
    """The same in its status, its metrics, and on the board of `epbackend top`, by its URL."""
    server.greedy()
    deadline, state = time.monotonic() + PATIENCE_S, {}
    # Ranks tell it a moment later.
    while not (state and state["steps"] and all(map(sum, state["tokens_RY"]))):
        assert time.monotonic() < deadline, state
        shown = CliRunner().invoke(command, ["top", f"{server.url}/v1", "--json", "--interval", "0.5"])
        state = json.loads(shown.stdout)
    assert (state["ep_size"], state["top_k"], state["balance"]) == (2, 4, None)
    assert all(len(tokens_Y) == len(state["layers"]) for tokens_Y in state["tokens_RY"])
    metrics = requests.get(f"{server.url}/metrics", timeout=PATIENCE_S).text
    assert f"epbackend_steps_total {float(state['steps'])}" in metrics
    assert "lmdeploy:" in metrics
    assert server.post("/epbackend/rebalance", {}).status_code == 409


def test_the_server_sleeps_and_wakes(server):
    sleeps_and_wakes(server.url, server.model, PROMPTS[1])


def test_the_server_ends_after_its_answer_and_leaves_nothing_behind(server):
    """The last test here: it takes the server away."""
    running = server.running
    running.look()
    where = urlsplit(server.url)
    assert (where.hostname, where.port) in running.listening()
    ends_after_the_answer(running, server.url, server.model, PROMPTS[1], signal.SIGTERM)
    assert running.process.wait(timeout=PATIENCE_S) == 0
    running.assert_nothing_left()
