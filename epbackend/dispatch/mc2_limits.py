"""What CANN's fused dispatch and combine take, by chip, and the communication buffer they need.

From the documentation of npu_moe_distribute_dispatch_v2 (https://gitcode.com/Ascend/op-plugin, docs/context). On A2 for
the algorithm "fullmesh", which serves any number of servers; "hierarchy" would need a newer driver.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

MOST_EXPERTS = 1024
MEGABYTE = 1 << 20
DEFAULT_BUFFER_MB = 200  # HCCL's own, and the least that we ask for


@dataclass(frozen=True)
class Limits:
    """One chip's."""

    algorithm: str
    """`comm_alg` of the operators."""
    ranks: Container[int]
    ranks_in_words: str
    slots: int
    """Most experts of a rank."""
    top_k: int
    tokens: int
    """Most tokens of a rank and call."""
    hidden: Container[int]
    hidden_in_words: str


LIMITS = {
    "A2": Limits(
        algorithm="fullmesh",
        ranks=(2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256),
        ranks_in_words="2 to 8, 16, 32, 64, 128 or 256",
        slots=24,
        top_k=16,
        tokens=256,
        hidden=range(32, 7169, 32),
        hidden_in_words="a multiple of 32 up to 7168",
    ),
    "A3": Limits(
        algorithm="",
        ranks=range(2, 769),
        ranks_in_words="2 to 768",
        slots=MOST_EXPERTS,
        top_k=12,
        tokens=512,
        hidden=range(1024, 8193),
        hidden_in_words="1024 to 8192",
    ),
}


def broken(chip: str, ranks: int, slots: int, top_k: int, tokens: int | None) -> str | None:
    """Which limit a layer of `slots` experts a rank and at most `tokens` tokens a rank breaks; None if none."""
    limits = LIMITS.get(chip)
    if limits is None:
        return f"it is for {' and '.join(LIMITS)}, and this chip is {chip}"
    if ranks not in limits.ranks:
        return f"on {chip} ep_size must be {limits.ranks_in_words}, and is {ranks}"
    if slots > limits.slots:
        return f"on {chip} a rank may hold {limits.slots} experts, and holds {slots}: raise ep_size"
    if slots * ranks > MOST_EXPERTS:
        return f"there may be {MOST_EXPERTS} experts with their copies, and there are {slots * ranks}"
    if top_k > limits.top_k:
        return f"on {chip} a token may choose {limits.top_k} experts, and this model's chooses {top_k}"
    if tokens is None:
        return "nothing bounds this phase's tokens (decode is bounded by engine.max_batch_size)"
    if tokens > limits.tokens:
        return f"on {chip} a rank may send {limits.tokens} tokens, and engine.max_batch_size allows {tokens}"
    return None


def broken_width(chip: str, hidden_size: int) -> str | None:
    """Why a model of this hidden size breaks a limit; None if it breaks none."""
    limits = LIMITS[chip]
    if hidden_size in limits.hidden:
        return None
    return f"on {chip} the hidden size must be {limits.hidden_in_words}, and this model's is {hidden_size}"


def buffer_mb(chip: str, ranks: int, slots: int, top_k: int, tokens: int, hidden: int) -> int:
    """The communicator's buffer (HCCL_BUFFSIZE) for 16-bit rows, in MB.

    >>> buffer_mb("A3", ranks=32, slots=8, top_k=8, tokens=64, hidden=7168)
    480
    """
    if chip == "A2":
        needed = 2 * (tokens * ranks * min(slots, top_k) * hidden * 2 + 2 * MEGABYTE)
    else:
        sent = slots * tokens * ranks * _align(_align(2 * hidden, 32) + 64, 512)
        returned = (top_k + 1) * tokens * _align(2 * hidden, 512)  # 1: the default shared_expert_num
        needed = 2 * (sent + returned)
    return max(DEFAULT_BUFFER_MB, -(-needed // MEGABYTE))


def _align(size: int, step: int) -> int:
    return -(-size // step) * step
