"""How rows may travel: the settings of one layer in one phase."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DispatchSettings:
    """Names and meanings follow MindIE's expert parallelism; nothing is ever dropped, what does not fit goes on."""

    level: int = 1
    """1: gather tokens, reduce-scatter results. 2: send each token only where its experts live."""
    dispatcher: str = "auto"
    """"auto" takes the best that can serve the level; names in order of preference, with commas between, pin them."""
    topk_scaling_factor: float | None = None
    """Level 1: a pass holds about this share of the worst case's rows. None: everything in one pass."""
    cutoff_min_tokens: int = 65536
    """Level 1: the bound never falls below the rows of so many tokens (MindIE's constant)."""
    buffer_scale_factors: tuple[tuple[int, float], ...] = ()
    """Level 2: (length, scale), lengths descending; the first whose length <= this rank's tokens sizes its buffer."""
    overlap_chunks: int = 2
    """Level 2: chunks to cut a long batch into, so that one travels while another is multiplied."""
    overlap_min_tokens: int = 1024
    """Level 2: shorter batches are not cut, as smaller matmuls lose what the overlap wins (measured on gloo, 2 ranks:
    two chunks win nothing at 256 tokens a rank, 3% at 1024, 13% at 4096)."""
    max_tokens: int | None = None
    """The most tokens that a rank holds in one call of this phase, where that is known; `mc2` is sized by it."""
    static: bool = False
    """Every rank brings equally many tokens in a call of this phase, at most `max_tokens`, and the call may be captured
    in a CUDA graph: nothing is read back to the host, and loops and shapes depend on shapes and settings alone."""
    transport: str = "full"
    """How rows travel to the experts: "full" as they are, "int8" or "fp8" quantised (see `dispatch/transport.py`)."""
    timeout_s: float = 120.0
    """Seconds until a collective that does not finish becomes an error naming the ranks that do not answer."""
