"""What is wrong with the files of a checkpoint is said by name, before anything is started."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import epbackend
from epbackend import EPConfig
from epbackend.checkpoint import check_checkpoint, dense_layers, expert_count, layer_count, read_model_config
from epbackend.engines.lmdeploy.checks import check_deployment
from epbackend.errors import ConfigError, UnavailableError
from epbackend.models import TINY_MODELS, resolve
from epbackend.placement.formats import write
from epbackend.placement.loads import Loads
from epbackend.placement.placement import Placement

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path):
    """A copy of a packaged model, to break."""
    return shutil.copytree(resolve("tiny-qwen3-moe"), tmp_path / "model")


@pytest.fixture
def sharded(model):
    """The same in two files with an index."""
    tensors = load_file(model / WEIGHTS)
    names = sorted(tensors)
    parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, model / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (model / WEIGHTS).unlink()
    return model


def refused(model, said):
    with pytest.raises(UnavailableError, match=said):
        check_checkpoint(str(model))


def rewrite(model, change):
    """The weights with other tensors."""
    tensors = load_file(model / WEIGHTS)
    change(tensors)
    save_file(tensors, model / WEIGHTS)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_whole_checkpoint_passes(name):
    check_checkpoint(resolve(name))


def test_a_sharded_checkpoint_passes(sharded):
    check_checkpoint(str(sharded))


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_a_file_that_is_cut_off_is_named(model, kept):
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:kept])
    refused(model, r"model\.safetensors is cut off")


def test_a_file_that_is_too_long_or_none_at_all_is_named(model):
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes() + b"x")
    refused(model, r"model\.safetensors is too long")
    (model / WEIGHTS).write_bytes(b"<!DOCTYPE html><html>not found</html>")
    refused(model, r"model\.safetensors is no safetensors file")


def test_a_pointer_of_git_lfs_is_named(model):
    (model / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(model, r"model\.safetensors is a pointer of Git LFS.*git lfs pull")


def test_shards_that_are_missing_or_lack_tensors_are_named(sharded):
    shutil.copy(sharded / "a.safetensors", sharded / "b.safetensors")
    refused(
        sharded,
        r"b\.safetensors lacks model\..* and \d+ more, which model\.safetensors\.index\.json promises",
    )
    (sharded / "b.safetensors").unlink()
    refused(sharded, r"lacks b\.safetensors of the 2 files in model\.safetensors\.index\.json")
    (sharded / INDEX).write_text('{"metadata": {}}')
    refused(sharded, "index.json is no index")


def test_no_weights_are_named_unless_they_come_later(model):
    (model / WEIGHTS).unlink()
    refused(model, "has no weights: LMDeploy looks for model.safetensors")
    check_checkpoint(str(model), weights=False)


@pytest.mark.parametrize("kept", [None, 10, -100])
def test_pickled_weights_are_looked_at_too(model, kept):
    (model / WEIGHTS).unlink()
    torch.save({"x": torch.zeros(100)}, model / "pytorch_model.bin")
    if kept is None:
        check_checkpoint(str(model))
        return
    (model / "pytorch_model.bin").write_bytes((model / "pytorch_model.bin").read_bytes()[:kept])
    refused(model, r"pytorch_model\.bin is cut off")


def test_experts_without_their_tensors_are_named(model):
    expert = "model.layers.1.mlp.experts.3."
    rewrite(model, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(expert)])
    refused(model, r"model\.layers\.1\.mlp lacks down_proj\.weight, .* of experts 3,")


def test_quantized_weights_without_their_config_are_refused(model):
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    rewrite(model, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    refused(
        model, "no quantization_config, but model.layers.0.mlp.experts.0.up_proj.weight are stored as F8_E4M3"
    )


def test_a_model_without_a_tokenizer_is_refused(model):
    (model / "tokenizer.json").write_text("")
    refused(model, r"tokenizer\.json is empty")
    (model / "tokenizer.json").unlink()
    refused(model, "has no tokenizer")


def test_pipelines_and_servers_look_before_anything_starts(model):
    (model / WEIGHTS).write_bytes(b"")
    for start in (epbackend.pipeline, epbackend.serve):
        with pytest.raises(UnavailableError, match="is cut off"):
            start(str(model), EPConfig.load({"device": "cpu", "ep_size": 2}))


def test_the_command_says_it_in_one_line_and_loads_nothing_before(model):
    (model / WEIGHTS).write_bytes(b"")
    script = (
        "import sys; from epbackend.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, 'lmdeploy' in sys.modules)\n"
    )
    command = [sys.executable, "-c", script, "serve", str(model), "--device", "cpu", "--ep-size", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert [line for line in result.stderr.splitlines() if line.startswith("error:")] == [
        f"error: {model / WEIGHTS} is cut off (0 bytes)"
    ]
    assert "Traceback" not in result.stderr
    assert result.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("settings", "dense"),
    [
        ({"num_hidden_layers": 4}, ()),
        ({"num_hidden_layers": 4, "first_k_dense_replace": 2}, (0, 1)),
        (
            {"text_config": {"num_hidden_layers": 4, "first_k_dense_replace": 1, "moe_layer_freq": 2}},
            (0, 1, 3),
        ),
        ({"num_hidden_layers": 4, "moe_layer_freq": [0, 1, 1, 0]}, (0, 3)),
        ({"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}, (0,)),
        ({"text_config": {"num_hidden_layers": 4, "interleave_moe_layer_step": 2}}, (0, 2)),
        ({"text_config": {"num_hidden_layers": 3, "moe_layers": [1, 2]}}, (0,)),
        ({"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}, (0, 2, 3)),
    ],
)
def test_dense_layers_are_known_from_the_config(settings, dense):
    assert dense_layers(settings) == dense


def test_loads_and_maps_are_held_against_the_dense_layers(tmp_path):
    """tiny-deepseek-v3 has experts in its layers 1 and more."""
    model = resolve("tiny-deepseek-v3")
    settings = read_model_config(Path(model))
    layers, experts = layer_count(settings), expert_count(settings)
    assert dense_layers(settings) == (0,)

    def placed(**placement):
        config = EPConfig.load({"device": "cpu", "ep_size": 2, "placement": placement})
        return check_deployment(model, config, serving=False)

    shifted = np.ones((layers, experts)) * (np.arange(layers) < layers - 1)[:, None]
    write(Loads.of(shifted), tmp_path / "shifted.json", "sglang")
    with pytest.raises(
        ConfigError, match=r"loads: layer 0 has tokens, but .* numbered without the dense ones"
    ):
        placed(loads=[str(tmp_path / "shifted.json")])

    even = Placement.even(layers, experts, 2, experts)
    write(even, tmp_path / "map.json", "mindie", dense_layers=(0,))
    assert placed(file=str(tmp_path / "map.json")).layers == even.layers
