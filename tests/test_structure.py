"""The shape of the code: no circles among imports, layers that exist, tests that share by helpers alone."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu
grimp = pytest.importorskip("grimp")
tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[1]


def test_imports_of_the_package_have_no_circle():
    """Nor do those inside functions, nor those for types alone: a module can be read after the ones that it uses."""
    graph = grimp.build_graph("epbackend", cache_dir=None)
    used = {
        # The packages around a module are loaded before it in any case.
        module: {
            name for name in graph.find_modules_directly_imported_by(module) if name not in _around(module)
        }
        for module in graph.modules
    }
    try:
        TopologicalSorter(used).prepare()
    except CycleError as error:
        pytest.fail(" is imported by ".join(error.args[1]))


def test_every_module_of_the_package_has_a_layer():
    """`lint-imports` checks the order of the layers that are listed."""
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = (contract["layers"] for contract in linter["contracts"] if contract["type"] == "layers")
    top = [path.with_suffix("") for path in (ROOT / "epbackend").glob("*.py") if path.stem != "__init__"]
    top += [path.parent for path in (ROOT / "epbackend").glob("*/__init__.py")]
    assert sorted(layers) == sorted(f"epbackend.{path.name}" for path in top)


def test_tests_import_helpers_and_no_other_test():
    """A test that imports another would be changed, and skipped, with it."""
    found = {}
    for path in (ROOT / "tests").rglob("*.py"):
        names = [name for name in _imported(path) if f"{name}.".startswith("tests.")]
        if wrong := [name for name in names if not f"{name}.".startswith("tests.helpers.")]:
            found[str(path.relative_to(ROOT))] = wrong
    assert found == {}


def _around(module: str) -> set[str]:
    parts = module.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def _imported(path: Path) -> set[str]:
    """The modules and names that a file imports, with dots before those that are named relative to it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'tests.' * node.level}{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_letter_of_a_shape_is_explained():
    """In the tables of docs/architecture.md, for all of the code or for the package; else by the module's docstring."""
    legend = Path("docs/architecture.md").read_text()
    _, common, packages = re.split(r"^\| letter \|", legend, flags=re.MULTILINE)
    everywhere = set(re.findall(r"^\| ([A-Z]) \|", common, re.MULTILINE))
    heads, _, *rows = packages.split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in row.strip("| ").split("|")] for row in rows]
    of_package = {
        package: {letter for letter, *meanings in cells if len(meanings) > number and meanings[number]}
        for number, head in enumerate(heads.strip("| ").split("|"))
        for package in re.findall(r"`([\w.]+)`", head)
    }
    assert {"T", "E", "Y"} <= everywhere
    assert of_package["kernels"] > {"H", "K"}
    unknown = []
    for path in sorted(Path("epbackend").rglob("*.py")):
        tree = ast.parse(path.read_text())
        known = everywhere | of_package.get(path.parts[1], set())
        docstring = ast.get_docstring(tree) or ""
        for name in {name for node in ast.walk(tree) if (name := variable(node))}:
            shape = re.search(r"[a-z0-9]_([A-Z0-9]*[A-Z][A-Z0-9]*)$", name)
            letters = set(re.sub(r"\d", "", shape[1])) if shape and not name.isupper() else set()
            unknown += [
                f"{path}: {letter} of {name}"
                for letter in letters - known
                if not re.search(rf"\b{letter}\b[ ,(]", docstring)
            ]
    assert not unknown


def variable(node: ast.AST) -> str | None:
    """The name that a node reads, sets or takes as an argument."""
    match node:
        case ast.Name():
            return node.id
        case ast.arg():
            return node.arg
        case ast.Attribute():
            return node.attr
    return None


MAKES_TENSORS = {"arange", "empty", "full", "ones", "rand", "randint", "randn", "tensor", "zeros"}


def test_tensors_name_their_dtype_and_device():
    """Else they follow torch.set_default_dtype and torch.set_default_device of whoever calls us."""
    found = []
    for path in (ROOT / "epbackend").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if ast.unparse(node.func.value) != "torch" or node.func.attr not in MAKES_TENSORS:
                continue
            named = {keyword.arg for keyword in node.keywords}
            if None not in named and not named >= {"dtype", "device"}:  # None: **options
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert found == []
