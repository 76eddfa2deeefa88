"""The cost model: what it counts, what others measured, and what docs/dispatch.md says of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import pytest
import torch

from benchmarks.cost import __main__ as tables
from benchmarks.cost import fabric
from benchmarks.cost.dispatchers import DISPATCHERS, Case
from benchmarks.cost.published import LOW_LATENCY, checks
from benchmarks.cost.shapes import DEEPSEEK_V3, QWEN3_30B, Model
from benchmarks.cuda import model
from epbackend.dispatch.row_format import RowFormat

DOCS = (Path(__file__).parents[2] / "docs" / "dispatch.md").read_text()


@pytest.mark.parametrize("table", [tables.times, tables.same_tokens, tables.published])
def test_the_tables_in_the_docs_are_what_the_model_prints(table):
    assert table() in DOCS, "paste the output of python -m benchmarks.cost"


@pytest.mark.parametrize(
    ("units", "chosen"),
    [*((units, 0) for units in (1, 2, 3, 4, 6, 12)), *product((1, 2, 4, 12), (1, 2, 3))],
)
def test_ranks_of_a_token_are_those_of_every_routing(units, chosen):
    """12 experts in 4 groups, or in none (chosen 0): all sets of 2 experts that a router could choose."""
    if chosen:
        shape = Model("", D=1, E=12, K=2, groups=4, groups_of_token=chosen)
        pools = [
            [expert for group in taken for expert in range(3 * group, 3 * group + 3)]
            for taken in combinations(range(4), chosen)
        ]
    else:
        shape, pools = Model("", D=1, E=12, K=2), [list(range(12))]
    routings = [experts for pool in pools for experts in combinations(pool, 2)]
    reached = sum(len({expert * units // 12 for expert in experts}) for experts in routings)
    assert shape.reached(units) == pytest.approx(reached / len(routings))


@pytest.mark.parametrize(("ranks", "measured"), [(8, 3.95), (16, 5.73), (32, 6.86)])
def test_deepseeks_router_reaches_a_little_more(ranks, measured):
    """It takes the groups whose two best scores are highest, so a token's experts lie in more of its four groups."""
    scores_TE = torch.rand(20000, 256, generator=torch.Generator().manual_seed(1))
    best_TG = scores_TE.view(-1, 8, 32).topk(2).values.sum(-1)
    allowed_TG = torch.zeros_like(best_TG).scatter_(1, best_TG.topk(4).indices, 1.0)
    ids_TK = (scores_TE * allowed_TG.repeat_interleave(32, 1)).topk(8).indices
    on_rank_RT = torch.stack([(ids_TK * ranks // 256 == rank).any(1) for rank in range(ranks)])
    reached = on_rank_RT.sum(0).double().mean().item()
    assert reached == pytest.approx(measured, abs=0.01)
    assert 1 <= reached / DEEPSEEK_V3.reached(ranks) < 1.1


@pytest.mark.parametrize("shape", [DEEPSEEK_V3, QWEN3_30B])
@pytest.mark.parametrize(("bytes_each", "dispatch_dtype"), [(2, "full"), (1, "fp8")])
def test_packed_rows_are_those_of_the_dispatchers(shape, bytes_each, dispatch_dtype):
    assert shape.packed_row(bytes_each) == RowFormat(shape.D, torch.bfloat16, dispatch_dtype, shape.K).bytes


def test_assumptions_are_those_of_the_kernels_model():
    assert model.LAUNCH_US == fabric.LAUNCH_US
    assert model.H100_CEILINGS.bandwidth == fabric.MEMORY


def test_predictions_are_near_the_published_figures():
    """Within 15%, but for a kernel faster than any of its kind and the first pplx-kernels."""
    off = {each.what for each in checks() if abs(each.deviation) > 0.15}
    assert off == {
        "DeepEP, 128 tokens, H100 or H200, EP8, dispatch",
        "pplx-kernels of 2025, H100, EP8, dispatch",
        "pplx-kernels of 2025, H100, EP8, combine",
    }
    assert len(list(checks())) > 2 * len(LOW_LATENCY)


@pytest.mark.parametrize("name", DISPATCHERS)
def test_costs_grow_with_tokens_and_shrink_with_narrow_rows(name):
    few, many = (Case(QWEN3_30B, 8, tokens, static=True) for tokens in (16, 256))
    cost = DISPATCHERS[name]
    assert cost(few).us(fabric.H100) < cost(many).us(fabric.H100)
    narrow, wide = cost(replace(many, bytes_each=1)).us(fabric.H100), cost(many).us(fabric.H100)
    assert narrow == wide if name == "replicated" else narrow < wide
