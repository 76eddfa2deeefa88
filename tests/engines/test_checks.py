"""What cannot work is refused before anything starts, and the message names the setting and the way out."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import lmdeploy
import pytest
import torch
from lmdeploy.pytorch.engine.executor.base import ExecutorBase
from safetensors.torch import save_file

import epbackend
from epbackend import EPConfig
from epbackend.checkpoint import expert_count
from epbackend.device.base import Memory
from epbackend.device.cpu import CpuDevice
from epbackend.engines.lmdeploy import checks, lmdeploy_config, plug
from epbackend.engines.lmdeploy.architectures import LACKING
from epbackend.engines.lmdeploy.checks import GIB
from epbackend.engines.lmdeploy.patches.engine import cache_blocks
from epbackend.engines.transformers import distributed_config
from epbackend.errors import ConfigError, EPError, UnavailableError
from tests.helpers.processes import engine_workers


def two_ranks(**engine) -> EPConfig:
    return EPConfig.load({"device": "cpu", "ep_size": 2, "engine": engine})


def one_rank(**engine) -> EPConfig:
    return EPConfig.load({"device": "cpu", "engine": engine})


@pytest.fixture
def write_model(tmp_path):
    def write(**settings):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        (tmp_path / "tokenizer.json").write_text("{}")
        save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
        return str(tmp_path)

    return write


def refused(model: str, config: EPConfig, error: type[EPError], match: str) -> None:
    with pytest.raises(error, match=match):
        epbackend.pipeline(model, config)
    assert engine_workers() == []


@pytest.mark.parametrize("config", [{"ep_size": 2}, "config.yaml", None], ids=["mapping", "path", "nothing"])
@pytest.mark.parametrize(
    "call",
    [
        partial(epbackend.pipeline, "tiny-qwen3-moe"),
        partial(epbackend.serve, "tiny-qwen3-moe"),
        epbackend.enable,
        lmdeploy_config.engine_config,
        distributed_config,
    ],
    ids=["pipeline", "serve", "enable", "engine_config", "distributed_config"],
)
def test_calls_that_take_a_config_say_how_to_load_one(call, config):
    with pytest.raises(ConfigError, match=r"config: must be an EPConfig, not .*EPConfig\.load"):
        call(config)


def test_a_model_that_is_not_there_is_refused(tmp_path):
    refused(str(tmp_path / "nowhere"), two_ranks(), UnavailableError, "there is no model at .*nowhere")


def test_a_folder_without_a_model_is_refused(tmp_path):
    refused(str(tmp_path), two_ranks(), UnavailableError, r"no config\.json")


def test_a_model_whose_config_is_not_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    refused(str(tmp_path), two_ranks(), UnavailableError, "not JSON")


def test_a_dense_model_on_two_ranks_is_refused(checkpoint):
    refused(
        str(checkpoint("dense")), two_ranks(), ConfigError, "ep_size: 2.*without experts.*Qwen3ForCausalLM"
    )


@pytest.mark.parametrize("architecture", sorted(checks.UNPATCHABLE_MODELS))
def test_a_model_with_experts_of_its_own_is_refused_on_two_ranks(write_model, monkeypatch, architecture):
    model = write_model(n_routed_experts=8, architectures=[architecture])
    monkeypatch.setattr(checks, "get_device", lambda _: SimpleNamespace(name="cuda"))
    refused(model, two_ranks(), ConfigError, f"ep_size: 2.*{architecture}.*use ep_size: 1")
    checks.check_model(model, EPConfig.load({"device": "cpu"}))


@pytest.mark.parametrize("architecture", sorted(LACKING["cpu"]))
def test_a_model_whose_operators_a_device_lacks_is_refused(write_model, architecture):
    model = write_model(n_routed_experts=8, architectures=[architecture])
    refused(model, one_rank(), ConfigError, f"device: cpu cannot run {architecture}: .*device: cuda")


@pytest.mark.parametrize(
    "named",
    [
        {"architectures": ["OlmoeForCausalLM"]},
        {"architectures": ["GraniteMoeForCausalLM"]},
        {"auto_map": {"AutoModelForCausalLM": "modeling.MiniMaxM2ForCausalLM"}},
    ],
)
def test_a_model_that_lmdeploy_does_not_have_is_refused(write_model, named):
    model = write_model(num_experts=8, **named)
    refused(model, two_ranks(), ConfigError, r"LMDeploy .* has no (Olmoe|GraniteMoe|MiniMaxM2)ForCausalLM")


def test_lora_is_refused_on_the_cpu(checkpoint):
    settings = one_rank(extra={"adapters": {"one": "nowhere"}})
    refused(str(checkpoint("qwen3-moe")), settings, ConfigError, "adapters: device cpu .*merge")


def test_lora_is_refused_on_ascend(monkeypatch):
    monkeypatch.setattr(checks, "get_device", lambda name: SimpleNamespace(name=name))
    with pytest.raises(ConfigError, match=r"adapters: device ascend .*merge"):
        checks.check_adapters(EPConfig.load({"device": "ascend"}), {"one": "nowhere"})


def test_drafted_tokens_are_refused_on_the_cpu(checkpoint):
    drafts = lmdeploy.messages.SpeculativeConfig(method="deepseek_mtp")
    with pytest.raises(ConfigError, match=r"speculative_config: .*deepseek_mtp"):
        epbackend.pipeline(str(checkpoint("deepseek-v3")), two_ranks(), speculative_config=drafts)
    assert engine_workers() == []


def test_an_ep_size_that_does_not_divide_the_experts_is_refused(write_model):
    model = write_model(num_experts=9, architectures=["Qwen3MoeForCausalLM"])
    refused(model, two_ranks(), ConfigError, "ep_size: 2 does not divide the 9 experts.*1, 3, 9")


def test_a_quantized_checkpoint_is_refused_on_the_cpu(write_model):
    model = write_model(n_routed_experts=8, quantization_config={"quant_method": "fp8"})
    refused(model, two_ranks(), ConfigError, "cpu.*unquantized.*blocked FP8")


@pytest.mark.parametrize(
    ("quantized", "form"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "blocked FP8"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "FP8 with one scale a tensor"),
        ({"quant_method": "smooth_quant"}, "W8A8"),
        ({"quant_method": "smooth_quant", "quant_dtype": "float8_e4m3fn"}, "smooth_quant"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_each_device_spreads_its_forms_of_experts_alone(write_model, monkeypatch, quantized, form):
    """What LMDeploy alone computes is left to it, on ranks that all hold every expert."""
    assert checks.form_of_experts({"quantization_config": quantized}) == form
    model = write_model(n_routed_experts=8, quantization_config=quantized)
    for device, spread in checks.SPREAD.items():
        monkeypatch.setattr(checks, "get_device", lambda _, name=device: SimpleNamespace(name=name))
        if form in spread:
            checks.check_model(model, two_ranks())
            continue
        with pytest.raises(ConfigError, match=f"{form}.*use"):
            checks.check_model(model, two_ranks())
        if device != "cpu":
            checks.check_model(model, EPConfig.load({"device": "cpu"}))


@pytest.mark.parametrize(
    ("quantized", "form"), [({}, "unquantized"), ({"quant_method": "smooth_quant"}, "W8A8")]
)
def test_fast_sums_of_float8_are_refused_where_no_expert_is_float8(write_model, monkeypatch, quantized, form):
    monkeypatch.setattr(checks, "get_device", lambda _: SimpleNamespace(name="cuda"))
    model = write_model(n_routed_experts=8, **({"quantization_config": quantized} if quantized else {}))
    config = EPConfig.load({"device": "cuda", "kernels": "triton_fast_fp8"})
    with pytest.raises(ConfigError, match=rf"^kernels: triton_fast_fp8 .*{form} ones; write triton"):
        checks.check_model(model, config)


@pytest.mark.parametrize(
    ("kernels", "split"), [("reference", "even"), ("grouped_mm", "level"), ("grouped_mm", "level_by_node")]
)
def test_kernels_that_wait_for_the_host_are_refused_where_graphs_are_captured(kernels, split):
    settings = {"device": "cuda", "ep_size": 2, "kernels": kernels}
    settings["placement"] = {"loads": "loads.json", "split": split, "node_size": 1}
    with pytest.raises(
        ConfigError, match=f"kernels: {kernels} .* set engine.eager_mode: true, or kernels: triton"
    ):
        plug.enable(EPConfig.load(settings))
    checks.check_graphs(EPConfig.load(settings | {"engine": {"eager_mode": True}}))
    checks.check_graphs(EPConfig.load(settings | {"kernels": "triton"}))


def test_a_cache_larger_than_memory_is_refused(checkpoint):
    refused(
        str(checkpoint("qwen3-moe")),
        EPConfig.load({"device": "cpu", "engine": {"cache_gb": 1e6}}),
        ConfigError,
        r"engine\.cache_gb: 1e\+06 GiB.*not enough memory",
    )


def test_ranks_on_cpus_share_the_memory_of_their_machine(monkeypatch):
    monkeypatch.setattr(CpuDevice, "memory", lambda self, rank=0: Memory(80 * GIB, 10 * GIB))
    checks.check_cache(two_ranks(cache_gb=4.5))
    said = r"cache_gb: 5 GiB a rank, 10 GiB for the 2 ranks of this machine: .* 9\.00 GiB are free .* 4\.50 GiB a rank"
    with pytest.raises(ConfigError, match=said):
        checks.check_cache(two_ranks(cache_gb=5))
    # In a cluster the machines' shares are not known.
    monkeypatch.setenv("RAY_ADDRESS", "10.77.0.1:6379")
    checks.check_cache(two_ranks(cache_gb=5, executor="ray"))


@pytest.mark.parametrize("field", ["enable_eplb", "enable_microbatch"])
def test_lmdeploys_own_expert_parallelism_is_refused(checkpoint, field):
    refused(
        str(checkpoint("qwen3-moe")),
        two_ranks(extra={field: True}),
        ConfigError,
        rf"engine\.extra\.{field}.*remove",
    )


def test_float32_on_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(lmdeploy_config, "get_device", lambda _: SimpleNamespace(name="cuda"))
    config = EPConfig.load({"device": "cuda", "engine": {"dtype": "float32"}})
    with pytest.raises(ConfigError, match=r"engine\.dtype.*no float32 on device cuda; write bfloat16"):
        lmdeploy_config.engine_config(config)


def test_a_dense_model_runs_on_one_rank(checkpoint):
    config = EPConfig.load({"device": "cpu", "engine": {"session_len": 64}})
    with epbackend.pipeline(str(checkpoint("dense")), config) as pipe:
        assert pipe("hello").token_ids
        assert pipe.load().layers == ()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(checkpoint):
    config = EPConfig.load({"device": "cuda", "ep_size": 2})
    refused(str(checkpoint("qwen3-moe")), config, UnavailableError, "cuda")


def test_missing_packages_are_named(checkpoint, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name in ("ray", "fastapi") else name)
    with pytest.raises(UnavailableError, match=r"ray must be installed: pip install 'epbackend\[serve\]'"):
        checks.check_packages(two_ranks(dp=2), serving=False)
    with pytest.raises(UnavailableError, match="fastapi must be installed"):
        checks.check_packages(two_ranks(), serving=True)
    checks.check_packages(two_ranks(), serving=False)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"num_experts": 16}, 16),
        ({"n_routed_experts": 256, "n_shared_experts": 1}, 256),
        ({"text_config": {"num_local_experts": 8}}, 8),
        ({"n_routed_experts": None}, None),
        ({"hidden_size": 64}, None),
    ],
)
def test_expert_count_is_read_from_every_kind_of_config(settings, count):
    assert expert_count(settings) == count


def test_cache_blocks_fit_the_budget_and_the_memory():
    assert cache_blocks(GIB // 100, 100 * GIB, gigabytes=None, blocks=None) == 100
    assert cache_blocks(GIB // 100, GIB // 2, gigabytes=None, blocks=None) == 45
    assert cache_blocks(GIB // 100, GIB, gigabytes=None, blocks=None, sharing=2) == 45
    assert cache_blocks(GIB // 100, 100 * GIB, gigabytes=2.0, blocks=None) == 200
    assert cache_blocks(GIB // 100, 100 * GIB, gigabytes=None, blocks=77) == 77


@pytest.mark.parametrize(
    ("settings", "blocks"), [({"cache_gb": 2.0}, 200), ({}, 25), ({"cache_blocks": 77}, 77)]
)
def test_cache_of_an_accelerator_takes_the_budget_or_a_share_of_free_memory(monkeypatch, settings, blocks):
    """A budget where one is set, else LMDeploy's share of the free memory."""
    monkeypatch.setattr(plug, "get_device", lambda _: SimpleNamespace(name="cuda"))
    plug.enable(EPConfig.load({"device": "cuda", "engine": settings | {"cache_max_entry_count": 0.5}}))
    executor = ExecutorBase.__new__(ExecutorBase)
    executor.cache_config = SimpleNamespace(
        num_gpu_blocks=settings.get("cache_blocks", 0), cache_max_entry_count=0.5
    )
    free = GIB // 2 if blocks == 25 else 4 * GIB
    executor._update_num_gpu_blocks([free] * 2, [SimpleNamespace(total=GIB // 100)] * 2, None)
    assert executor.cache_config.num_gpu_blocks == blocks


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"gigabytes": 8.0, "blocks": None}, r"engine\.cache_gb: 8 GiB.*lower it"),
        ({"gigabytes": None, "blocks": 500}, r"engine\.cache_blocks: 500.*lower it"),
        (
            {"gigabytes": 2.0, "blocks": None, "sharing": 2},
            r"4 GiB for the 2 ranks.*1\.80 GiB a rank",
        ),
        ({"gigabytes": 0.01, "blocks": None}, r"engine\.cache_gb: 0\.01 GiB.*at least 16"),
        ({"gigabytes": None, "blocks": 3}, r"engine\.cache_blocks: 3.*at least 16"),
    ],
)
def test_cache_settings_that_cannot_work_are_refused(arguments, match):
    with pytest.raises(ConfigError, match=match):
        cache_blocks(GIB // 100, 4 * GIB, **arguments)
