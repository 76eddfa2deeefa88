"""Every block of code in the documents: commands go through our parser, settings through the config, Python runs.

What a block shows of an output is compared elsewhere, or dated in the text. README.zh-CN.md has the blocks of
README.md (`test_docs.py`).
"""

from __future__ import annotations

import ast
import configparser
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from epbackend import EPConfig
from epbackend.cli import app
from epbackend.cli.session import load_config
from epbackend.models import resolve
from epbackend.placement.formats import write
from epbackend.placement.objectives import read_table
from epbackend.placement.synthetic import synthetic_loads
from tests.helpers.patience import PATIENCE_S

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "tests" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TARGETS = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
KNOWN = ("epbackend", "make", "torchrun", "ray")
"""Programs that a block calls."""
SHOWN = {"architecture.md": 1, "ascend.md": 6, "configuration.md": 1}
"""Blocks without a command: a picture; what tests/ascend/test_docs.py writes; an output, which is tested below."""


@dataclass(frozen=True)
class Block:
    document: str
    line: int
    language: str
    text: str

    @property
    def commands(self) -> Iterator[list[str]]:
        """Of a shell: all lines, or those behind a `$` where outputs stand between them."""
        lines = self.text.splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        for line in lines:
            command = re.sub(r"^([A-Z_]+=\S+ )+", "", line)
            if command.startswith(tuple(f"{program} " for program in KNOWN)):
                words = shlex.split(command, comments=True)
                yield words[: words.index(">")] if ">" in words else words


def blocks() -> list[Block]:
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(document.name, line, match[1], match[2]))
    return found


BLOCKS = blocks()


def of(*languages: str) -> Any:
    chosen = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=lambda block: f"{block.document}:{block.line}")


def test_every_block_is_of_a_kind_that_is_tested():
    silent = [block for block in BLOCKS if block.language in ("", "bash") and not list(block.commands)]
    counted = {name: sum(block.document == name for block in silent) for name in {b.document for b in silent}}
    assert counted == SHOWN
    assert {block.language for block in BLOCKS} <= {"", "bash", "python", "yaml", "json", "toml", "ini"}


@of("", "bash")
def test_commands_are_such_as_the_parser_takes(block):
    for program, *words in block.commands:
        if program == "epbackend":
            parse(words)
        elif program == "make":
            assert words[0] in TARGETS
        elif program == "torchrun":
            assert any((ROOT / word).is_file() for word in words)


@pytest.mark.parametrize("file", sorted((ROOT / "docker").iterdir()), ids=lambda path: path.name)
def test_what_an_image_is_told_to_run_is_such_as_the_parser_takes(file):
    comments = re.sub(r" \\\n# +", " ", file.read_text(encoding="utf-8"))
    (command,) = re.findall(r"^# +docker run (.*)$", comments, re.MULTILINE)
    words = shlex.split(command)
    image = next(i for i, word in enumerate(words) if word.partition(":")[0] == "epbackend")
    parse(words[image + 1 :])


@of("python")
def test_python_compiles_and_what_it_takes_from_packages_is_there(block):
    tree = ast.parse(block.text)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(imports, []), block.document, "exec"), names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts = ast.unparse(node).split(".")
            if parts[0] in names and all(map(str.isidentifier, parts)):
                found = names[parts[0]]
                for part in parts[1:]:
                    found = getattr(found, part)


@of("yaml", "json", "toml", "ini")
def test_settings_are_read_by_what_reads_them(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no file that is named is needed yet
    if block.language == "json":
        (tmp_path / "costs.json").write_text(block.text)
        assert read_table(tmp_path / "costs.json").cost_XA
        return
    if block.language == "toml":
        (group,) = tomllib.loads(block.text)["project"]["entry-points"]
        assert f'"{group}"' in (ROOT / "epbackend" / "names.py").read_text(encoding="utf-8")
        return
    if block.language == "ini":
        unit = configparser.ConfigParser(strict=False)
        unit.optionxform = str  # type: ignore[assignment,method-assign]
        unit.read_string(block.text)
        parse(shlex.split(unit["Service"]["ExecStart"])[1:])
        return
    said = yaml.safe_load(block.text)
    if "containers" in said:
        for container in said["containers"]:
            parse(container["command"][1:])
        return
    whole = block.text if "ep_size" in said else f"ep_size: 2\n{block.text}"  # some show a section alone
    (tmp_path / "my.yaml").write_text(whole)
    EPConfig.load(tmp_path / "my.yaml")


def test_the_documented_output_of_a_bad_config_is_what_is_said(tmp_path, monkeypatch):
    (block,) = (each for each in BLOCKS if each.text.startswith("my.yaml: "))
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("ep_level: 3\nepsize: 2\n")
    result = CliRunner().invoke(app, ["config", "check", "my.yaml"])
    assert " ".join(block.text.split()) in " ".join(result.output.split())


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the blocks name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "MODEL").symlink_to(resolve("tiny-qwen3-moe"))
    (tmp_path / "C").symlink_to(ROOT / "configs" / "cpu-demo.yaml")
    (tmp_path / "FILE").write_text("def main(\nIn the year 1861\n")
    (tmp_path / "my.yaml").write_text("{device: cpu, ep_size: 2}")
    for seed, name in enumerate(["LOADS", "loads1.json", "loads2.json", "day.json", "later.json"]):
        write(synthetic_loads(seed=seed), tmp_path / name, "sglang")
    return tmp_path


ENDLESS = ("chat", "serve", "top", "run")
"""Commands that wait for somebody; other tests start them."""
SHELLS = [
    block
    for block in BLOCKS
    if block.language == ""
    and any(words[0] == "epbackend" and words[1] not in ENDLESS for words in block.commands)
]


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("block", SHELLS, ids=lambda block: f"{block.document}:{block.line}")
def test_commands_that_end_by_themselves_run(block, workplace):
    for program, *words in block.commands:
        if program != "epbackend" or words[0] in ENDLESS:
            continue
        needs_loads = "loads.json" in words and not Path("loads.json").exists()
        if needs_loads or words[:2] == ["renumber", "MODEL"]:
            execute("record", "MODEL", "--config", "C", "--prompts", "FILE", "--out", "loads.json")
        if "placement.json" in words and not Path("placement.json").exists():
            execute("plan", "LOADS", "--ranks", "32", "--slots", "288", "--out", "placement.json")
        execute(*("my.yaml" if word == "FILE" and words[0] == "config" else word for word in words))


@pytest.mark.slow
@pytest.mark.engine
def test_python_of_the_readme_and_of_planning_runs(workplace):
    """In a process each, as a script."""
    write(synthetic_loads(seed=9), workplace / "night.pt", "sglang")
    execute("record", "MODEL", "--config", "C", "--prompts", "FILE", "--out", "loads.json")
    texts = [block.text for block in BLOCKS if block.language == "python"]
    scripts = [text for text in texts if "epbackend.pipeline(" in text or "from epbackend.placement" in text]
    assert len(scripts) == 4
    for number, text in enumerate(scripts):
        script = workplace / f"script{number}.py"
        script.write_text(text)
        call([sys.executable, str(script)])


def execute(*words: str) -> None:
    call([sys.executable, "-m", "epbackend", *words])


def call(command: list[str]) -> None:
    """Run it in the current folder; fail unless it ends well."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)
    assert ended.returncode == 0, f"{command}\n{ended.stdout}{ended.stderr}"


def parse(words: list[str]) -> None:
    """Fail unless these words after `epbackend` are options and arguments that it takes, with values that they take."""
    command, context = typer.main.get_command(app), None
    name, rest = "epbackend", words
    while hasattr(command, "resolve_command"):
        context = command.make_context(name, rest, parent=context)
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    given = command.make_context(name, rest, parent=context).params
    settings = {name: given.get(name) for name in inspect.signature(load_config).parameters}
    if settings["config"] and not (ROOT / settings["config"]).is_file():  # a placeholder
        settings["config"] = None
    load_config(**settings)
