"""How rows may travel: the settings of one layer in one phase, and which dispatchers they rule out.

Nothing here imports torch, for the configuration reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from epbackend.errors import ConfigError
from epbackend.names import AUTO, DispatcherFacts, dispatcher_names

UNBOUNDED = "nothing bounds this phase's tokens (decode is bounded by engine.max_batch_size)"
"""Why what is sized by `max_tokens` cannot serve."""


@dataclass(frozen=True)
class DispatchSettings:
    """How rows travel in one phase. Names and meanings follow MindIE's expert parallelism, but nothing is dropped."""

    level: int = 1
    """1: gather tokens, reduce-scatter results. 2: send each token only where its experts live."""
    dispatcher: tuple[str, ...] = ()
    """The dispatchers that may serve, in order of preference; empty: the best that can. A text, as a config file has
    it ("symmetric, alltoall"), is taken too."""
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
    """The most tokens that a rank holds in one call of this phase, where that is known; some buffers follow it."""
    static: bool = False
    """Every rank brings equally many tokens in a call of this phase, at most `max_tokens`, and the call may be captured
    in a CUDA graph: nothing is read back to the host, and loops and shapes depend on shapes and settings alone."""
    dispatch_dtype: str = "full"
    """How rows travel to the experts: "full" as they are, "int8" or "fp8" quantized (see `dispatch/row_format.py`)."""
    timeout_s: float = 120.0
    """Seconds until a collective that does not finish becomes an error that names the ranks which do not answer."""

    def __post_init__(self) -> None:
        """Raises ConfigError where a number cannot be meant."""
        names = dispatcher_names(self.dispatcher) if isinstance(self.dispatcher, str) else self.dispatcher
        object.__setattr__(self, "dispatcher", names if names != (AUTO,) else ())
        if AUTO in self.dispatcher:
            raise ConfigError(f"dispatcher: {', '.join(names)}; write {AUTO} alone, or names alone")
        lengths = [length for length, _ in self.buffer_scale_factors]
        if lengths != sorted(set(lengths), reverse=True) or any(
            not 0 < scale < inf for _, scale in self.buffer_scale_factors
        ):
            raise ConfigError(
                f"buffer_scale_factors {self.buffer_scale_factors}: lengths must descend, "
                "and scales be above 0 and finite"
            )
        for name, least in (("cutoff_min_tokens", 1), ("overlap_chunks", 1), ("overlap_min_tokens", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {value!r}, and must be a whole number from {least} on")
        if not 0 < self.timeout_s < inf:
            raise ConfigError(f"timeout_s is {self.timeout_s}, and must be above 0 and finite")

    def buffer_scale(self, tokens: int, usual: float) -> float:
        """What sizes the buffer of a rank with so many tokens; `usual` where the factors say nothing of them."""
        return next((scale for length, scale in self.buffer_scale_factors if length <= tokens), usual)

    def rules_out(self, facts: DispatcherFacts, token_groups: int) -> str | None:
        """Why a dispatcher cannot serve this phase, whatever the model and the machine; None if it may.

        token_groups: groups of ranks that hold the same tokens (`engine.dp`); with 1 every rank holds all of them.
        """
        if facts.needs_all_tokens and token_groups > 1:
            return f"the ranks hold different tokens (engine.dp is {token_groups}), and it needs all tokens on each"
        if facts.level != self.level:
            return f"it serves ep_level {facts.level}, and ep_level is {self.level}"
        if "prefill" not in facts.phases and self.max_tokens is None:
            return UNBOUNDED
        return None
