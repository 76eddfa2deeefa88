"""What settings say together: which contradict each other, which have no effect, and which dispatchers may serve."""

from __future__ import annotations

from epbackend.config.issues import ConfigIssue
from epbackend.config.schema import PhaseDispatchers, Section, Settings, of_phase
from epbackend.dispatch.settings import DispatchSettings
from epbackend.errors import ConfigError, UnavailableError
from epbackend.names import AUTO, CUDA_KERNELS, LEVEL_BY_NODE, PHASES, Phase, dispatcher_facts
from epbackend.placement.speeds import checked_speeds

PLANNING = ("algorithm", "redundant_experts", "budget", "objective", "search_ms")
"""Settings of `placement` that only planning reads."""

SPEEDS_NOT_SEEN = (
    "needs steps whose times the host sees, which are those of device cpu alone: remove it, and give "
    "placement.rank_speed (epbackend calibrate)"
)
"""Why `balance.speed_margin` is refused on other devices."""

TURBOMIND_TAKES = ("device", "ep_size", "placement", "balance", "engine")
"""Settings that TurboMind has, or that have an answer of their own."""
NOT_OF_TURBOMIND = ("cache_gb", "cache_blocks", "eager_mode", "executor", "threads_per_rank")
"""Settings of `engine` that TurboMind has not."""


def contradictions(config: Settings) -> list[ConfigIssue]:
    """Settings, each valid by itself, that cannot stand together."""
    engine = config.engine
    return [
        *_cutoff(config),
        *_dispatch_dtype(config),
        *_kernels(config),
        *parallel_issues(config.ep_size, engine.tp, engine.dp, engine.executor),
        *_cache(config),
        *_placement(config),
        *_balance(config),
        *_dispatchers(config),
        *_turbomind(config),
    ]


def without_effect(config: Settings) -> list[str]:
    """Settings that differ from their default and change nothing, one sentence each."""
    levels = {config.level(phase) for phase in PHASES}
    found = []
    if config.enable_init_routing_cutoff and 1 not in levels:
        found.append("enable_init_routing_cutoff has no effect: it is for ep_level 1, which no phase uses")
    if _changed(config, "init_routing_cutoff_min_tokens") and not config.enable_init_routing_cutoff:
        found.append("init_routing_cutoff_min_tokens has no effect without enable_init_routing_cutoff: true")
    for name in ("alltoall_ep_buffer_scale_factors", "overlap_chunks", "overlap_min_tokens"):
        if _changed(config, name) and 2 not in levels:
            found.append(f"{name} has no effect: it is for ep_level 2, which no phase uses")
    if _changed(config, "dispatch_dtype") and _nothing_travels(config, levels):
        found.append("dispatch_dtype has no effect: every rank holds all tokens, so that no row travels")
    if _changed(config.engine, "cache_max_entry_count") and config.device == "cpu":
        found.append("engine.cache_max_entry_count has no effect on the CPU: set engine.cache_gb instead")
    replicas = config.placement.given or (config.balance.on and config.balance.redundant_experts)
    if _changed(config.placement, "split") and not replicas:
        found.append(
            "placement.split has no effect without placement.file or placement.loads: no expert has replicas"
        )
    if not config.balance.on and config.balance != type(config.balance)():
        found.append("balance has no effect without balance.on: true")
    return found


def _changed(section: Section, name: str) -> bool:
    return getattr(section, name) != type(section).model_fields[name].default


def _nothing_travels(config: Settings, levels: set[int]) -> bool:
    named = {name for phase in PHASES for name in dispatchers_of(config, phase)}
    replicated = levels == {1} and config.engine.dp == 1 and named <= {"replicated"}
    return config.ep_size == 1 or replicated


def world_size(ep: int, tp: int) -> int:
    """Ranks in all: with experts spread (ep > 1) ep, because attention then runs on these ranks."""
    return ep if ep > 1 else tp


def parallel_issues(ep: int, tp: int, dp: int, executor: str) -> list[ConfigIssue]:
    """Why LMDeploy cannot combine these sizes of expert, tensor and data parallelism; nothing if it can.

    With experts spread (ep > 1) LMDeploy gives each of the dp attention groups ep // dp ranks by itself, so tp says
    nothing new: it is 1, or ep when there is one group.
    """
    found = [
        _dp_issue(ep, tp, dp) if dp > 1 else _tp_issue(ep, tp),
        _executor_issue(ep, tp, dp, executor),
    ]
    return [issue for issue in found if issue]


def _dp_issue(ep: int, tp: int, dp: int) -> ConfigIssue | None:
    if ep % dp:
        return ConfigIssue(
            "engine.dp",
            f"must divide ep_size {ep}, whose ranks the attention groups share: lower it, "
            f"or make ep_size a multiple of {dp}",
            dp,
        )
    if tp > 1:
        attn_tp = ep // dp
        return ConfigIssue(
            "engine.tp",
            f"must be 1 with dp {dp}: each attention group gets ep_size // dp = {attn_tp} ranks by itself; "
            "a tp of its own would split the dense layers over ranks that hold unequal numbers of tokens",
            tp,
        )
    return None


def _tp_issue(ep: int, tp: int) -> ConfigIssue | None:
    if ep > 1 and tp not in (1, ep):
        return ConfigIssue(
            "engine.tp",
            f"must be 1 or {ep} with ep_size {ep} and dp 1: attention runs on all ep_size ranks, "
            "and LMDeploy cannot give the dense layers fewer or more",
            tp,
        )
    return None


def _executor_issue(ep: int, tp: int, dp: int, executor: str) -> ConfigIssue | None:
    if dp > 1 and executor not in ("auto", "ray"):
        reason = f"must be ray or auto with dp {dp}: LMDeploy runs dp > 1 by Ray only"
        return ConfigIssue("engine.executor", reason, executor)
    world = world_size(ep, tp)
    if world > 1 and executor == "uni":
        reason = f"uni runs one rank, not {world}: write mp, ray or auto"
        return ConfigIssue("engine.executor", reason, executor)
    return None


def _cutoff(config: Settings) -> list[ConfigIssue]:
    factor, enabled = config.topk_scaling_factor, config.enable_init_routing_cutoff
    if factor is not None and not enabled:
        remedy = "needs its switch: set enable_init_routing_cutoff: true, or remove it"
        return [ConfigIssue("topk_scaling_factor", remedy, factor)]
    if enabled and factor is None:
        remedy = "needs topk_scaling_factor, a number in (0, 1]"
        return [ConfigIssue("enable_init_routing_cutoff", remedy, enabled)]
    return []


def _kernels(config: Settings) -> list[ConfigIssue]:
    if config.kernels not in CUDA_KERNELS or config.device in ("auto", "cuda"):
        return []
    remedy = f"are for device cuda, but device is {config.device}: write auto or reference"
    return [ConfigIssue("kernels", remedy, config.kernels)]


def _dispatch_dtype(config: Settings) -> list[ConfigIssue]:
    if (config.device, config.dispatch_dtype) != ("ascend", "fp8"):
        return []
    remedy = "needs float8, which Ascend A2 and A3 do not have: write int8 or full"
    return [ConfigIssue("dispatch_dtype", remedy, "fp8")]


def _cache(config: Settings) -> list[ConfigIssue]:
    blocks = config.engine.cache_blocks
    if blocks is None or config.engine.cache_gb is None:
        return []
    reason = "and engine.cache_gb both size the KV cache: keep one"
    return [ConfigIssue("engine.cache_blocks", reason, blocks)]


def _placement(config: Settings) -> list[ConfigIssue]:
    placement = config.placement
    planning = [name for name in PLANNING if _changed(placement, name)]
    found = []
    if placement.file is not None:
        for name in [*(["loads"] if placement.loads else []), *planning]:
            reason = "is for planning, but placement.file is a finished placement: keep one of them"
            found.append(ConfigIssue(f"placement.{name}", reason, getattr(placement, name)))
    elif not placement.loads:
        useless = placement.node_size and not _by_node(config)
        for name in [*planning, *(["node_size"] if useless else [])]:
            reason = "has nothing to work on: give recorded loads as placement.loads, or a placement.file"
            found.append(ConfigIssue(f"placement.{name}", reason, getattr(placement, name)))
    if placement.algorithm == "incremental":
        reason = (
            "moves experts from a placement in use, and there is none at a start: use refined, or balance.on"
        )
        found.append(ConfigIssue("placement.algorithm", reason, placement.algorithm))
    if placement.budget is not None and placement.redundant_experts is not None:
        reason = "is for all layers together, placement.redundant_experts for each: keep one of them"
        found.append(ConfigIssue("placement.budget", reason, placement.budget))
    if placement.given and config.ep_size == 1:
        reason = "needs ranks to place experts on: set ep_size, or remove the section"
        found.append(ConfigIssue("placement", reason))
    if placement.node_size and config.ep_size % placement.node_size:
        reason = f"must divide ep_size {config.ep_size}"
        found.append(ConfigIssue("placement.node_size", reason, placement.node_size))
    if _by_node(config) and not placement.node_size and placement.file is None:
        reason = (
            f"is {LEVEL_BY_NODE}, which has to know which ranks are near each other: set placement.node_size, ranks of "
            "a node"
        )
        found.append(ConfigIssue("placement.split", reason))
    if placement.rank_speed:
        if not placement.given and not config.balance.on:
            reason = (
                "says how fast ranks are, but nothing is placed by it: give placement.loads or placement.file"
            )
            found.append(ConfigIssue("placement.rank_speed", reason, placement.rank_speed))
        try:
            checked_speeds(placement.rank_speed, config.ep_size)
        except ConfigError as error:
            reason = str(error).removeprefix("rank_speed: ")
            found.append(ConfigIssue("placement.rank_speed", reason, placement.rank_speed))
    return found


def _by_node(config: Settings) -> bool:
    return LEVEL_BY_NODE in map(config.placement.split_of, PHASES)


def _balance(config: Settings) -> list[ConfigIssue]:
    balance, placement = config.balance, config.placement
    if not balance.on:
        return []
    found = []
    if config.ep_size == 1:
        reason = "needs ranks between which experts can move: set ep_size, or remove it"
        found.append(ConfigIssue("balance.on", reason, True))
    if placement.file is not None:
        reason = (
            "moves experts, but placement.file is a finished placement: plan one on placement.loads, which balance "
            "then changes, or remove one of them"
        )
        found.append(ConfigIssue("balance.on", reason, True))
    if balance.speed_margin is not None and config.device not in (AUTO, "cpu"):
        found.append(ConfigIssue("balance.speed_margin", SPEEDS_NOT_SEEN, balance.speed_margin))
    if placement.budget is not None:
        reason = (
            "gives layers unequal numbers of slots, which balance cannot: use placement.redundant_experts"
        )
        found.append(ConfigIssue("placement.budget", reason, placement.budget))
    if balance.redundant_experts and placement.given:
        reason = "is for starting without a placement: use placement.redundant_experts"
        found.append(ConfigIssue("balance.redundant_experts", reason, balance.redundant_experts))
    return found


def _turbomind(config: Settings) -> list[ConfigIssue]:
    """What the engine TurboMind has not."""
    if config.engine.backend != "turbomind":
        return []
    blocks = (
        "is for LMDeploy's PyTorch engine: TurboMind gives each rank a block of experts in order, without copies; "
        "remove it, and balance the checkpoint instead (epbackend renumber MODEL --loads FILE --ranks "
        f"{config.ep_size})"
    )
    found = [
        ConfigIssue(name, blocks)
        for name in ("placement", "balance")
        if getattr(config, name) != type(getattr(config, name))()
    ]
    changed = [
        *(name for name in Settings.model_fields if name not in TURBOMIND_TAKES and _changed(config, name)),
        *(f"engine.{name}" for name in NOT_OF_TURBOMIND if _changed(config.engine, name)),
    ]
    reason = "is for LMDeploy's PyTorch engine, TurboMind has nothing like it: remove it"
    found += [ConfigIssue(name, reason) for name in changed]
    if config.device not in (AUTO, "cuda"):
        found.append(
            ConfigIssue("device", "must be cuda or auto: TurboMind runs on CUDA alone", config.device)
        )
    if config.engine.dtype == "float32":
        found.append(
            ConfigIssue(
                "engine.dtype", "TurboMind has bfloat16 and float16: write one of them, or auto", "float32"
            )
        )
    return found


def dispatchers_of(config: Settings, phase: Phase) -> tuple[str, ...]:
    """The dispatchers that may serve a phase, in order of preference; none named: any that can.

    Of names that are given for both phases, a phase takes those that can serve it.
    """
    named = of_phase(config.dispatcher, phase)
    if isinstance(config.dispatcher, PhaseDispatchers):
        return named
    return tuple(name for name in named if _unfit(name, phase, config) is None)


def _dispatchers(config: Settings) -> list[ConfigIssue]:
    """The named dispatchers that cannot serve."""
    given = config.dispatcher
    if isinstance(given, PhaseDispatchers):
        asked = [(phase, name) for phase in PHASES for name in of_phase(given, phase)]
        found = [(f"dispatcher.{phase}", name, _unfit(name, phase, config)) for phase, name in asked]
    else:
        found = [("dispatcher", ", ".join(given), _unfit_for_both(given, config))]
    remedy = "write auto, or change one of them"
    return [ConfigIssue(field, f"{reason}: {remedy}", value) for field, value, reason in found if reason]


def _unfit_for_both(names: tuple[str, ...], config: Settings) -> str | None:
    """Why one list will not do for both phases: a name can serve neither, or a phase has no name that can.

    Only prefill may be without one, if it has no name because all of them are for decode: then it takes any.
    """
    reasons = {name: {phase: _unfit(name, phase, config) for phase in PHASES} for name in names}
    for name, by_phase in reasons.items():
        if all(by_phase.values()):
            return by_phase[_phases(name)[0]]
    for phase in PHASES:
        served = [name for name in names if phase in _phases(name)]
        if served and all(reasons[name][phase] for name in names):
            return reasons[served[0]][phase]
    return None


def _phases(name: str) -> tuple[Phase, ...]:
    """The phases that a dispatcher is for; both, where its package does not load."""
    try:
        return dispatcher_facts(name).phases
    except UnavailableError:
        return PHASES


def _unfit(name: str, phase: Phase, config: Settings) -> str | None:
    """Why a dispatcher cannot serve a phase, by its own rules; None if it may."""
    settings = DispatchSettings(level=config.level(phase), max_tokens=config.max_tokens(phase))
    try:
        reason = settings.rules_out(dispatcher_facts(name), config.engine.dp)
    except UnavailableError as error:
        return str(error)
    return reason and f"{name} cannot serve {phase}: {reason}"
