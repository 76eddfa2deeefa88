"""ExpertParallelMoE on one rank: its checks, its counters, and the memory that its weights take."""

from __future__ import annotations

import gc
import re
import sys
import weakref
from contextlib import nullcontext
from dataclasses import fields
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.errors import ConfigError, UnavailableError
from epbackend.kernels.cpu.choice import FORCED, PRODUCTS
from epbackend.kernels.fp8 import Fp8Blocks
from epbackend.kernels.int8 import Int8Weights
from epbackend.kernels.weight_formats import FLOATS
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap
from tests.helpers.ranks import forking

LEVELS = {"prefill": DispatchSettings(level=2), "decode": DispatchSettings(level=1)}


def build(**changes) -> ExpertParallelMoE:
    arguments = {
        "gate_up_L2FD": torch.randn(4, 12, 8),
        "down_LDF": torch.randn(4, 8, 6),
        "slot_map": SlotMap.uniform(4, 1),
        "ranks": RankGroup.single(),
        "settings": LEVELS,
        "top_k": 2,
    }
    arguments.update(changes)
    return ExpertParallelMoE(arguments.pop("gate_up_L2FD"), arguments.pop("down_LDF"), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slot_map": SlotMap.uniform(4, 2)}, "slot_map is for 2 ranks, but 1 share the experts"),
        ({"gate_up_L2FD": torch.randn(3, 12, 8)}, "gate_up_L2FD has 3 experts, but this rank has 4 slots"),
        ({"down_LDF": torch.randn(5, 8, 6)}, "down_LDF has 5 experts"),
        ({"settings": {"prefill": DispatchSettings()}}, "settings: needed for prefill and decode"),
        ({"device": "tpu"}, "device 'tpu' is unknown, .*; known are auto, cuda, ascend, cpu"),
        ({"kernels": "triton"}, "kernels 'triton' are unknown for device cpu; known are auto, reference"),
        ({"settings": DispatchSettings(topk_scaling_factor=0.3)}, "smallest factor that works is 0.5"),
        (
            {"down_LDF": torch.randn(4, 8, 12)},
            "of 12 x 8 and down_LDF of 8 x 12; they must be 2F x D and D x F",
        ),
        (
            {"gate_up_L2FD": torch.randn(4, 12, 9)},
            "of 12 x 9 and down_LDF of 8 x 6; they must be 2F x D and D x F",
        ),
        (
            {"gate_up_L2FD": torch.ones(4, 12, 8, dtype=torch.int8)},
            "experts are torch.int8, but device cpu",
        ),
        (
            {"down_LDF": torch.ones(4, 8, 6, dtype=torch.float64)},
            "experts are torch.float64, but device cpu",
        ),
        (
            {"gate_up_L2FD": (torch.randn(12, 8 + slot // 3) for slot in range(4))},
            r"the first is \[12, 8\] in torch.float32, another \[12, 9\] in torch.float32",
        ),
        (
            {"gate_up_bias_L2F": torch.zeros(3, 12)},
            r"gate_up_bias_L2F has .* \[3, 12\], and must have \[4, 12\]",
        ),
        (
            {"down_LDF": torch.randn(4, 8, 6).bfloat16()},
            "gate_up_L2FD is torch.float32 and down_LDF torch.bfloat16; the matrices .* one dtype",
        ),
        ({"down_bias_LD": torch.zeros(4, 6)}, r"down_bias_LD has .* \[4, 6\], and must have \[4, 8\]"),
    ],
)
def test_arguments_that_do_not_fit_raise(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(**changes)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("width", [4, 9, 16])
def test_tokens_of_another_width_are_refused(product, width, monkeypatch):
    monkeypatch.setenv(FORCED, product)
    layer = build()
    with pytest.raises(ConfigError, match=f"rows are {width} wide, but the experts take 8"):
        layer(torch.randn(5, width), torch.randint(0, 4, (5, 2)), torch.rand(5, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_TD": torch.randn(1, 5, 8)}, r"shapes \[1, 5, 8\]"),
        ({"hidden_TD": torch.randn(4, 8)}, r"must be T x D, and twice T x 2"),
        ({"topk_ids_TK": torch.zeros(5, 3, dtype=torch.int64)}, r"\[5, 3\]"),
        ({"topk_weights_TK": torch.rand(5, 1)}, r"\[5, 1\]"),
        ({"topk_ids_TK": torch.zeros(5, 2)}, "topk_ids_TK are torch.float32"),
        (
            {"hidden_TD": torch.randn(5, 8).bfloat16()},
            "hidden_TD is torch.bfloat16, but the experts take torch.float32; convert it",
        ),
        ({"padding_T1": torch.zeros(5, dtype=torch.bool)}, r"torch.bool of the shape \[5\], and must be"),
        ({"padding_T1": torch.zeros(1, 1, dtype=torch.bool)}, r"must be torch.bool of \[5, 1\]"),
        ({"padding_T1": torch.zeros(5, 1)}, "padding_T1 is torch.float32 of"),
    ],
)
def test_a_call_that_does_not_fit_raises(changes, message):
    call = {
        "hidden_TD": torch.randn(5, 8),
        "topk_ids_TK": torch.zeros(5, 2, dtype=torch.int64),
        "topk_weights_TK": torch.rand(5, 2),
    }
    with pytest.raises(ConfigError, match=message):
        build()(**call | changes)


@pytest.mark.parametrize("form", [Int8Weights.of, Fp8Blocks.of], ids=["int8", "fp8"])
def test_quantized_experts_take_tokens_of_any_floats(form):
    layer = build(gate_up_L2FD=form(torch.randn(4, 12, 8)), down_LDF=form(torch.randn(4, 8, 6)))
    ids, weights = torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    for dtype in FLOATS:
        assert layer(torch.randn(5, 8).to(dtype), ids, weights).dtype == dtype
    with pytest.raises(
        ConfigError, match=r"hidden_TD is torch.float64, but the experts take torch.bfloat16 or"
    ):
        layer(torch.randn(5, 8).double(), ids, weights)


@pytest.mark.parametrize(
    ("form", "weights"),
    [("int8", Int8Weights.of(torch.randn(4, 12, 8))), ("fp8", Fp8Blocks.of(torch.randn(4, 12, 8)))],
    ids=["int8", "fp8"],
)
def test_scales_of_another_dtype_are_refused(form, weights):
    values, scales = (getattr(weights, each.name) for each in fields(weights))
    with pytest.raises(
        ConfigError, match=f"{form} experts need .* torch.float32 scales .* in torch.bfloat16"
    ):
        type(weights)(values, scales.bfloat16())


@pytest.mark.parametrize(
    "settings", [DispatchSettings(), DispatchSettings(topk_scaling_factor=0.5, cutoff_min_tokens=1)]
)
def test_weights_are_renormalized_in_one_pass_and_in_several(settings):
    weights = {"gate_up_L2FD": torch.randn(4, 12, 8), "down_LDF": torch.randn(4, 8, 6)}
    hidden, ids, routed = torch.randn(5, 8), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    layer = build(renormalize=True, settings=settings, **weights)
    expected = build(**weights)(hidden, ids, routed / routed.sum(1, keepdim=True))
    torch.testing.assert_close(layer(hidden, ids, routed), expected)
    assert layer.load.most_passes == (1 if settings.topk_scaling_factor is None else 2)


def test_a_device_that_is_not_here_says_why():
    with pytest.raises(UnavailableError, match=r"device ascend cannot be used: .* use device cpu"):
        build(device="ascend")


def test_the_reference_computes_the_same():
    torch.manual_seed(0)
    weights = {"gate_up_L2FD": torch.randn(4, 12, 8), "down_LDF": torch.randn(4, 8, 6)}
    call = torch.randn(5, 8), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    torch.testing.assert_close(build(**weights)(*call), build(kernels="reference", **weights)(*call))


@pytest.mark.parametrize(
    "form", [lambda each: each, Int8Weights.of, Fp8Blocks.of], ids=["float32", "int8", "fp8"]
)
@pytest.mark.parametrize("way", PRODUCTS)
def test_the_defaults_of_torch_change_nothing(form, way, monkeypatch):
    """Compiled products once wrote float32 into memory of the default dtype."""
    monkeypatch.setenv(FORCED, way)
    replicas = {
        "slot_map": SlotMap.of((0, 1, 2, 3, 0, 1), 1),
        "split": {"prefill": "level", "decode": "even"},
    }
    weights = form(torch.randn(6, 12, 8)), form(torch.randn(6, 8, 6))
    call = torch.randn(5, 8), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    arguments = {"gate_up_L2FD": weights[0], "down_LDF": weights[1], **replicas}
    expected = build(**arguments)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # as torch.set_default_device does
            layer = build(**arguments)
            for phase in LEVELS:
                assert torch.equal(layer(*call, phase=phase), expected(*call, phase=phase))
            assert layer.load.tokens_E.sum() == 20
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("what", ["around", "layer"])
def test_code_with_the_layer_may_be_compiled(what):
    """What the layer calls cannot be traced: the graph breaks there."""
    layer, call = build(), (torch.randn(5, 8), torch.randint(0, 4, (5, 2)), torch.rand(5, 2))
    function = {"around": lambda hidden, *chosen: layer(hidden, *chosen) + 1, "layer": layer}[what]
    expected = function(*call)
    assert torch.equal(torch.compile(function, backend="eager")(*call), expected)


MODES = {"inference": torch.inference_mode, "plain": nullcontext}


@pytest.mark.parametrize("made", MODES)
@pytest.mark.parametrize("first", MODES)
def test_calls_may_be_inside_inference_mode_and_outside_of_it(made, first):
    """State that is born in inference mode could not be changed outside of it."""
    draw = torch.randn(6, 12, 8), torch.randn(6, 8, 6)
    call = torch.randn(5, 8), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    wrong = call[0], torch.full((5, 2), 99), call[2]
    with MODES[made]():
        layer = build(gate_up_L2FD=draw[0], down_LDF=draw[1], slot_map=SlotMap.of((0, 1, 2, 3, 0, 1), 1))
    for mode in (first, "plain", "inference", "plain"):
        with MODES[mode]():
            layer(*call)
            with pytest.raises(ConfigError, match="chose expert 99"):
                layer(*wrong)
    assert layer.load.tokens_E.sum() == 40


def test_an_unknown_phase_raises():
    with pytest.raises(ConfigError, match="phase 'encode' is unknown"):
        build()(torch.randn(1, 8), torch.zeros(1, 2, dtype=torch.int64), torch.rand(1, 2), phase="encode")


def test_counters_add_up():
    layer = build(settings=DispatchSettings(topk_scaling_factor=0.5, cutoff_min_tokens=1))
    for _ in range(2):
        layer(torch.randn(6, 8), torch.tensor([[0, 3]] * 6), torch.rand(6, 2))
    assert layer.load.tokens_E.tolist() == [12, 0, 0, 12]
    assert (layer.load.calls, layer.load.most_passes, layer.load.most_rounds) == (2, 2, 1)


def test_each_phase_has_its_dispatcher_and_its_reason():
    choices = build().dispatchers
    assert {phase: choice.name for phase, choice in choices.items()} == {
        "prefill": "replicated",
        "decode": "replicated",
    }
    assert dict(choices["prefill"].passed_over)["alltoall"] == "there is one rank, so no row travels"


def test_originals_are_let_go():
    gate_up, down = torch.randn(4, 12, 8), torch.randn(4, 8, 6)
    originals = [weakref.ref(gate_up), weakref.ref(down)]
    layer = build(gate_up_L2FD=gate_up, down_LDF=down)
    del gate_up, down
    gc.collect()
    assert [original() for original in originals] == [None, None]
    assert layer(torch.randn(1, 8), torch.tensor([[0, 1]]), torch.rand(1, 2)).shape == (1, 8)


def peak() -> int:
    """Bytes that this process held at most."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(dtype: torch.dtype, answer: Connection) -> None:
    """What a layer needs at most while it is made, over what its weights take."""
    L, D, F = 24, 1024, 1024

    def matrices(slots, rows, columns):
        return (torch.full((rows, columns), 0.01, dtype=dtype) for _ in range(slots))

    def make_and_call(slots):
        weights = {"gate_up_L2FD": matrices(slots, 2 * F, D), "down_LDF": matrices(slots, D, F)}
        layer = build(slot_map=SlotMap.uniform(slots, 1), settings=DispatchSettings(), **weights)
        layer(torch.ones(4, D, dtype=dtype), torch.zeros(4, 2, dtype=torch.int64), torch.rand(4, 2))

    make_and_call(1)  # what torch itself needs once
    before = peak()
    make_and_call(L)
    answer.send((peak() - before) / (L * 3 * D * F * dtype.itemsize))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_from_a_generator_never_exist_twice(dtype):
    """In a process of its own, whose peak nothing else has raised."""
    context = forking()
    ours, theirs = context.Pipe()
    process = context.Process(target=measure, args=(dtype, theirs))
    process.start()
    theirs.close()
    assert 0.8 < ours.recv() < 1.5  # the allocator leaves gaps; held twice would be 2
    process.join()
