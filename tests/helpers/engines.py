"""Engines of tests: their settings, and requests to their server."""

from __future__ import annotations

import time
from typing import Any

import requests
from lmdeploy import GenerationConfig

from epbackend import EPConfig
from epbackend.engines.lmdeploy.processes import LOOPBACK
from tests.helpers.engine_models import NEW_TOKENS
from tests.helpers.patience import PATIENCE_S

GREEDY = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, ignore_eos=True)

EAGER = {"on": True, "redundant_experts": 4, "window_steps": 8, "interval_s": 0.2, "threshold": 0.0}
"""Plans anew whenever it can, on the load of a few steps."""


def config(engine: dict[str, Any] | None = None, **settings: Any) -> EPConfig:
    """Settings of an engine on the CPU, quiet and with short sessions."""
    common = {"log_level": "ERROR", "session_len": 400}
    return EPConfig.load({"device": "cpu", "engine": common | (engine or {})} | settings)


def balanced(
    engine: dict[str, Any] | None = None, balance: dict[str, Any] | None = None, **settings: Any
) -> EPConfig:
    """Settings of an engine whose experts move."""
    return config(engine, balance=EAGER | (balance or {}), **settings)


def await_model(port: int, host: str = LOOPBACK) -> None:
    """Return when the server at `port` answers with a model."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            if len(requests.get(f"http://{host}:{port}/v1/models", timeout=5).json()["data"]) >= 1:
                return
        except (requests.ConnectionError, requests.Timeout):
            pass
        time.sleep(0.3)
    raise AssertionError("the server does not know its model")


def complete(port: int, text: str, host: str = LOOPBACK) -> str:
    """What the server at `port` says after `text`: NEW_TOKENS tokens, greedily."""
    request = {
        "model": "tiny",
        "prompt": text,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    response = requests.post(f"http://{host}:{port}/v1/completions", json=request, timeout=PATIENCE_S)
    said = response.json()
    assert "choices" in said, said
    return said["choices"][0]["text"]
