"""What a step of a whole model asks of the NPU: LMDeploy's, dlinfer's and our operators, counted.

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

MODEL, CHIP, RANKS, HIDDEN = "tiny-qwen3-moe", "A2", 2, 160
FIRST = ("aclnnRmsNorm", f", {HIDDEN}]")
"""A step begins with the first layer's norm, the only one of hidden states that adds nothing to them."""


def steps(file: Path) -> list[list[tuple[str, str]]]:
    """(operator, its first tensor) of each call, step by step; what comes before the first step is left out."""
    calls = [tuple(line.split("\t")) for line in file.read_text().splitlines()]
    starts = [i for i, (name, what) in enumerate(calls) if name == FIRST[0] and what.endswith(FIRST[1])]
    return [calls[start:end] for start, end in pairwise([*starts, len(calls)])]


def markdown(prefill: list[tuple[str, str]], decode: list[tuple[str, str]]) -> str:
    """Each operator's calls in both steps, and the first tensor of the first of them."""
    counts = [Counter(name for name, _ in step) for step in (prefill, decode)]
    tensors = [dict(reversed(step)) for step in (prefill, decode)]
    lines = ["| operator | prefill: calls, first tensor | decode: calls, first tensor |", "|---|---|---|"]
    for name in dict.fromkeys(name for name, _ in prefill + decode):
        if name not in LEFT_OUT:
            cells = [
                f"{of[name]}, {what[name]}" if of[name] else ""
                for of, what in zip(counts, tensors, strict=True)
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table() -> str:
    with tempfile.TemporaryDirectory() as folder:
        settings = {"ep_level": 2, "dispatcher": "mc2"}
        ascend_pipeline.run(CHIP, RANKS, resolve(MODEL), settings, texts=1, log=Path(folder))
        logs = sorted(Path(folder).iterdir(), key=lambda file: int(file.name))
        first_rank = next(found for file in logs if (found := steps(file)))
    return markdown(first_rank[0], first_rank[1])


if __name__ == "__main__":
    print(table())
