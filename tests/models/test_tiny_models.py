"""The packaged tiny models: found by name, small, able to read and write, and routed unevenly and by topic."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from epbackend.cli.demo import PROMPTS, greedy_tokens
from epbackend.models import TINY_MODELS, resolve

pytestmark = pytest.mark.cpu

# Written for this test, so that no model was trained on them.
PROSE = """\
The commerce of our people with the nations of the world has increased during the past year, and the revenue
of the Government has been sufficient to pay the interest of the public debt. I recommend that the Congress consider
the condition of the Navy, and that provision be made for the building of new ships. The captain of the ship stood
upon the deck and looked out over the sea; for many days the men had seen no whale, and the old man said nothing.
"""
PYTHON = '''\
class Shelf:
    """A list of books with a name."""

    def __init__(self, name, books=None):
        self.name = name
        self._books = list(books) if books is not None else []

    def __len__(self):
        return len(self._books)

    def find(self, title):
        for index, book in enumerate(self._books):
            if book.title == title:
                return index
        raise ValueError("no such book: %r" % title)
'''


@pytest.fixture(scope="module", params=TINY_MODELS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(name):
    return AutoTokenizer.from_pretrained(resolve(name))


@torch.inference_mode()
def read(model, tokenizer, text: str) -> tuple[float, torch.Tensor]:
    """(perplexity, the share of the expert rows that each expert of each MoE layer gets, [layers, experts])."""
    routers = [m for n, m in model.named_modules() if n.endswith(".gate") and hasattr(m, "top_k")]
    chosen = {}
    handles = [r.register_forward_hook(lambda r, _, out: chosen.__setitem__(r, out[2])) for r in routers]
    ids = tokenizer(text, return_tensors="pt").input_ids
    loss = model(input_ids=ids, labels=ids).loss
    for handle in handles:
        handle.remove()
    loads = [torch.bincount(chosen[r].flatten(), minlength=r.num_experts) for r in routers]
    return math.exp(loss), torch.stack([load / load.sum() for load in loads])


def test_other_models_keep_their_path():
    assert resolve("./tiny-qwen3-moe") == "./tiny-qwen3-moe"
    assert resolve("Qwen/Qwen3-30B-A3B") == "Qwen/Qwen3-30B-A3B"


def test_each_model_is_a_small_complete_folder(name):
    folder = Path(resolve(name))
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in folder.iterdir()
    }
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 6_000_000


def test_the_config_says_what_lmdeploy_reads():
    config = json.loads(Path(resolve("tiny-deepseek-v3"), "config.json").read_text())
    assert (config["moe_layer_freq"], config["scoring_func"], config["topk_method"]) == (
        1,
        "sigmoid",
        "noaux_tc",
    )


def test_experts_can_be_shared_out_to_1_2_and_4_ranks(model):
    experts = model.config.num_local_experts
    assert experts >= 16
    assert experts % 4 == 0


@pytest.mark.parametrize("text", [PROSE, PYTHON], ids=["prose", "python"])
def test_the_tokenizer_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("text", [PROSE, PYTHON], ids=["prose", "python"])
def test_each_model_reads_both_kinds_of_text(model, tokenizer, text):
    perplexity, _ = read(model, tokenizer, text)
    assert perplexity < model.config.vocab_size / 20


@pytest.mark.parametrize("text", [PROSE, PYTHON], ids=["prose", "python"])
def test_routing_is_skewed_in_every_layer(model, tokenizer, text):
    _, shares_LE = read(model, tokenizer, text)
    busiest_over_mean_L = shares_LE.max(dim=1).values * shares_LE.shape[1]
    assert (busiest_over_mean_L > 1.5).all(), busiest_over_mean_L


def test_routing_shifts_with_the_topic(model, tokenizer):
    _, prose_LE = read(model, tokenizer, PROSE)
    _, python_LE = read(model, tokenizer, PYTHON)
    total_variation_L = (prose_LE - python_LE).abs().sum(dim=1) / 2
    assert (total_variation_L > 0.25).all(), total_variation_L


def test_no_answer_of_the_demo_says_four_tokens_twice(name):
    for prompt, answer in zip(PROMPTS, greedy_tokens(resolve(name), PROMPTS, 40), strict=True):
        said = list(zip(*(answer[first:] for first in range(4)), strict=False))
        assert len(set(said)) == len(said) == 37, prompt


def test_an_answer_ends_at_the_end_of_a_document(model, tokenizer):
    assert tokenizer.eos_token == "<|endoftext|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_chat_continues_the_running_text(tokenizer):
    turns = [("user", "Call me"), ("assistant", " Ishmael."), ("user", "Some years ago")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "Call me\n Ishmael.\nSome years ago"
