"""Loads and placements in other programs' formats: round trips, what those programs read, what a format cannot say."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epbackend.errors import ConfigError
from epbackend.placement.formats import (
    LOADS,
    PLACEMENTS,
    ReadOptions,
    read,
    read_loads,
    read_placement,
    usage,
    write,
)
from epbackend.placement.loads import Loads
from epbackend.placement.placement import Layout, Placement, Provenance
from tests.helpers.patience import PATIENCE_S

COUNTS_YE = np.array([[0, 0, 0, 0], [5, 0, 2, 1], [1, 1, 1, 9]])
ONE = Loads.of(COUNTS_YE)
TWO = Loads.of([COUNTS_YE, COUNTS_YE * 2 + 0.5], ["prefill", "decode"])

PLAN = Placement(
    (
        Layout.even(4, 2, 6),
        Layout(((3, 1, 0), (2, 3, 1)), 4),
        Layout(((0, 2, 1), (1, 3, 0)), 4),
    ),
    provenance=Provenance("refined", ("a",), "0.1.0"),
)
ONE_EACH = Placement((Layout(((1,), (0,)), 2),))
UNEVEN = Placement((Layout(((3, 1, 0), (2, 3)), 4), Layout(((0, 2), (1, 3)), 4)))
TWICE = Placement((Layout(((0, 0, 1), (1, 2, 3)), 4),))


def on_ranks(placement):
    """What each rank holds, whatever the order of its slots."""
    return [[sorted(held) for held in layer.experts_of_rank] for layer in placement.layers]


WRITABLE_LOADS = [name for name, form in LOADS.items() if form.write]


@pytest.mark.parametrize("name", WRITABLE_LOADS)
def test_loads_come_back(tmp_path, name):
    write(ONE, tmp_path / "recorded", name)
    again = read_loads(tmp_path / "recorded")
    np.testing.assert_array_equal(again.tokens_WYE, ONE.tokens_WYE)
    assert again.names == ("recorded",)


@pytest.mark.parametrize("name", ["sglang", "csv", "npy"])
def test_windows_come_back(tmp_path, name):
    write(TWO, tmp_path / "recorded", name)
    again = read_loads(tmp_path / "recorded")
    np.testing.assert_array_equal(again.tokens_WYE, TWO.tokens_WYE)
    assert again.names == (TWO.names if name != "npy" else ("recorded 0", "recorded 1"))


@given(counts=st.lists(st.lists(st.floats(0, 2**40), min_size=3, max_size=3), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_any_counts_come_back(tmp_path_factory, counts):
    folder = tmp_path_factory.mktemp("formats")
    for name in WRITABLE_LOADS:
        write(Loads.of(np.array(counts)), folder / name, name)
        np.testing.assert_array_equal(read_loads(folder / name).tokens_WYE[0], counts)


def test_lmdeploy_takes_the_mixture_of_windows(tmp_path):
    write(TWO, tmp_path / "statistics.json", "lmdeploy")
    np.testing.assert_allclose(json.loads((tmp_path / "statistics.json").read_text()), TWO.mixture_YE())


def test_several_files_are_several_windows(tmp_path):
    write(ONE, tmp_path / "a.json", "sglang")
    write(ONE, tmp_path / "b.csv", "csv")
    loads = read_loads([tmp_path / "a.json", tmp_path / "b.csv"])
    assert (loads.windows, loads.names) == (2, ("a", "b"))


def test_steps_of_sglang_are_added_up(tmp_path):
    steps = np.stack([COUNTS_YE, np.zeros_like(COUNTS_YE), COUNTS_YE])
    (tmp_path / "a.json").write_text(json.dumps({"logical_count": steps.tolist(), "rank": 0}))
    np.testing.assert_array_equal(read_loads(tmp_path / "a.json").tokens_WYE, [2 * COUNTS_YE])


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_recordings_of_torch(tmp_path, shape):
    torch = pytest.importorskip("torch")
    count = torch.arange(np.prod(shape), dtype=torch.int32).reshape(shape)
    torch.save(
        {"rank": 0, "logical_count": count, "average_utilization_rate_over_window": 0.4}, tmp_path / "a.pt"
    )
    np.testing.assert_array_equal(read_loads(tmp_path / "a.pt").tokens_WYE[0], count.reshape(-1, 3, 4).sum(0))


def write_ranks(folder, ranks):
    """A file of each rank, which counted its own tokens; their paths."""
    for place, rank in enumerate(ranks):
        content = {"rank": rank, "logical_count": (COUNTS_YE * (place + 1)).tolist()}
        (folder / f"{place}.json").write_text(json.dumps(content))
    return [folder / f"{place}.json" for place in range(len(ranks))]


def test_files_of_a_rank_each_are_added_up_to_one_window(tmp_path):
    loads = read_loads(write_ranks(tmp_path, [1, 0, 2]))
    np.testing.assert_array_equal(loads.tokens_WYE, [6 * COUNTS_YE])


def test_files_of_rank_0_are_windows_because_it_writes_for_all(tmp_path):
    assert read_loads(write_ranks(tmp_path, [0, 0])).windows == 2


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([3], "of ranks 3"),
        ([0, 2], "of ranks 0, 2"),
        ([0, 1, 1], "of ranks 0, 1, 1"),
        ([0, "1"], "rank: must be"),
    ],
)
def test_files_of_some_ranks_only_are_refused(tmp_path, ranks, said):
    with pytest.raises(ConfigError, match=said):
        read_loads(write_ranks(tmp_path, ranks))


def hotspots(folder, npus=2, blocks=3, **config):
    """What MindIE leaves: running totals of each NPU's experts, a block every 8 steps."""
    folder.mkdir(exist_ok=True)
    settings = {"num_moe_layers": 3, "num_of_experts": 4, "num_of_selected_experts": [2], **config}
    (folder / "model_gen_config.json").write_text(json.dumps(settings))
    for rank, part_YL in enumerate(np.split(COUNTS_YE, npus, axis=1)):
        lines = [",".join(map(str, line)) for block in range(blocks) for line in part_YL * (block + 1)]
        (folder / f"decode_{rank}.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_the_last_block_of_mindies_hot_spots_is_the_load(tmp_path):
    folder = hotspots(tmp_path / "decode")
    (folder / "decode_topk_0.csv").write_text("1,2\n")
    loads = read_loads(folder)
    np.testing.assert_array_equal(loads.tokens_WYE, [3 * COUNTS_YE])
    assert loads.names == ("decode",)
    np.testing.assert_array_equal(loads.with_dense((0,)).tokens_WYE[0][1:], 3 * COUNTS_YE)


def test_hot_spots_of_a_server_that_was_started_again_are_added_up(tmp_path):
    folder = hotspots(tmp_path / "decode")
    for file in folder.glob("*.csv"):
        file.write_text(file.read_text() * 2)
    np.testing.assert_array_equal(read_loads(folder).tokens_WYE, [6 * COUNTS_YE])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "decode_0.csv").unlink(), "of NPUs 1; there must be one of each"),
        (
            lambda folder: (folder / "decode_1.csv").write_text("1,2\n"),
            "decode_1.csv: has 1 lines, no multiple",
        ),
        (
            lambda folder: (folder / "decode_1.csv").write_text("a,b\n" * 3),
            "decode_1.csv: line 1: 'a' is no number",
        ),
        (
            lambda folder: hotspots(folder, num_of_experts=5),
            "num_of_experts: 5, but the csv files have 4 columns",
        ),
        (lambda folder: hotspots(folder, eplb_expert_map_file="m"), "record without load balancing"),
        (lambda folder: hotspots(folder, num_moe_layers=0), "num_moe_layers: must be a whole number"),
    ],
)
def test_hot_spots_that_are_not_whole_are_refused(tmp_path, change, said):
    folder = hotspots(tmp_path / "decode")
    change(folder)
    with pytest.raises(ConfigError, match=said):
        read_loads(folder)


def test_counts_of_half_precision_are_added_up_without_loss(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"logical_count": torch.ones(5000, 2, 3, dtype=torch.bfloat16)}, tmp_path / "a.pt")
    assert (read_loads(tmp_path / "a.pt").tokens_WYE == 5000).all()


def expert_map(folder, numbers):
    """A map of layers with these layer_id; two devices, and another order of experts in each layer."""
    layers = [
        {
            "layer_id": number,
            "device_list": [{"device_expert": [place % 2]}, {"device_expert": [1 - place % 2]}],
        }
        for place, number in enumerate(numbers)
    ]
    (folder / "map.json").write_text(json.dumps({"moe_layer_count": len(layers), "layer_list": layers}))
    return folder / "map.json"


def test_layers_of_an_expert_map_are_taken_by_their_number(tmp_path):
    assert on_ranks(read_placement(expert_map(tmp_path, [1, 0]))) == [[[1], [0]], [[0], [1]]]


def test_numbers_that_an_expert_map_leaves_out_are_dense_layers(tmp_path):
    path = expert_map(tmp_path, [2, 3])
    for options in (ReadOptions(), ReadOptions(dense_layers=(0, 1)), ReadOptions(dense_layers=(1, 0, 1))):
        assert on_ranks(read_placement(path, options))[2:] == [[[0], [1]], [[1], [0]]]
        assert len(read_placement(path, options).layers) == 4
    behind = read_placement(path, ReadOptions(dense_layers=(4,)))
    assert behind.layers[:4] == read_placement(path).layers
    assert len(behind.layers) == 5
    with pytest.raises(ConfigError, match="dense_layers: 0 are given, but layer_id leaves out 0, 1"):
        read_placement(path, ReadOptions(dense_layers=(0,)))


@pytest.mark.parametrize(
    ("numbers", "said"),
    [([0, 0], "0 is there twice"), ([0, None], "whole number"), ([0, 10**9], "whole number")],
)
def test_numbers_of_layers_that_cannot_be_are_refused(tmp_path, numbers, said):
    with pytest.raises(ConfigError, match=said):
        read_placement(expert_map(tmp_path, numbers))


@pytest.mark.parametrize(
    "text",
    ["0,0\n5,2\n", "layer,expert,tokens\n1,1,2\n1,0,5\n", "\ufeffLayer, Expert, Tokens\n1,0,5\n1,1,2\n\n"],
)
def test_both_forms_of_csv(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    np.testing.assert_array_equal(read_loads(tmp_path / "a.csv").tokens_WYE, [[[0, 0], [5, 2]]])


@pytest.mark.parametrize("name", PLACEMENTS)
def test_placements_come_back(tmp_path, name):
    """Formats of MoE layers alone leave the dense layer 0 out and get it back."""
    plan = PLAN if name != "lmdeploy" else lmdeploy_plan()
    write(plan, tmp_path / "plan", name, dense_layers=(0,))
    again = read(tmp_path / "plan", name, ReadOptions(ranks=plan.ranks, slots=plan.slots, dense_layers=(0,)))
    assert on_ranks(again)[1:] == on_ranks(plan)[1:]
    if name not in ("lmdeploy", "omni"):  # which have no order of slots within a rank
        assert again.layers == plan.layers
    assert (again == plan) == (name == "epbackend")
    assert name == "epbackend" or again.provenance.algorithm == "imported"


@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_same_placement_gives_the_same_bytes(tmp_path, name):
    plan = PLAN if name != "lmdeploy" else lmdeploy_plan()
    for file in ("a", "b"):
        write(plan, tmp_path / file, name, dense_layers=(0,))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "new/plan.bin" in usage(plan, name, "new/plan.bin")


def test_placements_are_known_by_their_content(tmp_path):
    for name in ("epbackend", "sglang", "vllm-ascend", "omni"):
        write(PLAN, tmp_path / "plan.bin", name, dense_layers=(0,))
        assert on_ranks(read(tmp_path / "plan.bin", options=ReadOptions(ranks=2)))[-1] == on_ranks(PLAN)[-1]


def test_what_vllm_ascend_reads(tmp_path):
    write(PLAN, tmp_path / "map.json", "vllm-ascend", dense_layers=(0,))
    written = json.loads((tmp_path / "map.json").read_text())
    assert written["moe_layer_count"] == len(written["layer_list"]) == 2
    assert [layer["layer_id"] for layer in written["layer_list"]] == [0, 1]
    assert written["layer_list"][0] == {
        "layer_id": 0,
        "device_count": 2,
        "device_list": [
            {"device_id": 0, "device_expert": [3, 1, 0]},
            {"device_id": 1, "device_expert": [2, 3, 1]},
        ],
    }


def test_what_sglang_reads(tmp_path):
    write(PLAN, tmp_path / "map.json", "sglang")
    assert json.loads((tmp_path / "map.json").read_text()) == {
        "physical_to_logical_map": [[0, 1, 2, 3, 0, 1], [3, 1, 0, 2, 3, 1], [0, 2, 1, 1, 3, 0]]
    }


def test_what_omniplacement_reads(tmp_path):
    write(UNEVEN, tmp_path / "pattern.npy", "omni")
    pattern_RYE = np.load(tmp_path / "pattern.npy")
    assert pattern_RYE.tolist() == [[[1, 1, 0, 1], [1, 0, 1, 0]], [[0, 0, 1, 1], [0, 1, 0, 1]]]


@pytest.mark.parametrize(
    ("plan", "name", "message"),
    [
        (UNEVEN, "sglang", "layer 0: has 5 slots, 2 to 3 a rank; SGLang needs the same number"),
        (UNEVEN, "vllm-ascend", "vllm-ascend needs the same number"),
        (UNEVEN, "lmdeploy", "LMDeploy needs the same number"),
        (
            TWICE,
            "omni",
            "layer 0: a rank holds two replicas of one expert, which OmniPlacement cannot express",
        ),
        (TWICE, "mindie", "MindIE cannot express"),
        (TWICE, "lmdeploy", "layer 0: LMDeploy's EPLB cannot be brought to this placement"),
        (ONE_EACH, "lmdeploy", "with one slot a rank it keeps experts in order"),
        (PLAN, "csv", "'csv' is no format of placements; known are epbackend, sglang"),
        (PLAN, "sglnag", "did you mean 'sglang'"),
        (ONE, "omni", "'omni' is no format of loads to write"),
        (ONE, "sglang-pt", "'sglang-pt' is no format of loads to write"),
    ],
)
def test_what_a_format_cannot_express_is_refused(tmp_path, plan, name, message):
    with pytest.raises(ConfigError, match=message):
        write(plan, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_dense_layers_must_be_layers(tmp_path):
    with pytest.raises(ConfigError, match="dense_layers: 3 is no layer of a model with 3"):
        write(PLAN, tmp_path / "out", "omni", dense_layers=(3,))
    with pytest.raises(ConfigError, match="dense_layers: they are all layers"):
        write(PLAN, tmp_path / "out", "omni", dense_layers=(0, 1, 2))


def test_loads_and_placements_are_distinguished(tmp_path):
    write(ONE, tmp_path / "loads.json", "sglang")
    write(PLAN, tmp_path / "plan.json", "epbackend")
    with pytest.raises(ConfigError, match=r"plan.json: holds a placement, not loads"):
        read_loads(tmp_path / "plan.json")
    with pytest.raises(
        ConfigError, match=r"loads.json: holds loads, not a placement; plan one: epbackend plan"
    ):
        read_placement(tmp_path / "loads.json")


def test_a_file_of_sglang_needs_ranks(tmp_path):
    write(PLAN, tmp_path / "plan.json", "sglang")
    with pytest.raises(ConfigError, match=r"ranks: a placement of SGLang does not say .* \(--ranks\)"):
        read_placement(tmp_path / "plan.json")
    with pytest.raises(ConfigError, match="ranks: 4 do not divide the 6 slots"):
        read_placement(tmp_path / "plan.json", ReadOptions(ranks=4))


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        write(PLAN, tmp_path, "epbackend")


WRITING = """
import resource
from epbackend.placement.formats import read_placement, write

placement = read_placement("plan.json")
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # as on a full disk
write(placement, "plan.json", "vllm-ascend")
"""


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path):
    write(PLAN, tmp_path / "plan.json", "epbackend")
    done = subprocess.run(
        [sys.executable, "-c", WRITING], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert "plan.json: cannot be written: File too large" in done.stderr
    assert read_placement(tmp_path / "plan.json") == PLAN
    assert os.listdir(tmp_path) == ["plan.json"]


def lmdeploy_plan():
    """Two ranks with room to steer: expert 0 has a replica on each."""
    moe = Layout(((0, 1, 2, 3), (0, 4, 5, 6)), 7)
    return Placement((Layout.even(7, 2, 8), moe, Layout(((6, 5, 3, 1), (6, 0, 2, 4)), 7)))


def test_lmdeploy_itself_makes_the_placement(tmp_path):
    """LMDeploy's own code on the written file, with the settings that `usage` names."""
    torch = pytest.importorskip("torch")
    lmdeploy = pytest.importorskip("lmdeploy.pytorch.nn.eplb")
    plan = random_plan(experts=64, ranks=8, slots=80, layers=4, seed=3)
    write(plan, tmp_path / "statistics.json", "lmdeploy")
    assert usage(plan, "lmdeploy", "a.json") == (
        "LMDeploy: LMDEPLOY_EPLB_EXPERTS_STATISTIC_FILE=a.json LMDEPLOY_EPLB_NUM_GROUPS=1 "
        "LMDEPLOY_EPLB_RANKS_PER_NODE=8 LMDEPLOY_EPLB_NUM_REDUNDANT_EXPERTS=16, enable_eplb"
    )
    statistics = torch.tensor(json.loads((tmp_path / "statistics.json").read_text()), dtype=torch.float32)
    expert_YP, _, _ = lmdeploy.rebalance_experts(
        statistics, num_replicas=80, num_groups=1, num_nodes=1, num_gpus=8
    )
    made = [[sorted(held) for held in expert_P.reshape(8, -1).tolist()] for expert_P in expert_YP]
    assert made == on_ranks(plan)


@given(seed=st.integers(0, 1000), ranks=st.sampled_from([2, 4, 8]), each=st.integers(5, 9))
@settings(max_examples=25, deadline=None)
def test_lmdeploy_counts_make_the_placement_or_say_why_not(tmp_path_factory, seed, ranks, each):
    plan = random_plan(experts=ranks * each - ranks, ranks=ranks, slots=ranks * each, layers=1, seed=seed)
    path = tmp_path_factory.mktemp("lmdeploy") / "statistics.json"
    try:
        write(plan, path, "lmdeploy")
    except ConfigError:
        assert not path.exists()
    else:
        assert on_ranks(read_placement(path, ReadOptions(ranks=ranks, slots=plan.slots))) == on_ranks(plan)


def random_plan(*, experts, ranks, slots, layers, seed):
    """Random replicas on random ranks, never two on one."""
    random = np.random.default_rng(seed)
    each = slots // ranks
    made = []
    while len(made) < layers:
        replicas_E = 1 + np.bincount(random.integers(0, experts, slots - experts), minlength=experts)
        held = [[] for _ in range(ranks)]
        for expert in np.argsort(-replicas_E):
            emptiest = np.argsort([len(slots) + random.random() * 0.9 for slots in held], kind="stable")
            for rank in emptiest[: replicas_E[expert]]:
                held[rank].append(int(expert))
        if {len(slots) for slots in held} == {each}:
            made.append(Layout(tuple(map(tuple, held)), experts))
    return Placement(tuple(made))
