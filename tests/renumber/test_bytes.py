"""What `renumber` writes, byte for byte: experts under new numbers, all else as it was, and the way back."""

from __future__ import annotations

import json
import re
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epbackend.errors import ConfigError, UnavailableError
from epbackend.placement.loads import Loads
from epbackend.placement.renumbering import FILE, Renumbering
from epbackend.renumber import Checkpoint, Plan, plan_renumbering, plan_undoing, router_groups, write
from tests.helpers.raw_checkpoint import FORMS, all_bytes, model_of, read_model, write_model

pytestmark = pytest.mark.cpu

LAYERS, EXPERTS = 2, 4


def loads(seed: int = 0, layers: int = LAYERS, experts: int = EXPERTS) -> Loads:
    """Of a dense layer and others with experts."""
    tokens_YE = np.random.default_rng(seed).integers(1, 1000, (layers + 1, experts)).astype(float)
    tokens_YE[0] = 0
    return Loads.of(tokens_YE, ["recorded"])


def saved(folder, form="fp8-blocks", **settings):
    tensors = model_of(form, LAYERS, EXPERTS)
    return write_model(folder, tensors, experts=EXPERTS, layers=LAYERS + 1, **settings)


def plan(model, seed=0, ranks=2, **asked):
    return plan_renumbering(str(model), loads(seed), ranks=ranks, **asked)


@settings(max_examples=25)
@given(
    form=st.sampled_from(list(FORMS)),
    files=st.integers(1, 4),
    experts=st.sampled_from([2, 12]),  # 9 and 10 have names of unequal length
    seed=st.integers(0, 99),
    indent=st.sampled_from([None, 1]),
    padding=st.integers(0, 40),
    again=st.booleans(),
)
def test_undoing_gives_every_byte_back(tmp_path_factory, form, files, experts, seed, indent, padding, again):
    folder = tmp_path_factory.mktemp("model")
    tensors = model_of(form, LAYERS, experts, seed)
    model = write_model(
        folder / "old", tensors, experts=experts, layers=LAYERS + 1,
        files=files, seed=seed, indent=indent, padding=padding,
    )  # fmt: skip
    write(plan_renumbering(str(model), loads(seed, experts=experts), ranks=2), folder / "new")
    last = folder / "new"
    if again:
        last = folder / "newer"
        write(plan_renumbering(str(folder / "new"), loads(seed + 1, experts=experts), ranks=2), last)

    old_YE = Renumbering.beside(last).old_YE
    assert read_model(last) == renumbered(tensors, old_YE)
    write(plan_undoing(str(last)), folder / "back")
    assert all_bytes(folder / "back") == all_bytes(model)


def renumbered(tensors, old_YE):
    """By its own, slow, rules: what each tensor must hold."""
    found = {}
    for name, stored in tensors.items():
        layer = re.match(r"model\.layers\.(\d+)\.mlp\.", name)
        old_E = old_YE[int(layer[1])].tolist() if layer else []
        if layer and (one := re.search(r"experts\.(\d+)\.", name)):
            new = old_E.index(int(one[1]))
            found[name.replace(one[0], f"experts.{new}.")] = stored
        elif layer and re.search(r"(\.experts|\.gate|\.router|moe_statics)\.", name):
            size = len(stored.content) // len(old_E)
            rows = [stored.content[old * size : (old + 1) * size] for old in old_E]
            found[name] = type(stored)(stored.dtype, stored.shape, b"".join(rows))
        else:
            found[name] = stored
    return found


@pytest.mark.parametrize(
    ("settings", "groups"),
    [
        ({}, 1),
        ({"n_group": 8, "topk_group": 4}, 8),
        ({"n_group": 8, "topk_group": 8}, 1),  # all of them
        ({"n_group": 8, "topk_group": 3, "topk_method": "greedy"}, 1),
        ({"text_config": {"n_group": 4, "topk_group": 2}}, 4),
        ({"router_n_groups": 4}, 4),
        ({"router_n_groups": -1, "n_group": 2, "topk_group": 1}, 2),
    ],
)
def test_groups_of_the_router_are_those_that_limit_it(settings, groups):
    assert router_groups(settings) == groups


def test_undoing_in_two_steps_leaves_no_longer_header(tmp_path):
    model = saved(tmp_path / "old", files=3)
    there = plan(model)
    write(there, tmp_path / "new")
    middle = Checkpoint.read(str(tmp_path / "new"))
    again = Renumbering(np.tile(np.arange(EXPERTS), (LAYERS + 1, 1)), headers=middle.renumbering.headers)
    write(Plan(middle, middle.renumbering.new_YE, again), tmp_path / "newer")
    write(plan_undoing(str(tmp_path / "newer")), tmp_path / "back")
    assert all_bytes(tmp_path / "back") == all_bytes(model)


def test_files_in_which_nothing_changes_are_linked_and_other_weights_left_out(tmp_path):
    model = saved(tmp_path / "old", files=40)
    (model / "pytorch_model.bin").write_bytes(b"weights with the old numbers")
    (model / "original").mkdir()
    (model / "original" / "consolidated.00.pth").write_bytes(b"so has this")
    written = write(plan(model), tmp_path / "new")
    assert written.left_out == ("pytorch_model.bin", "original/consolidated.00.pth")
    same = [file for file in model.glob("*.safetensors") if file.samefile(tmp_path / "new" / file.name)]
    assert written.linked == len(same) > 0
    assert (tmp_path / "new" / "figures" / "note.txt").read_text() == "kept"


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_draft_layer_stays_in_order(tmp_path, ranks):
    tensors = model_of("fp8-blocks", LAYERS + 1, EXPERTS)  # one layer more than config.json says
    tensors |= {f"mtp.{name}": stored for name, stored in tensors.items() if ".layers.1." in name}
    model = write_model(tmp_path / "old", tensors, experts=EXPERTS, layers=LAYERS + 1)
    write(plan(model, ranks=ranks), tmp_path / "new")
    found = read_model(tmp_path / "new")
    drafts = [name for name in tensors if f"layers.{LAYERS + 1}." in name or name.startswith("mtp.")]
    assert drafts
    assert all(found[name] == tensors[name] for name in drafts)


def test_a_disk_that_is_full_leaves_nothing(tmp_path):
    model = saved(tmp_path / "old")
    whole = (model / "model.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole // 2, before[1]))  # as if there were no more space
    try:
        with pytest.raises(ConfigError, match="could not be written: File too large; nothing is left"):
            write(plan(model), tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_folder_that_exists_is_never_touched(tmp_path):
    model = saved(tmp_path / "old")
    (tmp_path / "new").mkdir()
    for out, said in (
        (tmp_path / "new", "exists"),
        (model / "new", "is in the folder that is read"),
        (tmp_path / "none" / "new", "there is no folder"),
    ):
        with pytest.raises(ConfigError, match=said):
            write(plan(model), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
    assert list((tmp_path / "new").iterdir()) == []


def changed(**more):
    return lambda tensors: tensors | more


def without(pattern):
    return lambda tensors: {name: stored for name, stored in tensors.items() if not re.search(pattern, name)}


def other(name, dtype="BF16", shape=(7, 3)):
    tensors = model_of("fp8-blocks", 1, EXPERTS)
    content = bytes(int(np.prod(shape)) * 2)
    return changed(**{name: type(next(iter(tensors.values())))(dtype, shape, content)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other("model.layers.1.mlp.gate.tid2eid"), r"gate.tid2eid: BF16 \[7, 3\] .*not known"),
        (other("model.layers.1.mlp.gate.qweight"), "gate.qweight: .*not known"),
        (other("model.layers.1.mlp.experts.w1"), r"experts.w1: BF16 \[7, 3\]"),
        (other("model.layers.1.mlp.gate.weight"), "gate.weight: .*not known"),
        (other("model.layers.1.mlp.experts.4.down_proj.weight"), "config.json says 4 experts"),
        (other("talker.layers.1.mlp.experts.gate_up_proj"), "several stacks of layers"),
        (without(r"layers\.2\.mlp\.gate\.weight"), "layers.2.mlp: has experts, but no router of its own"),
        (without(r"layers\.2\.mlp\."), "layer 2 has tokens, but .* no experts there"),
    ],
)
def test_forms_that_might_carry_numbers_are_refused_by_name(tmp_path, change, said):
    tensors = change(model_of("fp8-blocks", LAYERS, EXPERTS))
    model = write_model(tmp_path / "old", tensors, experts=EXPERTS, layers=LAYERS + 1)
    with pytest.raises(ConfigError, match=said):
        plan(model)


@pytest.mark.parametrize(
    ("settings", "asked", "recorded", "said"),
    [
        ({"num_experts": 0}, {}, {}, "without experts"),
        ({}, {}, {"layers": 5}, "loads: they have 6 layers, but .* has 3"),
        ({}, {}, {"experts": 8}, "loads: they have 8 experts, but .* has 4"),
        ({}, {"ranks": 3}, {}, "ranks: 3 do not divide the 4 experts"),
        ({}, {"ranks": 0}, {}, "ranks: must be"),
        ({}, {"nodes": 3}, {}, "nodes: 3 do not divide the 2 ranks"),
        (
            {"quantization_config": {"ignore": ["model.layers.1.mlp.experts.3.down_proj"]}}, {}, {},
            "names an expert by its number",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(tmp_path, settings, asked, recorded, said):
    model = saved(tmp_path / "old")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(ConfigError, match=said):
        plan_renumbering(str(model), loads(**recorded), **({"ranks": 2} | asked))


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path):
    model = saved(tmp_path / "old")
    with pytest.raises(ConfigError, match=f"no {FILE}: it was not renumbered"):
        plan_undoing(str(model))
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:-5])
    with pytest.raises(UnavailableError, match="cut off"):
        plan(model)
