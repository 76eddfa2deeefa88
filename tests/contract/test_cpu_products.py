"""The products among which a CPU chooses: each is the reference's, and the choice follows the figures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as some

pytest.importorskip("numba", reason="numba is not installed, with which the CPU's own product is compiled")

from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.errors import ConfigError
from epbackend.kernels import fp8, int8
from epbackend.kernels.cpu import choice
from epbackend.kernels.cpu.choice import MANY, PRODUCTS, Method, choose, decide
from epbackend.kernels.cpu.compiled import outputs_of_a_task
from epbackend.kernels.cpu.kernels import CpuKernels, Packed
from epbackend.kernels.reference import ReferenceKernels
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap

pytestmark = pytest.mark.cpu

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Nothing is forced, and nothing was measured before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(choice.FORCED, raising=False)
    monkeypatch.setattr(choice, "BYTES", 4 * choice.OUTPUTS * choice.INPUTS)
    choose.cache_clear()
    yield tmp_path / "epbackend" / "cpu.json"
    choose.cache_clear()


def products_of(rows_SK, weight_LNK, counts, product, bias_LN=None):
    kernels = CpuKernels(product) if product else ReferenceKernels()
    return kernels.grouped_matmul(rows_SK, kernels.prepack(weight_LNK), torch.tensor(counts), bias_LN)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=15)
@given(
    counts=some.lists(some.integers(0, 9) | some.just(37), min_size=1, max_size=5),
    outputs=some.integers(1, 70),
    inputs=some.integers(1, 140),
    with_bias=some.booleans(),
    extra=some.integers(0, 3),
)
def test_float_products(product, dtype, counts, outputs, inputs, with_bias, extra):
    """Any number of rows a slot, rows of no slot at the end, odd sizes."""
    generator = torch.Generator().manual_seed(len(counts) * outputs + inputs)
    weight_LNK = torch.randn(len(counts), outputs, inputs, generator=generator).to(dtype)
    rows_SK = (torch.randn(sum(counts) + extra, inputs, generator=generator) / inputs**0.5).to(dtype)
    bias_LN = torch.randn(len(counts), outputs, generator=generator).to(dtype) if with_bias else None
    got, expected = (
        products_of(rows_SK, weight_LNK, counts, each, bias_LN)[: sum(counts)] for each in (product, None)
    )
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("inputs", [1, 130, 2500])
def test_int8_sums_are_exact(inputs):
    """Up to float32's rounding where blocks are added up: no processor may saturate, as some do with pairs of bytes."""
    values_LNK = torch.randint(-127, 128, (2, 7, inputs), dtype=torch.int8)
    values_LNK[0] = 127
    weights = int8.Int8Weights(values_LNK, torch.rand(2, 7) + 0.5)
    rows_SK = torch.randn(6, inputs)
    rows_SK[0] = 1
    got, expected = (products_of(rows_SK, weights, [4, 2], each) for each in ("compiled", None))
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-7 * float(expected.abs().max()))


def test_float8_of_every_bit_pattern():
    """One weight each, subnormal values and NaN included, times a row that float8 has exactly."""
    values_LNK = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, 256, 1)
    weights = fp8.Fp8Blocks(values_LNK, torch.tensor([[[0.5], [2.0]]]))
    got, expected = (products_of(torch.ones(1, 1), weights, [1], each) for each in ("compiled", None))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0, equal_nan=True)
    assert expected.isnan().sum() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_of_every_bit_pattern(dtype):
    values_LNK = (
        torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, -1, 1)
    )
    got = products_of(torch.ones(1, 1, dtype=dtype), values_LNK, [1], "compiled")
    torch.testing.assert_close(got.view(-1), values_LNK.view(-1), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("product", PRODUCTS)
def test_bytes_of_a_slot_are_what_its_product_reads(product):
    kernels = CpuKernels(product)
    packed = kernels.prepack(iter(torch.randn(3, 32, 48)))
    for here, there in zip(kernels.slot_memory(packed, 0), kernels.slot_memory(packed, 2), strict=True):
        here.copy_(there)
    rows_SK = torch.randn(1, 48).repeat(3, 1)
    out_SN = kernels.grouped_matmul(rows_SK, packed, torch.tensor([1, 1, 1]))
    assert torch.equal(out_SN[0], out_SN[2])
    assert not torch.equal(out_SN[0], out_SN[1])


def test_matrices_of_one_tensor_are_used_in_place_and_single_ones_copied():
    kernels, weight_LNK = CpuKernels("compiled"), torch.randn(2, 4, 8)
    assert kernels.prepack(weight_LNK).at_L[1] == weight_LNK[1].data_ptr()
    assert kernels.prepack(iter(weight_LNK)).at_L[1] != weight_LNK[1].data_ptr()
    shared_LNK = weight_LNK[:1].expand(2, 4, 8)  # one memory for two slots
    assert len(set(kernels.prepack(shared_LNK).at_L)) == 2


@pytest.mark.parametrize("form", ["float32", "int8", "fp8"])
def test_weights_that_are_shared_with_another_process_are_found_where_they_are_then(form):
    """Torch moves a tensor in place when it is sent to a process."""
    weight_LNK = torch.randn(2, 128, 256)
    given = {"float32": lambda each: each, "int8": int8.Int8Weights.of, "fp8": fp8.Fp8Blocks.of}[form](
        weight_LNK
    )
    values_LNK = given if form == "float32" else given.values_LNK
    kernels, rows_SK, counts_L = CpuKernels("compiled"), torch.randn(3, 256), torch.tensor([1, 2])
    packed = kernels.prepack(given)
    before_SN, at = kernels.grouped_matmul(rows_SK, packed, counts_L), values_LNK.data_ptr()
    values_LNK.share_memory_()
    assert values_LNK.data_ptr() != at
    values_LNK.zero_()  # the old memory, if it is there still, holds the old values
    assert before_SN.any()
    assert not kernels.grouped_matmul(rows_SK, packed, counts_L).any()


@pytest.mark.parametrize("threads", [1, 2, 8, 64])
def test_any_number_of_threads(threads):
    """More than there are cores too."""
    rows_SK, weight_LNK, counts = torch.randn(40, 64), torch.randn(8, 100, 64), [0, 1, 2, 3, 9, 25, 0, 0]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = products_of(rows_SK, weight_LNK, counts, "compiled")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, products_of(rows_SK, weight_LNK, counts, "compiled"))


@pytest.mark.parametrize("threads", [2, 8, 64])
@pytest.mark.parametrize(
    ("slots", "hidden", "width"),
    [(8, 2048, 768), (8, 7168, 2048), (2, 4096, 14336)],
    ids=["Qwen3-30B-A3B", "DeepSeek-V3", "Mixtral-8x7B"],
)
def test_one_tokens_weights_are_spread_evenly_over_threads(threads, slots, hidden, width):
    """By arithmetic: threads of equal speed, of which the busiest reads hardly more than its share."""
    for outputs in (2 * width, hidden):
        tasks = slots * -(-outputs // outputs_of_a_task(slots, outputs, threads))
        assert -(-tasks // threads) * threads <= 1.03 * tasks


XEON_FP32 = {  # shared/facts/cpu.md: Xeon with AMX, one product 1536 x 2048
    "library": {1: 529, 2: 576, 4: 965, 16: 1511, 64: 1969},
    "onednn": {1: 580, 2: 616, 4: 596, 16: 827, 64: 1580},
}
XEON_BF16 = {
    "library": {1: 393, 2: 404, 4: 405, 16: 420, 64: 704},
    "onednn": {1: 361, 2: 342, 4: 339, 16: 359, 64: 458},
}
ZEN3_FP32 = {  # 2026-11-27, the same matrix
    "library": {1: 724, 2: 1303, 4: 1620, 16: 2198, 64: 3973},
    "compiled": {1: 463, 2: 591, 4: 545, 16: 1292, 64: 4206},
    "onednn": {1: 704, 2: 677, 4: 882, 16: 1476, 64: 3563},
}


@pytest.mark.parametrize(
    ("us", "expected"),
    [
        (XEON_FP32, Method("onednn")),
        (XEON_BF16, Method("onednn", fewest_rows=2)),
        (ZEN3_FP32, Method("plain", 0, 33)),
        ({"library": ZEN3_FP32["library"]}, Method("plain")),
        ({"library": {1: 1, 4: 4, 64: 9}, "compiled": {1: 2, 4: 3, 64: 8}}, Method("plain", 3, MANY)),
        ({"library": {1: 2, 4: 4}, "compiled": {1: 1, 4: 3}}, Method("plain", 0, MANY)),
    ],
)
def test_decisions(us, expected):
    assert decide(us) == expected


@pytest.mark.parametrize(
    ("turns", "enough"),
    [
        ([[3.0, 1.0, 1.1], [2.0, 2.1, 9.0]], True),
        ([[1.0, 1.0], [1.0, 1.0]], False),
        ([[3.0, 1.0, 1.1], [9.0, 2.0, 5.0]], False),  # nobody knows yet how fast the second is
        ([[3.0, 1.0, 1.1], [9.0, 2.0, *[5.0] * 10]], True),  # a machine that is never quiet
    ],
)
def test_a_product_is_measured_until_turns_agree(turns, enough):
    assert choice.settled(turns) == enough


def test_slots_take_their_products_by_their_rows():
    packed = CpuKernels("library").prepack(torch.randn(3, 6, 10))
    mixed = Packed(packed.matrices_L, Method("plain", 2, 5), packed.behind_first_L)
    rows_SK, counts_L = torch.randn(11, 10), torch.tensor([1, 4, 6])
    got, expected = (CpuKernels().grouped_matmul(rows_SK, each, counts_L) for each in (mixed, packed))
    torch.testing.assert_close(got, expected)
    assert mixed.method.compiled(np.array([1, 4, 6])).tolist() == [False, True, False]


def test_a_measurement_is_made_once_and_kept(own_cache, monkeypatch):
    found = choose(torch.float32)
    stored = json.loads(own_cache.read_text())
    ((name, entry),) = next(iter(stored.values())).items()
    assert name == f"float32, {torch.get_num_threads()} threads"
    assert set(entry["us"]) == {"library", "compiled", "onednn"}
    assert Method(**entry["choice"]) == found
    assert choice.report()["measured"][name]["product"] == str(found)
    choose.cache_clear()
    monkeypatch.setattr(choice, "measure", None)
    assert choose(torch.float32) == found


def test_a_measurement_leaves_torchs_random_numbers_alone(own_cache):
    before = torch.get_rng_state()
    choose(torch.float32)
    assert own_cache.exists()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_full_disk_costs_the_table_and_nothing_else(own_cache, monkeypatch, caplog):
    def full(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(choice.Path, "write_bytes", full)
    assert choose(torch.float32).layout in ("plain", "onednn")
    assert "cannot be written: No space left on device" in caplog.text
    assert not own_cache.exists()


def test_a_process_that_hangs_while_it_measures_holds_up_no_other(own_cache, monkeypatch, caplog):
    monkeypatch.setattr(choice, "LOCK_S", 0.1)
    own_cache.parent.mkdir()
    with FileLock(own_cache.with_suffix(".lock"), is_singleton=False):
        assert choose(torch.float32).layout in ("plain", "onednn")
    assert "nothing can be kept" in caplog.text


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": {"b": {"choice": {"rows": 1}}}}'])
def test_a_damaged_table_is_measured_again(own_cache, text, caplog):
    own_cache.parent.mkdir()
    own_cache.write_text(text)
    choose(torch.bfloat16)
    assert "measured again" in caplog.text
    assert len(json.loads(own_cache.read_text())) == 1


def test_where_nothing_can_be_written_it_is_measured_all_the_same(own_cache):
    own_cache.parent.write_text("a file where the folder should be")
    assert choose(torch.float32).layout in ("plain", "onednn")


def test_a_product_is_forced_by_the_environment(monkeypatch):
    monkeypatch.setattr(choice.products, "onednn_takes", lambda dtype: False)
    for name in PRODUCTS:
        monkeypatch.setenv(choice.FORCED, name)
        choose.cache_clear()
        assert choose(torch.float32) == Method.of("library" if name == "onednn" else name)
    monkeypatch.setenv(choice.FORCED, "onedn")
    choose.cache_clear()
    with pytest.raises(ConfigError, match=r"EPBACKEND_CPU_PRODUCT 'onedn' is unknown, did you mean 'onednn'"):
        choose(torch.float32)
    monkeypatch.undo()
    choose.cache_clear()


def test_without_a_compiler_quantized_experts_run_by_the_reference(monkeypatch):
    from epbackend.kernels.cpu import kernels

    monkeypatch.setattr(kernels, "compiler_trouble", lambda: "no compiler")
    weights = int8.Int8Weights.of(torch.randn(1, 4, 8))
    rows_SK = torch.randn(2, 8)
    assert torch.equal(
        products_of(rows_SK, weights, [2], "compiled"), products_of(rows_SK, weights, [2], None)
    )


def test_layers_say_how_their_experts_lie(monkeypatch):
    for product, layout in (("onednn", "onednn, onednn"), ("compiled", "plain, plain")):
        monkeypatch.setenv(choice.FORCED, product)
        choose.cache_clear()
        layer = ExpertParallelMoE(
            torch.randn(2, 8, 4),
            torch.randn(2, 4, 4),
            slot_map=SlotMap.uniform(2, 1),
            ranks=RankGroup.single(),
            settings=DispatchSettings(),
            top_k=1,
        )
        assert layer.slot_layout == layout
    choose.cache_clear()
