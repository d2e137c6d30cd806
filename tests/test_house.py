"""The rules of the house: the core works alone, imports only itself, and is short."""
import ast
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.common import ROOT, psnr, run_command

CORE = ["sd", "model", "sampler", "clip", "vae"]
FILES = {
    "README.md", "LICENSE", "requirements.txt", "requirements-test.txt", "pyproject.toml",
    ".gitignore", "train.py", "test_sd.py", *(f"{name}.py" for name in CORE)}
FOLDERS = {".ci", "extras", "tests", "docs", "tools", "lecture", "examples", "data", "weights"}
DOORS = {("sd", "extras.cli"), ("sd", "extras.formats")}


# --- the core works alone ---

DRAW = """
import sys
import numpy as np
import torch
from sd import StableDiffusion
sd = StableDiffusion.load(None, "cpu", torch.float32{options})
np.save(sys.argv[1], np.asarray(sd.generate("a red apple")[0]))
assert any(name.startswith("extras") for name in sys.modules) == {extras}
"""


def apple(folder: Path, path: Path, extras: bool, options: str = "") -> np.ndarray:
    """What a new process draws there; `extras`: whether it imports any of them."""
    run_command("-c", DRAW.format(options=options, extras=extras), path, cwd=folder)
    return np.load(path)


def test_the_core_alone_draws_the_same_picture(tmp_path):
    """The five files and weights/, in an empty folder."""
    alone = tmp_path / "core"
    shutil.copytree(ROOT / "weights", alone / "weights")
    for name in CORE:
        shutil.copy(ROOT / f"{name}.py", alone)
    found = apple(alone, tmp_path / "alone.npy", extras=False)
    plain = apple(ROOT, tmp_path / "plain.npy", extras=True, options=", fast=False")
    fast = apple(ROOT, tmp_path / "fast.npy", extras=True)
    assert found.shape == (128, 128, 3) and found.std() > 30
    assert np.array_equal(found, plain)
    assert psnr(found, fast) >= 50


# --- imports ---

def modules() -> dict[str, Path]:
    """The modules of the project that others import: name -> file."""
    found = {path.stem: path for path in ROOT.glob("*.py") if path.stem != "test_sd"}
    return found | {f"extras.{path.stem}": path for path in (ROOT / "extras").glob("*.py")}


def imported(node: ast.AST, known: dict[str, Path]) -> set[str]:
    """Modules of the project that an import statement names."""
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide what is imported"
        names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return {name for name in names if name in known}


def imports(path: Path, known: dict[str, Path]) -> tuple[set[str], set[str]]:
    """What a module imports when it is imported, and what it imports later.

    Later: within functions, or where it runs as a program.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    everything = set().union(*(imported(node, known) for node in ast.walk(tree)))
    at_once = set()
    nodes = list(tree.body)
    while nodes:
        node = nodes.pop()
        at_once |= imported(node, known)
        is_door = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        if not is_door and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes += ast.iter_child_nodes(node)
    return at_once, everything - at_once


def test_the_core_imports_only_the_core():
    """At import time. The doors of sd.py lead to extras/."""
    known, doors = modules(), set()
    assert set(CORE) <= set(known)
    for name in CORE:
        at_once, later = imports(known[name], known)
        assert at_once <= set(CORE), name
        doors |= {(name, target) for target in later}
    assert doors == DOORS


def test_no_module_imports_itself_by_way_of_others():
    """Imports within functions count too, but for the doors."""
    known = modules()
    graph = {name: set().union(*imports(path, known)) for name, path in known.items()}
    for name, target in DOORS:
        graph[name].discard(target)
    while graph:
        leaves = {name for name, targets in graph.items() if not targets & set(graph)}
        assert leaves, f"circles among {sorted(graph)}"
        graph = {name: targets for name, targets in graph.items() if name not in leaves}


# --- length ---

def test_no_line_is_over_100_columns():
    long = []
    for path in ROOT.rglob("*.py"):
        place = path.relative_to(ROOT)
        if any(part.startswith(".") or part in ("venv", "runs") for part in place.parts):
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        long += [f"{place}:{i}" for i, line in enumerate(lines, 1) if len(line) > 100]
    assert long == []


@pytest.mark.parametrize("name", CORE)
def test_no_function_of_the_core_is_over_45_lines(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > 45} == {}


# --- the top level ---

def test_the_top_level_holds_the_readers_files_only():
    """What git holds, or would hold after `git add`."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"],
                            cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("needs a git repository, to know which files are the project's")
    paths = [Path(line) for line in listed.stdout.splitlines()]
    assert {path.name for path in paths if len(path.parts) == 1} <= FILES
    assert {path.parts[0] for path in paths if len(path.parts) > 1} <= FOLDERS
    assert {f"{name}.py" for name in CORE} <= {path.name for path in paths}
