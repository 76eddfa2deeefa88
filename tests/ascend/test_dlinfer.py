"""The dlinfer of the package index below LMDeploy 0.18.0: what it lacks, what bridges that, and its own operators."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("lmdeploy", reason="LMDeploy is not installed")

from epbackend.engines.lmdeploy.devices import ascend_attention, dlinfer_package
from epbackend.engines.lmdeploy.patches import ascend as patches
from epbackend.errors import ConfigError
from tests.helpers.ascend import REAL

pytestmark = pytest.mark.ascend

HEADS, HEADS_KV, SIZE, BLOCK = 4, 2, 32, 128
SCALE = SIZE**-0.5
LATENT, ROTARY = 64, 16
LATENT_SCALE = 48**-0.5
"""MLA's keeps the size that a head had before it was absorbed."""


@pytest.fixture(autouse=True)
def _dlinfer(npu):
    dlinfer_package.load()


@pytest.mark.parametrize("each", patches.PATCHES, ids=lambda each: each.name)
def test_every_hook_is_the_one_it_was_written_for(each):
    each.check()


def test_what_is_missing_is_read_from_the_package():
    assert dlinfer_package.installed() == "0.2.7"
    assert all(dlinfer_package.lacks(name) for name in dlinfer_package.GAPS)
    assert {gap.name for gap in dlinfer_package.GAPS.values() if gap.bridged} == {
        "vendor/ascend/version.py",
        "prefill_attention(actual_seq_lengths_cpu)",
        "fused_moe_w8a8",
    }


def test_what_it_would_change_in_an_older_lmdeploy_stays_out():
    from lmdeploy.pytorch.engine.inputs_maker import InputsMakerAsync

    assert not vars(sys.modules[dlinfer_package.EXTENSIONS]).get("patch_async_sampling_logits")
    assert InputsMakerAsync.create_model_inputs_delta.__module__.startswith("lmdeploy.")


def dense(query_SND: torch.Tensor, key_SND: torch.Tensor, value_SND: torch.Tensor) -> torch.Tensor:
    """Torch's own attention; the last query is beside the last key."""
    queries, keys = len(query_SND), len(key_SND)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return torch.nn.functional.scaled_dot_product_attention(
        *(each.float().transpose(0, 1) for each in (query_SND, key_SND, value_SND)),
        attn_mask=mask,
        enable_gqa=True,
    ).transpose(0, 1)


class Requests:
    """Random requests whose keys and values lie in a cache of shuffled blocks."""

    def __init__(self, lengths: list[int], queries: list[int], block: int = BLOCK) -> None:
        draw = torch.Generator().manual_seed(0)

        def rows(count: int, heads: int) -> torch.Tensor:
            return torch.randn(count, heads, SIZE, generator=draw).bfloat16()

        self.lengths, self.block = torch.tensor(lengths, dtype=torch.int32), block
        self.ends = torch.tensor([0, *queries]).cumsum(0).int()
        self.query = rows(sum(queries), HEADS)
        self.keys = [rows(length, HEADS_KV) for length in lengths]
        self.values = [rows(length, HEADS_KV) for length in lengths]
        most = -(-max(lengths) // block)
        self.blocks = torch.randperm(len(lengths) * most, generator=draw).int().view(len(lengths), most)
        self.key_cache, self.value_cache = torch.full(
            (2, self.blocks.numel(), block, HEADS_KV, SIZE), torch.nan, dtype=torch.bfloat16
        ).npu()

    def fill(self) -> None:
        """By dlinfer's own operator, from all requests' rows at once."""
        from dlinfer import ops

        places = [torch.arange(length) for length in self.lengths]
        slots = [
            blocks[place // self.block] * self.block + place % self.block
            for blocks, place in zip(self.blocks, places, strict=True)
        ]
        ops.fill_kv_cache(
            torch.cat(self.keys).npu(),
            torch.cat(self.values).npu(),
            self.key_cache,
            self.value_cache,
            torch.cat(slots).int().npu(),
            k_scales_zeros=[],
            v_scales_zeros=[],
            quant_bits=0,
        )

    def prefill(self, cached: bool) -> torch.Tensor:
        out = torch.empty_like(self.query).npu()
        mask = torch.ones(2048, 2048, dtype=torch.int8).triu(1).npu()
        return ascend_attention.prefill_attention(
            self.query.npu(),
            torch.cat(self.keys).npu(),
            torch.cat(self.values).npu(),
            out,
            self.key_cache,
            self.value_cache,
            self.blocks.npu(),
            *(None, None, 0, 0),
            self.block,
            HEADS,
            HEADS_KV,
            SIZE,
            [mask],
            SCALE,
            not cached,
            cu_seqlens_q_cpu=self.ends,
            kv_seqlens_cpu=self.lengths,
        ).cpu()

    def decode(self) -> torch.Tensor:
        out = torch.empty_like(self.query).npu()
        return ascend_attention.paged_token_attention(
            self.query.npu(),
            self.key_cache,
            self.value_cache,
            out,
            self.ends[1:],
            self.lengths,
            int(self.lengths.max()),
            self.blocks.npu(),
            self.block,
            HEADS,
            HEADS_KV,
            SIZE,
            SCALE,
            *(None, None, 0),
        ).cpu()

    def expected(self) -> torch.Tensor:
        queries = self.query.split(self.ends.diff().tolist())
        return torch.cat([dense(*each) for each in zip(queries, self.keys, self.values, strict=True)])


class LatentRequests:
    """Of MLA: one head of keys, whose first `LATENT` columns are the values, in blocks that dlinfer filled."""

    def __init__(self, lengths: list[int], queries: list[int], block: int = BLOCK) -> None:
        draw = torch.Generator().manual_seed(1)
        self.lengths, self.block = torch.tensor(lengths, dtype=torch.int32), block
        self.ends = torch.tensor([0, *queries]).cumsum(0).int()
        self.query = torch.randn(sum(queries), HEADS, LATENT + ROTARY, generator=draw).bfloat16()
        self.keys = [torch.randn(length, 1, LATENT + ROTARY, generator=draw).bfloat16() for length in lengths]
        most = -(-max(lengths) // block)
        self.blocks = torch.randperm(len(lengths) * most, generator=draw).int().view(len(lengths), most)
        self.cache = torch.full(
            (self.blocks.numel(), block, 1, LATENT + ROTARY), torch.nan, dtype=torch.bfloat16
        ).npu()
        self._fill()

    def _fill(self) -> None:
        from dlinfer import ops

        slots = [
            blocks[place // self.block] * self.block + place % self.block
            for blocks, place in zip(self.blocks, map(torch.arange, self.lengths), strict=True)
        ]
        keys = torch.cat(self.keys).npu()
        ops.fill_kv_cache(
            keys,
            keys[..., :LATENT],
            self.cache,
            self.cache[..., :LATENT],
            torch.cat(slots).int().npu(),
            k_scales_zeros=[],
            v_scales_zeros=[],
            quant_bits=0,
        )

    def attention(self, call: str) -> torch.Tensor:
        """By LMDeploy's arguments for either function; into the queries themselves, as LMDeploy does."""
        query, keys = self.query.npu(), torch.cat(self.keys).npu()
        caches = (self.cache, self.cache[..., :LATENT])
        sizes = (self.block, HEADS, 1, LATENT)
        if call == "decode":
            out = ascend_attention.paged_token_attention(
                query,
                *caches,
                query[..., :LATENT],
                self.ends[1:],
                self.lengths,
                int(self.lengths.max()),
                self.blocks.npu(),
                *sizes,
                LATENT_SCALE,
                *(None, None, 0),
            )
        else:
            out = ascend_attention.prefill_attention(
                query,
                keys,
                keys[..., :LATENT],
                query[..., :LATENT],
                *caches,
                self.blocks.npu(),
                *(None, None, 0, 0),
                *sizes,
                [None],
                LATENT_SCALE,
                call == "whole",
                cu_seqlens_q_cpu=self.ends,
                kv_seqlens_cpu=self.lengths,
            )
        return out.cpu()

    def expected(self) -> torch.Tensor:
        queries = self.query.split(self.ends.diff().tolist())
        values = [keys[..., :LATENT] for keys in self.keys]
        scale = LATENT_SCALE * (LATENT + ROTARY) ** 0.5  # torch's own is the inverse root of a key
        return torch.cat(
            [dense(query * scale, *each) for query, *each in zip(queries, self.keys, values, strict=True)]
        )


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)


def test_prefill_without_a_cache():
    requests = Requests([5, 1, 40], [5, 1, 40])
    assert_near(requests.prefill(cached=False), requests.expected())


def test_prefill_beside_a_cache_that_dlinfer_filled():
    requests = Requests([130, 7, 300], [2, 7, 1])
    requests.fill()
    assert_near(requests.prefill(cached=True), requests.expected())


@pytest.mark.parametrize("block", [16, 64, 128])
def test_decode_by_dlinfers_operator(block):
    requests = Requests([130, 7, 300], [1, 1, 1], block)
    requests.fill()
    assert_near(requests.decode(), requests.expected())


@pytest.mark.parametrize(
    ("call", "lengths", "queries"),
    [
        ("whole", [5, 1, 40], [5, 1, 40]),
        ("beside a cache", [130, 7, 300], [2, 7, 1]),
        ("decode", [130, 7, 300], [1, 1, 1]),
    ],
)
def test_mla_by_dlinfers_operators(call, lengths, queries):
    requests = LatentRequests(lengths, queries)
    assert_near(requests.attention(call), requests.expected())


def test_int8_rows_of_any_shape(npu):
    """MLA's keys come as [T, 1, D]; dlinfer's own operator takes [1, T, D]."""
    from lmdeploy.pytorch.kernels.dlinfer.w8a8_kernels import linear_w8a8

    values_TD, values_ND = torch.randint(-127, 128, (2, 5, 64), dtype=torch.int8).npu()
    scale_T, scale_N1 = torch.rand(5).npu(), torch.rand(5, 1).npu()
    rest = (torch.bfloat16, torch.int8)
    expected = linear_w8a8(values_TD[None], values_ND, scale_T[None], scale_N1, *rest)
    bridged = patches.int8_rows_of_any_shape.build(linear_w8a8)
    out = bridged(values_TD[:, None], values_ND, scale_T[:, None], scale_N1, *rest)
    assert out.shape == (5, 1, 5)
    assert torch.equal(out.cpu(), expected.cpu().view(5, 1, 5))


def test_blocks_below_128_are_refused_by_the_operator(npu):
    if npu == REAL:
        pytest.skip("the limits of real operators are CANN's to check")
    requests = Requests([130, 7], [2, 7], block=64)
    requests.fill()
    with pytest.raises(RuntimeError, match="block_size 64 is not a multiple of 128 up to 512"):
        requests.prefill(cached=True)


def test_an_operator_of_atb_that_is_not_emulated_says_its_name(npu):
    if npu == REAL:
        pytest.skip("real NPUs have it")
    rows = torch.zeros(1, HEADS, SIZE, dtype=torch.bfloat16).npu()
    with pytest.raises(RuntimeError, match="atb::_npu_flash_attention_unpad is not emulated"):
        torch.ops.atb._npu_flash_attention_unpad(
            rows, rows, rows, torch.ones(1, dtype=torch.int32), SCALE, HEADS, HEADS, rows
        )


@pytest.mark.parametrize(
    ("settings", "engine", "message"),
    [
        ({}, {"block_size": 64}, "engine.block_size: 64, but on device ascend .* set engine.block_size: 128"),
        ({"kv_lora_rank": 64}, {"block_size": 256}, "engine.block_size: 256, .* set engine.block_size: 128"),
        ({"kv_lora_rank": 1024, "qk_rope_head_dim": 64}, {}, "are 1088 together, and attention takes 576"),
        ({"kv_lora_rank": 512, "index_topk": 2048}, {}, "0.2.7 has no sparse attention"),
        (
            {"quantization_config": {"quant_method": "awq"}, "num_experts": 8},
            {},
            "neither LMDeploy nor epbackend computes awq experts there; take a checkpoint that is unquantized or W8A8",
        ),
        (
            {"quantization_config": {"quant_method": "smooth_quant"}, "dtype": "float16"},
            {},
            "linear_w8a8 gives bfloat16 .* set engine.dtype: bfloat16",
        ),
    ],
)
def test_what_this_dlinfer_cannot_serve_is_refused_before_weights_are_loaded(settings, engine, message):
    from epbackend import EPConfig
    from epbackend.engines.lmdeploy.checks import check_ascend

    with pytest.raises(ConfigError, match=message):
        check_ascend(settings, EPConfig.load({"device": "ascend", "engine": engine}))


def test_a_block_of_the_cache_suits_its_attention_unless_it_is_set():
    from epbackend import EPConfig
    from epbackend.engines.lmdeploy.lmdeploy_config import block_size

    assert block_size(EPConfig.load({"device": "ascend"})) == 128
    assert block_size(EPConfig.load({"device": "ascend", "engine": {"block_size": 256}})) == 256


@pytest.mark.parametrize("executor", ["mp", "ray"])
def test_more_ranks_than_npus_are_refused(monkeypatch, executor):
    """Of Ray's too where no cluster is named: LMDeploy would wait half an hour for the NPUs."""
    from epbackend import EPConfig
    from epbackend.engines.lmdeploy.checks import check_ascend
    from epbackend.errors import UnavailableError

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = EPConfig.load({"device": "ascend", "ep_size": 64, "engine": {"executor": executor}})
    with pytest.raises(UnavailableError, match="ep_size: 64 takes 64 NPUs, and there are"):
        check_ascend({}, config)
