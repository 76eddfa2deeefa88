"""What the documents name is there: links, headings, files, make targets, commands, layers and shape letters."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from epbackend.cli import COMMANDS

pytestmark = pytest.mark.cpu
tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[1]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
CHINESE = ROOT / "README.zh-CN.md"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
DOCUMENTS = [
    ROOT / "README.md",
    CHINESE,
    ROOT / "CHANGELOG.md",
    ROOT / "tests" / "README.md",
    *(ROOT / "docs").glob("*.md"),
]
FOLDERS = ("epbackend", "docs", "tests", "benchmarks", "scripts", "examples", "configs", "requirements")
BASES = [ROOT, ROOT / "epbackend", ROOT / "docs", ROOT / "tests", ROOT / "epbackend/engines/lmdeploy"]
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED_SHAPE = re.compile(r"_?[a-z][a-z0-9_]*_([A-Z0-9]*[A-Z][A-Z0-9]*)")

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@every_document
def test_links_lead_to_files_and_headings_that_exist(document):
    broken = []
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (document.parent / name).resolve() if name else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@every_document
def test_files_that_are_named_exist(document):
    """A path, or the bare name of a Python file of ours; `*`, `<name>` and `{a,b}` stand for several."""
    python_files = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    text = document.read_text(encoding="utf-8")
    named = {part for span in re.findall(r"`([^`\n]+)`", text) for part in span.split()}
    missing = [name for name in sorted(named) if is_ours(name) and not exists(name, python_files)]
    assert missing == []


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE))
    for document in DOCUMENTS:
        assert set(re.findall(r"`make ([a-z0-9-]+)", document.read_text(encoding="utf-8"))) <= targets


def test_the_readme_names_the_commands_and_options_that_there_are():
    lines = [line.split("#")[0] for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    calls = [shlex.split(line) for line in lines if line.startswith("epbackend ")]
    assert calls
    for _, command, *words in calls:
        assert command in COMMANDS
        source = (ROOT / "epbackend" / "cli" / f"{command}.py").read_text(encoding="utf-8")
        shared = (ROOT / "epbackend" / "cli" / "session.py").read_text(encoding="utf-8")
        shared += (ROOT / "epbackend" / "cli" / "inputs.py").read_text(encoding="utf-8")
        for option in (word for word in words if word.startswith("--")):
            name = option.removeprefix("--").replace("-", "_")
            assert re.search(rf"\b{name}\b|{option}\b", source + shared), (command, option)


def test_the_chinese_readme_says_what_the_english_one_does():
    """The same headings, code (but for comments), tables and lists of links, in the same order."""
    english, chinese = (outline(path.read_text(encoding="utf-8")) for path in (ROOT / "README.md", CHINESE))
    assert [kind for kind, _ in chinese] == [kind for kind, _ in english]
    for (kind, theirs), (_, ours) in zip(english, chinese, strict=True):
        assert ours == theirs, kind
    assert "](README.zh-CN.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "](README.md)" in CHINESE.read_text(encoding="utf-8")


def test_the_layers_are_those_of_the_linter_in_its_order():
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = (contract["layers"] for contract in linter["contracts"] if contract["type"] == "layers")
    assert [f"epbackend.{row[0].strip('`')}" for row in table("layer")] == layers


def test_every_entry_point_group_is_in_the_architecture():
    groups = re.findall(
        r'"(epbackend\.[a-z]+s)"', (ROOT / "epbackend" / "names.py").read_text(encoding="utf-8")
    )
    text = ARCHITECTURE.read_text(encoding="utf-8")
    assert groups
    assert [group for group in groups if f"`{group}`" not in text] == []


def test_a_question_is_answered_by_at_most_five_files():
    for question, files, *_ in [*table("I want to know"), *table("I want to add")]:
        named = [name for name in re.findall(r"`([^`]+)`", files) if "/" in name or name.endswith(".py")]
        alternatives = files.count(" or ")
        assert 0 < len(named) - alternatives <= 5, question


@pytest.mark.parametrize(
    "path", sorted((ROOT / "epbackend").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_shape_letters_are_in_the_tables(path):
    """A letter of a module alone is explained in its docstring, as `Letters: Z ranks of a group`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known = set(general_letters()) | letters_of(path)
    _, _, explained = re.sub("Shapes", "Letters", ast.get_docstring(tree) or "").partition("Letters")
    unknown = {
        name
        for name in names(tree)
        if (shape := NAMED_SHAPE.fullmatch(name))
        for letter in re.findall("[A-Z]", shape[1])
        if letter not in known and not re.search(rf"\b{letter} [a-z]", explained)
    }
    assert unknown == set()


def test_every_letter_of_the_tables_is_there_once_and_used():
    letters = [*general_letters(), *(row[0] for row in table("letter", columns=5))]
    used = {
        letter
        for path in (ROOT / "epbackend").rglob("*.py")
        for name in names(ast.parse(path.read_text(encoding="utf-8")))
        if (shape := NAMED_SHAPE.fullmatch(name))
        for letter in shape[1]
    }
    assert len(letters) == len(set(letters))
    assert [letter for letter in letters if letter not in used] == []


def outline(text: str) -> list[tuple[str, object]]:
    """What does not depend on the language of a document, in its order: (kind, what it holds)."""
    found: list[tuple[str, object]] = []
    for index, part in enumerate(re.split(r"^```", text, flags=re.MULTILINE)):
        if index % 2:
            code = [re.sub(r"\s*#.*", "", line) for line in part.splitlines()]
            found.append(("code", code))
            continue
        for line in part.splitlines():
            if heading := re.match(r"#+ ", line):
                found.append(("heading", heading[0]))
            elif line.startswith("|"):
                found.append(("row", (line.count("|"), re.findall(r"`[^`]+`", line.split("|")[1]))))
            elif line.startswith("- ["):
                found.append(("link", line.split("]")[0]))
    return found


def anchors(file: Path) -> set[str]:
    """The headings of a document as GitHub makes links of them."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_ours(name: str) -> bool:
    """Whether this may be a file or folder of this repository, and nothing that a user makes."""
    if not re.fullmatch(r"[\w./*-]+", name) or name.startswith(("/", "-")):
        return False
    packages = [path.parent.name for path in (ROOT / "epbackend").glob("*/__init__.py")]
    return name.endswith(".py") or name.startswith(tuple(f"{folder}/" for folder in (*FOLDERS, *packages)))


def exists(name: str, python_files: set[str]) -> bool:
    if any(base.joinpath(name).exists() or list(base.glob(name)) for base in BASES):
        return True
    return name in python_files


def table(first: str, columns: int | None = None) -> list[list[str]]:
    """The rows of the table of docs/architecture.md whose first column has that head."""
    rows: list[list[str]] = []
    lines = ARCHITECTURE.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith(f"| {first} |") and columns in (None, len(cells)):
            for row in lines[number + 2 :]:
                if not row.startswith("|"):
                    return rows
                rows.append([cell.strip() for cell in row.strip("|").split("|")])
    raise AssertionError(f"no table of {first}")


def general_letters() -> list[str]:
    return [row[0] for row in table("letter", columns=2)]


def letters_of(path: Path) -> set[str]:
    """The letters that the package of a file has to itself."""
    package = path.relative_to(ROOT / "epbackend").parts[0]
    column = {"kernels": 2, "placement": 3, "cli": 3, "engines": 4}.get(package, 1)
    return {row[0] for row in table("letter", columns=5) if row[column]}


def names(tree: ast.AST) -> set[str]:
    """Everything that a module names: variables, attributes, parameters, functions."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case (
                ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.FunctionDef(name=name)
            ):
                found.add(name)
            case ast.keyword(arg=str(name)):
                found.add(name)
    return found


@pytest.mark.parametrize(
    "module", re.findall(r"^\t\$\(BIN\)/python -m (benchmarks\.\w+)", MAKEFILE, re.MULTILINE)
)
def test_a_benchmark_says_what_it_measures_before_it_starts(module, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert len(said.split("options:")[0]) > 200, said
