"""`epbackend plan | compare | show | convert`, as people and programs run them."""

import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from epbackend.cli import COMMANDS, app
from epbackend.cli.inputs import layer_numbers, with_dense
from epbackend.cli.pictures import MARKS
from epbackend.errors import ConfigError
from epbackend.names import SPLITS
from epbackend.placement.formats import read_loads, read_placement, write
from epbackend.placement.formats.pairs import write_pairs
from epbackend.placement.loads import Loads
from epbackend.placement.pairs import Pairs
from epbackend.placement.placement import Placement
from epbackend.placement.planners import plan
from epbackend.placement.score import score
from epbackend.placement.synthetic import synthetic_loads, synthetic_routes
from tests.helpers.patience import PATIENCE_S
from tests.helpers.pictures import colour_share, drawn_share


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def recorded(tmp_path):
    """A model of 5 layers with 16 experts, the first one dense."""
    path = tmp_path / "recorded.json"
    write(synthetic_loads(5, 16, tokens=10_000, dense_layers=1, seed=3), path, "sglang")
    return path


@pytest.fixture
def planned(tmp_path, recorded, run):
    path = tmp_path / "placement.json"
    assert run("plan", recorded, "--ranks", 4, "--slots", 20, "--out", path).exit_code == 0
    return path


def test_plan_prints_one_object_and_writes_what_it_says(run, tmp_path, recorded):
    out, plot = tmp_path / "new" / "placement.json", tmp_path / "new" / "placement.png"
    result = run("plan", recorded, "--ranks", 4, "--slots", 20, "--out", out, "--plot", plot, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["algorithm"], said["ranks"], said["slots"]) == ("refined", 4, 20)
    assert 1 <= said["lower_bound_mean"] <= said["imbalance_mean"] <= said["imbalance_worst"] < 1.2
    assert said["seconds"] > 0
    assert said["duplicates_on_rank"] == 0
    placement = read_placement(out)
    assert (placement.ranks, placement.slots, len(placement.layers)) == (4, 20, 5)
    assert placement.provenance.loads == ("recorded",)
    assert drawn_share(plot, left=0.55, right=0.85, top=0.2, bottom=0.8) > 0.8


def test_plan_prints_a_table_for_people(run, recorded):
    result = run("plan", recorded, "--ranks", 4, "--slots", 20, "--algorithm", "eplb")
    assert result.exit_code == 0, result.output
    assert "5 layers, 16 experts in 20 slots a layer on 4 ranks" in result.stdout
    assert "worst layer" in result.stdout


def test_plan_and_show_judge_by_what_was_planned_for(run, tmp_path, recorded):
    """The split, the objective, and each window with its own busiest rank."""
    drifted, out = tmp_path / "drifted.json", tmp_path / "p.json"
    write(synthetic_loads(5, 16, tokens=10_000, dense_layers=1, seed=4), drifted, "sglang")
    for loads, options, split, objective in (
        ([recorded], ["--option", "split=level"], "level", "tokens"),
        ([recorded], ["--objective", "activated:256"], "even", "activated:256"),
        ([recorded, drifted], [], "even", "tokens"),
    ):
        asked = ["plan", *loads, "--ranks", 4, "--slots", 20, *options, "--out", out]
        said = json.loads(run(*asked, "--json").stdout)
        judged = score(read_placement(out), read_loads(loads), split=split, objective=objective)
        assert (said["split"], said["objective"]) == (split, objective)
        assert said["imbalance_mean"] == judged.imbalance_mean
        assert said["imbalance_before_mean"] > said["imbalance_mean"]
        shown = run("show", out, *loads, "--plot", tmp_path / "p.png").stdout
        means = [line.split() for line in shown.splitlines() if "mean of 4" in line]
        assert means[0][-2] == f"{judged.imbalance_mean:.4f}"
        assert ("activated:256 of the busiest" in shown) == (objective != "tokens")


def test_show_says_where_measured_times_are_not_at_hand(run, tmp_path, recorded):
    times, out = tmp_path / "times.json", tmp_path / "p.json"
    times.write_text(json.dumps({"tokens": [0, 9], "experts": [0, 9], "microseconds": [[0, 1], [2, 3]]}))
    assert run("plan", recorded, "--ranks", 4, "--objective", times, "--out", out).exit_code == 0
    shown = run("show", out, recorded, "--plot", tmp_path / "p.png").stdout
    assert "judged by tokens: times.json, which it was planned for, is not in the file" in shown


def test_experts_in_order_fill_the_slots_that_ranks_have(run, tmp_path):
    path = tmp_path / "loads.csv"
    write(Loads.of(np.array([[5, 1, 3, 2], [1, 2, 3, 4]])), path, "csv")
    asked = [path, "--ranks", 2, "--rank-slots", "3,1", "--json"]
    said = json.loads(run("plan", *asked).stdout)
    # Three of four experts on the first rank: (9 + 6) of (11 + 10) tokens, over half of each.
    assert said["imbalance_before_mean"] == pytest.approx((9 / 5.5 + 6 / 5) / 2)
    rows = json.loads(run("compare", *asked, "--plot", tmp_path / "c.png").stdout)["rows"]
    unplanned = [row for row in rows if (row["algorithm"], row["split"]) == ("unplanned", "even")]
    assert unplanned[0]["imbalance_mean"] == pytest.approx(said["imbalance_before_mean"])


def test_plan_with_a_budget_has_uneven_layers(run, recorded):
    said = json.loads(run("plan", recorded, "--ranks", 4, "--budget", 6, "--json").stdout)
    assert said["slots"] is None
    assert said["slots_over_all_layers"] == 5 * 16 + 6


def test_plan_from_a_current_placement_counts_moves(run, tmp_path, planned):
    write(synthetic_loads(5, 16, tokens=10_000, dense_layers=1, seed=4), tmp_path / "now.csv", "csv")
    asked = ("plan", tmp_path / "now.csv", "--ranks", 4, "--current", planned, "--json")
    few = json.loads(run(*asked, "--algorithm", "incremental").stdout)
    from_scratch = json.loads(run(*asked, "--slots", 20).stdout)
    assert 0 < few["moves"] < from_scratch["moves"]


def test_option_of_one_algorithm_is_refused_by_others(run, recorded):
    result = run(
        "plan", recorded, "--ranks", 4, "--slots", 20, "--algorithm", "eplb", "--option", "groups=4", "--json"
    )
    assert result.exit_code == 0, result.output
    result = run("plan", recorded, "--ranks", 4, "--slots", 20, "--option", "groups=4")
    assert result.exit_code == 2
    assert "groups" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "nothing.json", "--ranks", 4), "nothing.json: there is no such file"),
        (("plan", "{recorded}", "--ranks", 4, "--slots", 15), "slots: 15"),
        (("plan", "{recorded}", "--ranks", 4, "--slots", 18), "slots: 18"),
        (("plan", "{recorded}", "--ranks", 0), "ranks"),
        (("plan", "{recorded}", "--ranks", 4, "--algorithm", "refind"), "did you mean 'refined'"),
        (("plan", "{recorded}", "--ranks", 4, "--option", "groups"), "option: 'groups' must be NAME=VALUE"),
        (("plan", "{recorded}", "--ranks", 4, "--option", "seed=1"), "option: seed"),
        (("plan", "{recorded}", "--ranks", 4, "--option", "affinity=1.02"), "of its own, --affinity"),
        (("plan", "{recorded}", "--ranks", 4, "--option", "loads=x"), "the argument LOADS"),
        (("plan", "{recorded}", "--ranks", 4, "--option", "progress=1"), "option: progress is no option"),
        (("plan", "{recorded}", "--ranks", 4, "--option", f"groups={'[' * 5000}"), "groups: is no option"),
        (("plan", "{recorded}", "--ranks", 4, "--dense-layers", "0-1"), "dense_layers: [0] are in the loads"),
        (("plan", "{recorded}", "--ranks", 4, "--current", "{recorded}"), "holds loads, not a placement"),
        (("plan", "none.json", "--ranks", 4, "--out", "/"), "out: / cannot be written"),
        (("plan", "none.json", "--ranks", 4, "--plot", "/x.mp3"), "plot: /x.mp3 is no picture's name"),
        (("compare", "none.json", "--ranks", 4, "--plot", "{recorded}"), "is no picture's name; name a .png"),
        (("simulate", "none.json", "--ranks", 4, "--plot", "{recorded}/x.png"), "x.png cannot be written"),
        (("plan", "{recorded}", "--ranks", 4, "--out", "{recorded}"), "is given to LOADS as well"),
        (("plan", "{recorded}", "--ranks", 4, "--out", "x.png", "--plot", "x.png"), "is --out as well"),
        (
            ("plan", "{recorded}", "--ranks", 4, "--algorithm", "omni", "--search-ms", 5),
            "search_ms: omni does not search",
        ),
        (("plan", "{planned}", "--ranks", 4), "holds a placement, not loads"),
        (("plan", "{map}", "--ranks", 4), "holds a placement, not loads"),
        (("show", "{planned}", "--ranks", 3), "ranks: 3 are given, but"),
        (
            ("show", "{planned}", "--pairs", "x.npz", "--traffic", "x.txt"),
            "traffic: x.txt is no picture's name",
        ),
        (("convert", "{planned}", "x", "--to", "sglang", "--slots", 40), "slots: 40 are given, but"),
        (("doctor", "--level", 2), "--level: is for the dispatchers of"),
        (("renumber", "x", "--out", "y", "--undo", "--force"), "undo: needs neither"),
        (("show", "{recorded}"), "holds loads, not a placement"),
        (("convert", "{recorded}", "x", "--to", "omni"), "error: 'omni' is no format of loads to write"),
        (
            ("convert", "{recorded}", "x", "--to", "csv", "--from", "npz"),
            "'npz' is no format, did you mean 'npy'",
        ),
    ],
)
def test_bad_arguments_are_refused_without_a_traceback(run, tmp_path, recorded, planned, arguments, message):
    sglang = tmp_path / "map.json"  # which does not say how many ranks there are
    sglang.write_text('{"physical_to_logical_map": [[0, 1]]}')
    files = {"recorded": recorded, "planned": planned, "map": sglang}
    result = run(*(str(argument).format(**files) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_show_draws_before_and_after(run, tmp_path, recorded, planned):
    result = run("show", planned, recorded, "--plot", tmp_path / "heat.png")
    assert result.exit_code == 0, result.output
    assert "refined" in result.stdout
    assert "mean of 4" in result.stdout
    assert drawn_share(tmp_path / "heat.png", left=0.55, right=0.85, top=0.2, bottom=0.8) > 0.8


def test_show_without_loads_describes_the_placement_alone(run, planned):
    result = run("show", planned)
    assert result.exit_code == 0, result.output
    assert "5 layers, 16 experts in 20 slots a layer on 4 ranks" in result.stdout
    assert "recorded LOADS" in result.stdout


def test_show_refuses_loads_of_another_model(run, tmp_path, planned):
    write(Loads.of(np.ones((5, 8))), tmp_path / "other.npy", "npy")
    result = run("show", planned, tmp_path / "other.npy")
    assert result.exit_code == 2
    assert "loads: have 8 experts, but the placement has 16" in result.stderr


def test_show_refuses_loads_of_another_numbering(run, tmp_path, recorded):
    loads = read_loads(recorded)
    named, placement = tmp_path / "named.json", tmp_path / "original.json"
    write(Loads(loads.tokens_WYE, loads.names, "renumbered"), named, "sglang")
    write(plan(Loads(loads.tokens_WYE, loads.names, "original"), ranks=4), placement, "epbackend")
    result = run("show", placement, named, "--plot", tmp_path / "heat.png")
    assert result.exit_code == 2
    assert "loads: they count experts by the numbers of renumbered" in result.stderr


def test_convert_there_and_back_keeps_the_placement(run, tmp_path, planned):
    there = run("convert", planned, tmp_path / "map.json", "--to", "vllm-ascend", "--dense-layers", "0")
    assert there.exit_code == 0, there.output
    assert "expert_map_path" in there.stdout
    back = run(
        "convert", tmp_path / "map.json", tmp_path / "p.json", "--to", "epbackend", "--dense-layers", "0"
    )
    assert back.exit_code == 0, back.output
    assert read_placement(tmp_path / "p.json").layers[1:] == read_placement(planned).layers[1:]


def test_layers_without_experts_are_put_back_once():
    loads = Loads.of(np.array([[1, 2], [3, 4]]))
    whole = with_dense(loads, (0, 2))
    assert whole.tokens_WYE[0].tolist() == [[0, 0], [1, 2], [0, 0], [3, 4]]
    assert with_dense(whole, (0, 2)) is whole
    assert with_dense(loads, ()) is loads
    with pytest.raises(
        ConfigError, match=r"dense_layers: \[0, 2\] are in the loads without a token, .* \[3\]"
    ):
        with_dense(whole, (0, 2, 3))
    with pytest.raises(ConfigError, match="dense_layers: 3 is no layer of a model with 3"):
        with_dense(loads, (3,))


def test_a_map_without_dense_layers_is_planned_from_and_shown(run, tmp_path, recorded, planned):
    """Beside loads that have the dense layer, as we record them, and beside loads that leave it out."""
    there, rest = tmp_path / "map.json", tmp_path / "rest.npy"
    assert run("convert", planned, there, "--to", "vllm-ascend", "--dense-layers", "0").exit_code == 0
    np.save(rest, read_loads(recorded).tokens_WYE[0][1:])
    for loads in (recorded, rest):
        result = run(
            "plan", loads, "--ranks", 4, "--algorithm", "incremental", "--current", there, "--dense-layers", "0",
            "--json",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        said = json.loads(result.stdout)
        assert (said["layers"], said["slots_over_all_layers"]) == (4, 5 * 20)
        shown = run("show", there, loads, "--dense-layers", "0", "--plot", tmp_path / "heat.png")
        assert shown.exit_code == 0, shown.output
        assert "5 layers, 16 experts in 20 slots a layer" in shown.stdout
        assert "mean of 4" in shown.stdout


def test_convert_puts_dense_layers_back_into_loads(run, tmp_path):
    moe = synthetic_loads(4, 16, tokens=10_000, seed=3)
    write(moe, tmp_path / "moe.csv", "csv")
    done = run(
        "convert", tmp_path / "moe.csv", tmp_path / "all.json", "--to", "sglang", "--dense-layers", "0,2"
    )
    assert done.exit_code == 0, done.output
    assert read_loads([tmp_path / "all.json"]).loaded_layers == (1, 3, 4, 5)


def test_convert_warns_of_layers_that_look_dense(run, tmp_path, planned):
    result = run("convert", planned, tmp_path / "pattern.npy", "--to", "omni")
    assert result.exit_code == 0, result.output
    assert (
        "warning: layers 0 are not planned; if they have no experts, say so: --dense-layers 0"
        in result.stderr
    )


def test_convert_statistics_of_lmdeploy_as_loads_or_as_its_placement(run, tmp_path, recorded):
    statistics = tmp_path / "statistics.json"
    assert run("convert", recorded, statistics, "--to", "lmdeploy").exit_code == 0
    assert "loads of 4 layers" in run("convert", statistics, tmp_path / "l.csv", "--to", "csv").stdout
    made = run("convert", statistics, tmp_path / "p.json", "--to", "epbackend", "--ranks", 4, "--slots", 20)
    assert "placement of 5 layers" in made.stdout
    assert read_placement(tmp_path / "p.json").slots == 20


@pytest.mark.parametrize(("text", "layers"), [("", ()), ("0-2", (0, 1, 2)), ("1,5-6", (1, 5, 6))])
def test_layer_numbers_are_parsed(text, layers):
    assert layer_numbers(text) == layers


@pytest.mark.parametrize("text", ["x", "-1", "1-", "2-1", "1--2", "0-999999999"])
def test_malformed_layer_numbers_are_refused(text):
    with pytest.raises(ConfigError, match="dense_layers"):
        layer_numbers(text)


def test_every_command_is_listed_and_loads(run):
    listed = run("--help").stdout
    for name in COMMANDS:
        assert f" {name} " in listed
        assert run(name, "--help").exit_code == 0


BARE = """
import json
import sys
for name in ("torch", "lmdeploy", "transformers", "epbackend.config", "epbackend.engines"):
    sys.modules[name] = None
from epbackend.cli import main
for command in json.loads(sys.argv[1]):
    sys.argv = ["epbackend", *command]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
    print("ENDED")
"""


def test_placement_commands_need_neither_torch_nor_lmdeploy(tmp_path, recorded):
    placement = tmp_path / "even.json"
    write(Placement.even(5, 16, 4), placement, "epbackend")
    commands = [
        ["plan", str(recorded), "--ranks", "4", "--slots", "20", "--json"],
        ["compare", str(recorded), "--ranks", "4", "--slots", "20", "--json"],
        ["convert", str(recorded), "x.csv", "--to", "csv"],
        ["show", str(placement), str(recorded)],
    ]
    result = subprocess.run(
        [sys.executable, "-c", BARE, json.dumps(commands)], cwd=tmp_path,
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    *said, rest = result.stdout.split("ENDED\n")
    assert (len(said), all(said), rest) == (len(commands), True, "")


def test_command_without_its_packages_names_what_to_install(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", BARE, json.dumps([["doctor"]])],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert (
        "torch is not installed, which epbackend doctor needs: pip install 'epbackend[cpu]'" in result.stderr
    )


@pytest.fixture
def counted(tmp_path):
    """Loads and pairs of the same tokens of a model with 2 layers of 16 experts."""
    routes = [synthetic_routes(2000, 16, 4, topics=4, seed=layer) for layer in range(2)]
    pairs = Pairs.of_routes(routes, 16)
    write_pairs(pairs, tmp_path / "pairs.npz")
    write(Loads.of(pairs.loads_YE), tmp_path / "counted.json", "sglang")
    return tmp_path / "counted.json", tmp_path / "pairs.npz"


def test_plan_with_affinity_visits_less_and_show_draws_the_traffic(run, tmp_path, counted):
    loads, pairs = counted
    out, traffic = tmp_path / "placement.json", tmp_path / "traffic.png"
    asked = ("plan", loads, "--ranks", 8, "--slots", 24, "--node-size", 2, "--pairs", pairs)
    said = json.loads(run(*asked, "--affinity", 1.1, "--out", out, "--json").stdout)
    assert said["visits"]["planned"]["other_nodes"] < said["visits"]["balanced"]["other_nodes"]
    assert said["visits"]["planned"]["bytes_across"] < said["visits"]["balanced"]["bytes_across"]
    table = run(*asked).stdout
    assert "nodes besides its own" in table
    shown = run("show", out, loads, "--pairs", pairs, "--traffic", traffic, "--plot", tmp_path / "load.png")
    assert shown.exit_code == 0, shown.output
    assert "affinity 1.1" in shown.stdout
    assert "KB to other nodes" in shown.stdout
    assert drawn_share(traffic, left=0.1, right=0.8, top=0.3, bottom=0.7) > 0.5
    without = run("plan", loads, "--ranks", 8, "--affinity", 1.1)
    assert without.exit_code == 2
    assert "affinity: needs --pairs FILE" in str(without.exception) + without.output


def test_compare_with_pairs_says_what_tokens_visit(run, tmp_path, counted):
    loads, pairs = counted
    plot = tmp_path / "compare.png"
    asked = ("compare", loads, "--ranks", 8, "--slots", 24, "--node-size", 2, "--plot", plot)
    said = json.loads(run(*asked, "--pairs", pairs, "--json").stdout)
    rows = {(row["algorithm"], row["split"]): row for row in said["rows"]}
    visits = {algorithm: row["visits"] for (algorithm, _), row in rows.items() if "visits" in row}
    assert {split for (_, split), row in rows.items() if "visits" in row} == {"nearest"}
    assert set(visits) == {algorithm for algorithm, _ in rows}
    less, more = visits["refined+affinity"], visits["refined"]
    for what in ("ranks", "other_nodes", "bytes_across"):
        assert less[what] < more[what]
    assert rows["refined+affinity", "nearest"]["imbalance_worst"] <= 1.02 + 1e-9
    # All four splits are drawn, each in its colour, and bars of visits in the last panel alone.
    for split in SPLITS:
        assert colour_share(plot, MARKS[split][0], right=0.72) > 1e-4
    assert colour_share(plot, MARKS["nearest"][0], left=0.72) > 0.01
    for split in set(SPLITS) - {"nearest"}:
        assert colour_share(plot, MARKS[split][0], left=0.72, bottom=0.85) == 0
    table = run(*asked, "--pairs", pairs).stdout
    assert f"{less['other_nodes']:.3f}" in table
    assert f"{less['bytes_within'] / 1e3:.1f}" in table
    assert "visits" not in run(*asked, "--json").stdout
    write_pairs(Pairs(np.zeros((3, 16, 16))), tmp_path / "other.npz")
    refused = run(*asked, "--pairs", tmp_path / "other.npz")
    assert refused.exit_code == 2
    assert "has 3 layers, but the loads 2" in str(refused.exception) + refused.output
