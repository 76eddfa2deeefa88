"""Random valid configurations."""

from hypothesis import strategies as st

from epbackend.config.schema import FEWEST_BLOCKS
from epbackend.names import DEVICES, LEVEL_BY_NODE, PLANNERS, SPLITS

POSITIVE = st.integers(1, 1 << 20)


@st.composite
def sizes(draw):
    """ep_size, tp and dp that go together."""
    ep = draw(st.sampled_from([1, 2, 3, 4, 8, 12, 64]))
    if ep == 1:
        return ep, draw(st.sampled_from([1, 2, 8])), 1
    dp = draw(st.sampled_from([size for size in range(1, ep + 1) if ep % size == 0]))
    return ep, draw(st.sampled_from([1, ep])) if dp == 1 else 1, dp


def buffers():
    """Pairs, lengths strictly descending."""
    scale = st.floats(0.01, 1e6) | st.integers(1, 64)
    lengths = st.lists(st.integers(0, 1 << 21), unique=True, max_size=8)
    return lengths.flatmap(
        lambda found: st.tuples(
            *[st.tuples(st.just(length), scale) for length in sorted(found, reverse=True)]
        )
    ).map(lambda pairs: [list(pair) for pair in pairs])


def splits():
    """One for both phases, or one for each."""
    name = st.sampled_from(SPLITS)
    return name | st.fixed_dictionaries({"prefill": name, "decode": name})


@st.composite
def placements(draw, ep):
    """A section that goes with `ep` ranks; nothing but a split, and what it needs, for one rank."""
    section = draw(_placements(ep))
    split = section.get("split")
    names = split.values() if isinstance(split, dict) else [split]
    if LEVEL_BY_NODE in names and "file" not in section:
        section["node_size"] = section.get("node_size") or ep
    return section


@st.composite
def _placements(draw, ep):
    split = {"split": splits()}
    if ep == 1:
        return draw(st.fixed_dictionaries({}, optional=split))
    nodes = {"node_size": st.sampled_from([size for size in range(ep + 1) if not size or ep % size == 0])}
    if draw(st.booleans()):
        return draw(st.fixed_dictionaries({"file": st.text()}, optional=split | nodes))
    size = {draw(st.sampled_from(["redundant_experts", "budget"])): st.integers(0, 999)}
    planning = {
        "algorithm": st.sampled_from([name for name in PLANNERS.built_in if name != "incremental"]),
        "objective": st.text(),
        "search_ms": st.floats(0, 1e4) | st.integers(0, 99),
    }
    files = {"loads": st.lists(st.text(), min_size=1, max_size=3)}
    return draw(st.fixed_dictionaries(files, optional=split | nodes | size | planning))


def balances():
    """A section that goes with everything, since it is not on."""
    positive = st.floats(0.001, 1e6) | POSITIVE
    return st.fixed_dictionaries(
        {},
        optional={
            "window_steps": POSITIVE,
            "interval_s": positive,
            "threshold": st.floats(0, 1, exclude_max=True),
            "max_slots": POSITIVE | st.none(),
            "max_mb": positive | st.none(),
            "staging_mb": positive,
            "checksum": st.sampled_from(["all", "sampled", "none"]),
            "timeout_s": positive,
        },
    )


@st.composite
def settings(draw):
    """A mapping as a file would hold it: any subset of the settings, none contradicting another."""
    level = st.sampled_from([1, 2])
    ep, tp, dp = draw(sizes())
    cutoff = draw(st.booleans())
    found = draw(
        st.fixed_dictionaries(
            {draw(st.sampled_from(["ep_size", "moe_ep"])): st.just(ep)},
            optional={
                "device": st.sampled_from(["auto", *DEVICES.built_in]),
                "kernels": st.sampled_from(["auto", "reference"]),
                "check_expert_ids": st.booleans(),
                "ep_level": level | st.fixed_dictionaries({"prefill": level, "decode": level}),
                "alltoall_ep_buffer_scale_factors": buffers(),
                "init_routing_cutoff_min_tokens": POSITIVE,
                "overlap_chunks": POSITIVE,
                "overlap_min_tokens": st.integers(0, 1 << 20),
                "dispatch_dtype": st.sampled_from(["full", "int8"]),
                "timeout_s": st.floats(0.001, 1e6) | POSITIVE,
            },
        )
    )
    if cutoff:
        found["enable_init_routing_cutoff"] = True
        found["topk_scaling_factor"] = draw(st.floats(0, 1, exclude_min=True))
    engine = draw(
        st.fixed_dictionaries(
            {"tp": st.just(tp), "dp": st.just(dp)},
            optional={
                "dtype": st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
                "session_len": POSITIVE | st.none(),
                "max_batch_size": POSITIVE,
                "cache_blocks": st.integers(FEWEST_BLOCKS, 10**6),
                "cache_max_entry_count": st.floats(0.01, 0.99),
                "block_size": st.sampled_from([16, 32, 64, 128, 256]),
                "max_prefill_token_num": POSITIVE,
                "enable_prefix_caching": st.booleans(),
                "eager_mode": st.booleans(),
                "executor": st.sampled_from(["auto", "ray"]),
                "threads_per_rank": POSITIVE,
                "log_level": st.sampled_from(["DEBUG", "INFO", "ERROR"]),
                "extra": st.fixed_dictionaries(
                    {}, optional={"revision": st.text(), "prefill_interval": POSITIVE}
                ),
            },
        )
    )
    return {**found, "placement": draw(placements(ep)), "balance": draw(balances()), "engine": engine}
