"""TurboMind from the same config: sizes by its rules; what it has not is refused by name; no start without a GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import lmdeploy
import pytest
import torch

import epbackend
from epbackend import EPConfig
from epbackend.config.lmdeploy_fields import TURBOMIND_FIELDS_SET_BY_US
from epbackend.engines.lmdeploy import turbomind
from epbackend.engines.lmdeploy.server.front import Front
from epbackend.errors import ConfigError, UnavailableError
from epbackend.models import resolve

pytestmark = [pytest.mark.cpu, pytest.mark.engine]


def config(engine=None, **settings) -> EPConfig:
    return EPConfig.load({"engine": {"backend": "turbomind"} | (engine or {})} | settings)


@pytest.fixture(scope="module")
def rules():
    """LMDeploy's own module, by its path: no compiled part is needed for it."""
    path = Path(lmdeploy.__file__).parent / "turbomind" / "parallel_config.py"
    spec = importlib.util.spec_from_file_location("parallel_config", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("free", [None, 64])
def test_sizes_are_those_that_turbomind_itself_derives(rules, free):
    for ep in (1, 2, 4, 6, 8, 16, 32):
        for dp in (dp for dp in range(1, ep + 1) if ep % dp == 0):
            sizes = turbomind.parallel_sizes(config({"dp": dp}, ep_size=ep))
            derived = rules.derive_parallel_config(
                cp=1, **sizes | {"device_num": None}, available_devices=free
            )
            assert derived.device_num == sizes["device_num"] == ep
            assert (derived.mlp_ep_size, derived.mlp_tp_size, derived.outer_dp_size) == (ep, 1, 1)
            assert (derived.attn_dp_size, derived.attn_tp_size) == (dp, ep // dp)
    for tp in (1, 2, 8):
        sizes = turbomind.parallel_sizes(config({"tp": tp}))
        assert rules.derive_parallel_config(cp=1, **sizes).mlp_tp_size == tp


def test_the_config_of_turbomind_holds_what_ours_says():
    engine = {
        "dp": 2, "dtype": "bfloat16", "session_len": 4096, "max_batch_size": 64, "max_prefill_token_num": 1024,
        "cache_max_entry_count": 0.5, "block_size": 128, "enable_prefix_caching": True,
        "extra": {"communicator": "cuda-ipc", "quant_policy": 8},
    }  # fmt: skip
    made = dataclasses.asdict(turbomind.engine_config(config(engine, ep_size=8)))
    wanted = {
        "ep": 8, "dp": 2, "tp": 4, "device_num": 8, "dtype": "bfloat16", "session_len": 4096, "max_batch_size": 64,
        "max_prefill_token_num": 1024, "cache_max_entry_count": 0.5, "cache_block_seq_len": 128,
        "enable_prefix_caching": True, "communicator": "cuda-ipc", "quant_policy": 8,
    }  # fmt: skip
    assert {name: made[name] for name in wanted} == wanted
    assert TURBOMIND_FIELDS_SET_BY_US.keys() <= made.keys()
    assert turbomind.engine_config(config({"extra": {"cp": 2}}, ep_size=8)).tp == 4
    with pytest.raises(ConfigError, match=r"engine.extra: TurboMind refuses it: config requires 2 devices"):
        turbomind.engine_config(config({"extra": {"cp": 3}}, ep_size=8))
    with pytest.raises(ConfigError, match=r"engine.extra: TurboMind refuses it"):
        turbomind.engine_config(config({"extra": {"quant_policy": 3}}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ep_level": 2}, "ep_level: is for LMDeploy's PyTorch engine"),
        ({"dispatcher": "alltoall", "ep_level": 2}, "dispatcher: is for"),
        ({"dispatch_dtype": "int8"}, "dispatch_dtype: is for"),
        ({"placement": {"file": "x.json"}}, "placement: .*epbackend renumber MODEL --loads FILE --ranks 8"),
        (
            {"balance": {"on": True}},
            "balance: .*block of experts in order, without copies.*epbackend renumber",
        ),
        ({"device": "cpu"}, "device: must be cuda or auto"),
        ({"engine": {"backend": "turbomind", "cache_gb": 1.0}}, "engine.cache_gb: is for"),
        ({"engine": {"backend": "turbomind", "eager_mode": True}}, "engine.eager_mode: is for"),
        ({"engine": {"backend": "turbomind", "dtype": "float32"}}, "engine.dtype: TurboMind has bfloat16"),
        ({"engine": {"backend": "turbomind", "extra": {"tp": 2}}}, "use engine.tp instead"),
        (
            {"engine": {"backend": "turbomind", "extra": {"prefill_interval": 2}}},
            "TurbomindEngineConfig has no field",
        ),
    ],
)
def test_what_turbomind_has_not_is_refused_by_name(settings, said):
    with pytest.raises(ConfigError, match=said):
        EPConfig.load({"ep_size": 8, "engine": {"backend": "turbomind"}} | settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_that_is_said_before_anything_is_loaded():
    said = "engine.backend: turbomind needs a CUDA GPU"
    with pytest.raises(UnavailableError, match=said):
        epbackend.pipeline("a/model-that-would-be-downloaded", config(ep_size=2))
    with pytest.raises(UnavailableError, match=said):
        epbackend.serve("a/model-that-would-be-downloaded", config(ep_size=2), port=0)
    command = [
        sys.executable,
        "-m",
        "epbackend",
        "serve",
        "tiny-qwen3-moe",
        "--set",
        "engine.backend=turbomind",
    ]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (ended.returncode, said in ended.stderr, "Traceback" in ended.stderr) == (2, True, False)


def test_a_compiled_part_that_does_not_load_is_said_with_its_reason():
    from lmdeploy import turbomind as theirs

    if theirs.is_available():
        pytest.skip("TurboMind loads on this machine")
    with pytest.raises(UnavailableError, match=r"compiled TurboMind does not load: .*\.so"):
        turbomind.check_extension()


def test_models_that_turbomind_cannot_run_are_refused():
    with pytest.raises(ConfigError, match="TurboMind does not know the model at"):
        turbomind.check_model(resolve("tiny-deepseek-v3"), config())
    with pytest.raises(ConfigError, match="ep_size: 3 does not divide the 32 experts"):
        turbomind.check_model(resolve("tiny-qwen3-moe"), config(ep_size=3))
    turbomind.check_model(resolve("tiny-qwen3-moe"), config(ep_size=4))


def test_what_belongs_to_the_other_engine_is_refused():
    with pytest.raises(ConfigError, match="takes no plug"):
        epbackend.enable(config())
    for asked in ({"record": Path("x")}, {"restart": 1}, {"drain_seconds": 1.0}):
        (name,) = asked
        with pytest.raises(ConfigError, match=f"{name}: LMDeploy's server with TurboMind cannot"):
            turbomind.serve("tiny-qwen3-moe", config(), "127.0.0.1", 0, Front(), **asked)
