"""The same formulas beside figures that others measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.cost.dispatchers import Case, deepep
from benchmarks.cost.fabric import DEEPEP_US, H100, H800, NODE, Fabric
from benchmarks.cost.shapes import DEEPSEEK_V3

UNLIMITED = replace(DEEPSEEK_V3, groups=1, groups_of_token=1)
"""The shape that all of them measured; their inputs choose experts without a limit, or groups that are nodes."""

LOW_LATENCY = {8: (77, 114), 16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369), 256: (194, 360)}
"""DeepEP docs/legacy.md: us of dispatch and combine by ranks; H800, 128 tokens, fp8 out, bfloat16 back."""
NORMAL = {8: (153, 158), 16: (43, 43), 32: (58, 57), 64: (51, 50)}
"""The same page: GB/s of dispatch and combine, 4096 tokens; by NVLink with 8 ranks, else by RDMA. Own rows count."""
GARDEN = {
    8: {"pplx-garden": (50.5, 65.3), "DeepEP": (42.6, 72.0)},
    16: {"pplx-garden": (110.2, 185.5), "DeepEP": (123.9, 203.0)},
    32: {"pplx-garden": (153.9, 266.3), "DeepEP": (159.1, 285.0)},
    64: {"pplx-garden": (187.5, 309.1), "DeepEP": (177.9, 325.0)},
}
"""perplexityai/pplx-garden docs/fabric-lib.md: us of dispatch and combine, 128 tokens, NVLink and ConnectX-7."""
FIRST_PPLX = (84, 102)
"""pplx-kernels, 8 ranks, 128 tokens, us."""


@dataclass(frozen=True)
class Check:
    """A published figure and ours."""

    what: str
    unit: str
    predicted: float
    published: float

    @property
    def deviation(self) -> float:
        return self.predicted / self.published - 1


def checks() -> Iterator[Check]:
    for ranks, latencies in LOW_LATENCY.items():
        yield from _both(f"DeepEP low-latency, H800, EP{ranks}", "us", _latencies(ranks, H800), latencies)
    for ranks, speeds in NORMAL.items():
        yield from _both(f"DeepEP normal, H800, EP{ranks}", "GB/s", _speeds(ranks), speeds)
    for ranks, by_name in GARDEN.items():
        for name, figures in by_name.items():
            what = f"{name}, 128 tokens, H100 or H200, EP{ranks}"
            yield from _both(what, "us", _latencies(ranks, H100), figures)
    yield from _both("pplx-kernels of 2025, H100, EP8", "us", _latencies(8, H100), FIRST_PPLX)


def _both(
    what: str, unit: str, predicted: tuple[float, float], published: tuple[float, float]
) -> Iterator[Check]:
    for half, ours, theirs in zip(("dispatch", "combine"), predicted, published, strict=True):
        yield Check(f"{what}, {half}", unit, ours, theirs)


def _latencies(ranks: int, fabric: Fabric) -> tuple[float, float]:
    """us of a low-latency dispatch and combine."""
    case = Case(UNLIMITED, ranks, 128, static=True, bytes_each=1)
    cost = deepep(case)
    kernel = DEEPEP_US[case.reach]
    return kernel + cost.out.us(fabric), kernel + cost.back.us(fabric)


def _speeds(ranks: int) -> tuple[float, float]:
    """GB/s of the normal kernels, as their benchmark counts: rows to all ranks, or to all nodes, over the time."""
    nodes = ranks // NODE
    # Its inputs are limited to four nodes, which are their groups.
    model = replace(UNLIMITED, groups=nodes, groups_of_token=min(nodes, 4))
    case = Case(model, ranks, 4096, static=False, bytes_each=1)
    cost, kernel = deepep(case), DEEPEP_US[case.reach]
    counted = case.tokens * model.reached(ranks if nodes == 1 else nodes)
    out, back = counted * case.packed, counted * 2 * model.D
    return (
        out / (kernel + cost.out.us(H800)) / 1e3,
        back / (kernel + cost.back.us(H800)) / 1e3,
    )
