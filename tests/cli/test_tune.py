"""`epbackend tune`: what it reads of a model, and what it says where it cannot run."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("triton", reason="triton is not installed")

from epbackend.cli import app
from epbackend.cli.tune import wanted
from epbackend.device import devices
from epbackend.errors import ConfigError, UnavailableError
from epbackend.kernels.triton.tuning import ExpertShape

DEEPSEEK = {
    "n_routed_experts": 256,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_experts_per_tok": 8,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
NESTED = {"text_config": {"num_local_experts": 16, "hidden_size": 5120, "intermediate_size": 8192}}


def model(folder, settings) -> str:
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


def test_experts_are_read_from_a_models_config(tmp_path):
    path, name = model(tmp_path, DEEPSEEK), tmp_path.name
    assert wanted(path, [], 8, None) == [(ExpertShape(name, 32, 7168, 2048), "fp8")]
    assert wanted(path, [], 1, "half") == [(ExpertShape(name, 256, 7168, 2048, top_k=8), "half")]
    model(tmp_path, NESTED)
    assert wanted(path, [], 1, None) == [(ExpertShape(name, 16, 5120, 8192), "half")]
    assert wanted("tiny-qwen3-moe", [], 2, None)[0][0].slots == 16


def test_shape_option_names_experts():
    assert wanted(None, ["16x7168x2048"], 1, None) == [(ExpertShape("16x7168x2048", 16, 7168, 2048), "half")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, [], 1, None), "name a model, or shapes by --shape"),
        (("tiny-qwen3-moe", ["1x2x3"], 1, None), "name a model, or shapes"),
        ((None, ["16x7168"], 1, None), "--shape 16x7168 is not SLOTSxHIDDENxINNER"),
    ],
)
def test_missing_or_malformed_experts_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        wanted(*arguments)


def test_weight_form_follows_the_checkpoints_quantization(tmp_path):
    for quantized, form in (({"quant_method": "smooth_quant"}, "int8"), (None, "half")):
        path = model(tmp_path, {**DEEPSEEK, "quantization_config": quantized})
        assert wanted(path, [], 1, None)[0][1] == form
    path = model(tmp_path, {**DEEPSEEK, "quantization_config": {"quant_method": "awq"}})
    with pytest.raises(ConfigError, match="do not multiply awq experts"):
        wanted(path, [], 1, None)
    assert wanted(path, [], 1, "half")[0][1] == "half"


def test_model_without_experts_or_files_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no experts, .* use --shape"):
        wanted(model(tmp_path, {"hidden_size": 64}), [], 1, None)
    with pytest.raises(UnavailableError, match="there is no model at"):
        wanted(str(tmp_path / "nowhere"), [], 1, None)


@pytest.mark.parametrize(
    ("interpreted", "reason"), [("0", "device cuda cannot be used"), ("1", "interprets")]
)
def test_tune_without_a_gpu_exits_with_the_reason(monkeypatch, interpreted, reason):
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    cuda = devices()["cuda"]
    if cuda.unavailable() is None and not cuda.emulated:
        pytest.skip("there is a GPU")
    done = CliRunner().invoke(app, ["tune", "tiny-qwen3-moe"])
    assert done.exit_code == 2
    assert reason in done.output
