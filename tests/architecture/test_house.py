"""The house's own rules beside import-linter's layers: sizes, names, sleeps, effects, wheel, documentation."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tools import load_tool

from clarion.crashpoints import EFFECTS
from clarion.errors import ClarionError
from clarion.loading import PACKAGES, check_package_names

ROOT = Path(__file__).parents[2]
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
# The options of a command are given by name, each with a default of its own.
MANY_OPTIONS = {"console/replay_cli.py replay_plan", "console/load_cli.py load_studies"}
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS, MAX_NESTING = 500, 60, 8, 4
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "types", "manager", "misc"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_IMPORTS = {"pickle", "marshal", "shelve"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_sizes(path: Path) -> None:
    """DESIGN section 7: what the build refuses."""
    assert len(path.read_text().splitlines()) <= MAX_FILE
    for function in functions(path):
        where = f"{name_of(path)}:{function.lineno} {function.name}"
        body = function.body[1:] if ast.get_docstring(function) else function.body
        lines = body[-1].end_lineno - body[0].lineno + 1 if body and body[-1].end_lineno else 0
        arguments = function.args
        count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
        own = sum(one.arg in {"self", "cls"} for one in arguments.args[:1])
        assert lines <= MAX_FUNCTION, f"{where} has {lines} lines"
        many = f"{name_of(path)} {function.name}" in MANY_OPTIONS
        assert many or count - own <= MAX_PARAMETERS, f"{where} has {count - own} parameters"
        assert nesting(function) <= MAX_NESTING, f"{where} nests {nesting(function)} deep"


def nesting(node: ast.AST, depth: int = 0) -> int:
    deeper = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
    here = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            continue
        chained = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        here = max(here, nesting(child, depth + (isinstance(child, deeper) and not chained)))
    return here


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_names_and_forbidden_calls(path: Path) -> None:
    assert path.stem not in FORBIDDEN_NAMES
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else ""
            assert called not in FORBIDDEN_CALLS, f"{name_of(path)}:{node.lineno} calls {called}"
            assert not any(one.arg == "shell" for one in node.keywords), f"{name_of(path)}:{node.lineno} shell="
            assert not _is(node.func, "os", "system")
            assert not _is(node.func, "yaml", "load")
        if isinstance(node, ast.Import):
            assert not FORBIDDEN_IMPORTS & {one.name for one in node.names}, name_of(path)
        if isinstance(node, ast.ImportFrom):
            assert node.module not in FORBIDDEN_IMPORTS, name_of(path)


def _is(node: ast.expr, module: str, attribute: str) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == attribute and getattr(node.value, "id", "") == module


@pytest.mark.parametrize("path", [one for one in TESTS if one != Path(__file__)], ids=name_of)
def test_nobody_sleeps_in_tests(path: Path) -> None:
    """A test waits for the thing itself, with a deadline."""
    text = path.read_text()
    assert not re.search(r"\bsleep\(", text)
    assert "unittest.mock" not in text


def test_root_packages_are_the_ones_declared() -> None:
    """The hole that an exhaustive contract leaves: a package nobody placed."""
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    linted = re.search(r"root_packages =\n((?:    \w+\n)+)", (ROOT / ".importlinter").read_text())
    assert linted is not None
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    assert found == set(linted.group(1).split()) == set(declared) == set(PACKAGES)


def test_our_package_names_are_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    check_package_names()
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"rules": ["clarion-gateway", "rules"]})
    with pytest.raises(ClarionError, match="'rules' also comes from rules"):
        check_package_names()


# Effects --------------------------------------------------------------------------------------------------------

# Calls that change the world, by attribute name; each stands inside `with effect(...)`, or in a place named below.
WORLD = {"fsync", "fdatasync", "Popen", "send_c_store", "send_n_action", "send_msg", "transaction"}
ELSEWHERE = {
    "clarion/adapters/files.py:sync_folder",  # always called within an effect or at start
    "clarion/adapters/database.py:create",  # tables, before any stage works
    "clarion/testing/pacs.py:_write_synced",  # the PACS is a peer, not part of the flow
    "console/demo.py:_start_pacs",
    "console/supervisor.py:_spawn",
    "gateway/scu.py:store",  # its callers' effects: delivery.send
    "gateway/scu.py:ask_commitment",  # commitment.ask
    "gateway/journal.py:sync",  # recovery, before anything is received
}


def test_every_effect_has_crash_points() -> None:
    """F01: an effectful call outside an effect fails here; so does a name that is not in the list, or is unused."""
    used: set[str] = set()
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        inside = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.With):
                for item in node.items:
                    call = item.context_expr
                    if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "effect":
                        assert isinstance(call.args[0], ast.Constant)
                        used.add(str(call.args[0].value))
                        inside |= {id(one) for one in ast.walk(node)}
        for function in [one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef)]:
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in WORLD and id(node) not in inside:
                    where = f"{name_of(path)}:{function.name}"
                    assert where in ELSEWHERE, f"{where} (line {node.lineno}) changes the world outside an effect"
        used |= set(re.findall(r'reach\("(?:before|after):([a-z.]+)"\)', path.read_text()))
    assert used == set(EFFECTS)


# Wheel and documentation -----------------------------------------------------------------------------------------


def test_wheel_holds_our_packages_and_nothing_else(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {name for name in tops if not name.endswith(".dist-info")} == set(PACKAGES)
    tracked = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    packed = {name for name in names if name.split("/")[0] in PACKAGES}
    assert packed == set(tracked)
    for needed in ("clarion/bundled/chest-ct.yaml", "clarion/py.typed", "console/pages/static/htmx.min.js"):
        assert needed in packed


DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (path.parent / target).exists(), f"{name_of(path)} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_code_blocks_are_true(path: Path) -> None:
    """Every command and target in a shell block exists; every YAML and Python block parses."""
    import yaml

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for language, body in re.findall(r"```(\w*)\n(.*?)```", path.read_text(), re.DOTALL):
        if language in {"sh", "shell", "bash"}:
            for line in body.splitlines():
                for target in re.findall(r"(?:^|&& )make ([a-z-]+)", line):
                    assert target in targets, f"{name_of(path)}: make {target}"
                for words in re.findall(r"(?:^|&& |/)clarion ((?:[a-z]+ ?)+)", line):
                    assert _is_command(words.split()), f"{name_of(path)}: clarion {words}"
        elif language == "yaml":
            yaml.safe_load(body)
        elif language == "python":
            ast.parse(body)


def _is_command(words: list[str]) -> bool:
    """Follow the words down the command line; what comes after a command is its arguments."""
    from typer.main import get_command

    from console.main import cli

    command: Any = get_command(cli)
    for word in words:
        below = getattr(command, "commands", None)
        if below is None:
            return True
        if word not in below:
            return False
        command = below[word]
    return not hasattr(command, "commands")


def test_no_machine_paths_and_no_index_addresses() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        if name.endswith((".js", ".png")) or not (ROOT / name).exists():
            continue
        text = (ROOT / name).read_text()
        assert not re.search(r"(^|[^a-zA-Z0-9_.])/(work|farm|root|home/\w+)/", text) or name.endswith(
            "test_house.py"
        ), name
        if name.startswith("requirements/"):
            assert not re.search(r"https?://", text), name


def test_every_dependency_is_explained() -> None:
    """One line each in docs/decisions/dependencies.md."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    text = (ROOT / "docs/decisions/dependencies.md").read_text().lower()
    missing = {re.split(r"[\[<>=,;]", one)[0].lower() for one in wanted}
    assert not {one for one in missing if f"`{one}`" not in text}


def test_the_page_of_the_configuration_has_every_key() -> None:
    """`python tests/tools/write_configuration.py` makes its tables anew; what a key is for is written by hand."""
    tool = load_tool("write_configuration")
    text = tool.PAGE.read_text()
    assert text == tool.written(text), "run tests/tools/write_configuration.py"
    assert "|  |\n" not in text, "a key is not explained"
