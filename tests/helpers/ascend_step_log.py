"""What a step of a whole model asks of the NPU: LMDeploy's, dlinfer's and our operators, and its host waits, counted.

python -m tests.helpers.ascend_step_log      # prints the table that docs/ascend.md shows
"""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

from epbackend.models import resolve
from tests.helpers import ascend_pipeline
from tests.helpers.ascend_call_log import LEFT_OUT
from tests.helpers.cann.aten import WAIT

MODEL, CHIP, RANKS, HIDDEN = "tiny-qwen3-moe", "A2", 2, 160
FIRST = ("aclnnRmsNorm", f", {HIDDEN}]")
"""A step begins with the first layer's norm, the only one of hidden states that adds nothing to them."""
DECODES = {"atb::_npu_paged_attention", "atb::_npu_paged_attention_mla"}
PREFILLS = {"aclnnFusedInferAttentionScoreV3", "atb::_npu_flash_attention"}

Step = list[tuple[str, str]]
"""Operators in order, each with its first tensor; and where the host waited, each with its caller."""


def ranks(folder: Path) -> list[list[Step]]:
    """The steps of each process that ran a model, from the logs that a pipeline left in the folder."""
    return [
        found for file in sorted(folder.iterdir(), key=lambda file: int(file.name)) if (found := steps(file))
    ]


def steps(file: Path) -> list[Step]:
    """Step by step; what comes before the first one is left out."""
    calls = [tuple(line.split("\t")) for line in file.read_text().splitlines()]
    starts = [i for i, (name, what) in enumerate(calls) if name == FIRST[0] and what.endswith(FIRST[1])]
    return [calls[start:end] for start, end in pairwise([*starts, len(calls)])]


def decode_waits(of_a_rank: list[Step]) -> list[Counter[str]]:
    """For each decode step that another one follows, how often each function waited for the device."""

    def decodes(step: Step) -> bool:
        names = {name for name, _ in step}
        return bool(names & DECODES) and not names & PREFILLS

    return [
        Counter(what.split(", ")[1] for name, what in step if name == WAIT)
        for step, following in pairwise(of_a_rank)
        if decodes(step) and decodes(following)
    ]


def waits_markdown(of_ranks: list[list[Counter[str]]]) -> str:
    """How often each function waits in a decode step, on each rank; outputs are handed out every second step."""
    even = [steps[: len(steps) // 2 * 2] for steps in of_ranks]
    totals = [sum(steps, Counter()) for steps in even]
    lines = [
        f"| the host waits in | {' | '.join(f'rank {rank}' for rank in range(len(even)))} |",
        "|---|---|---|",
    ]
    for caller in dict.fromkeys(caller for total in totals for caller in total):
        module, *name = caller.rsplit(".", 2 if caller.split(".")[-2][0].isupper() else 1)
        cells = [f"{total[caller] / len(steps):g}" for total, steps in zip(totals, even, strict=True)]
        lines.append(f"| `{'.'.join(name)}` ({module}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown(prefill: Step, decode: Step) -> str:
    """Each operator's calls in both steps, and the first tensor of the first of them."""
    counts = [Counter(name for name, _ in step) for step in (prefill, decode)]
    tensors = [dict(reversed(step)) for step in (prefill, decode)]
    lines = ["| operator | prefill: calls, first tensor | decode: calls, first tensor |", "|---|---|---|"]
    for name in dict.fromkeys(name for name, _ in prefill + decode):
        if name not in (*LEFT_OUT, WAIT):
            cells = [
                f"{of[name]}, {what[name]}" if of[name] else ""
                for of, what in zip(counts, tensors, strict=True)
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables() -> tuple[str, str]:
    """Of calls and of host waits."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"ep_level": 2, "dispatcher": "mc2"}
        ascend_pipeline.run(CHIP, RANKS, resolve(MODEL), settings, texts=1, log=Path(folder))
        found = ranks(Path(folder))
    return markdown(found[0][0], found[0][1]), waits_markdown([decode_waits(each) for each in found])


if __name__ == "__main__":
    print("\n\n".join(tables()))
