"""Which dispatcher a deployment would get on this machine, and why not the others."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from epbackend.device import get_device
from epbackend.dispatch.base import LayerSpec, RankGroup
from epbackend.dispatch.choose import decide
from epbackend.errors import EPError

if TYPE_CHECKING:
    from epbackend.config import EPConfig


def choices(config: "EPConfig", experts: int, top_k: int) -> dict[str, dict[str, Any]]:
    """For each phase a `Decision` as a mapping, or {"problem": why there is none}. No rank is started."""
    return {phase: _choice(config, phase, experts, top_k) for phase in ("prefill", "decode")}


def _choice(config: "EPConfig", phase: Any, experts: int, top_k: int) -> dict[str, Any]:
    ranks = RankGroup(None, 0, config.ep_size, None, 0, config.attn_tp if config.ep_size > 1 else 1)
    try:
        device = get_device(config.device)
        kernels = device.kernel_set(config.kernels)
        slots = -(-experts // config.ep_size)
        choice = decide(LayerSpec(ranks, device, kernels, config.dispatch_settings(phase), slots, top_k))
    except EPError as error:
        return {"problem": str(error)}
    return asdict(choice)
