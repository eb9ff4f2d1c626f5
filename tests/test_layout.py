"""Who may import whom: a room of harness/ only rooms above it, a script no room, models/ only torch and torchvision."""

import ast
import re
import subprocess
import sys

import mutate
import pytest
from helpers import ROOT, SCRIPTS

ROOMS = {  # in order, with the rooms that each may import
    "processes": "",
    "terminal": "processes",
    "devices": "terminal",
    "files": "terminal",
    "command_line": "terminal devices processes",
    "download": "terminal files",
    "synthetic": "",
    "data": "terminal download synthetic",
    "loader": "terminal processes",
    "muon": "",
    "training": "terminal processes devices",
    "operations": "",
    "records": "terminal files devices processes",
    "jobs": "terminal",
    "cluster": "terminal jobs",
    "statistics": "",
    "recipe": "terminal files",
    "drawing": "terminal files data statistics records",
    "results": "terminal statistics recipe",
    "shipped": "terminal files results",
    "pages": "terminal files drawing results shipped",
    "folder": "terminal files",
    "state": "terminal processes",
    "checkpoints": "terminal files processes operations recipe records folder state",
}
OURS = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


def modules(path):
    """Return the dotted names that a file imports. `from a import b` is a.b if that is a module of this repository."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            for name in node.names:
                inside = (ROOT / node.module.replace(".", "/") / f"{name.name}.py").exists()
                found.add(f"{node.module}.{name.name}" if inside else node.module)
    return found


def packages(path):
    return {name.partition(".")[0] for name in modules(path)}


def test_every_room_is_in_the_order():
    assert {path.stem for path in (ROOT / "harness").glob("*.py")} - {"__init__"} == ROOMS.keys()
    names = [*ROOMS]
    for name, allowed in ROOMS.items():
        assert set(allowed.split()) <= set(names[: names.index(name)]), f"{name} may import only rooms above it"
    assert re.findall(r"^\| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE) == names


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room):
    own = {name for name in modules(ROOT / "harness" / f"{room}.py") if name.partition(".")[0] in OURS}
    assert own <= {f"harness.{name}" for name in ROOMS[room].split()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_knows_no_room(name):
    assert packages(ROOT / name) & OURS <= {"utils", "models"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_utils_before_pytorch(name):
    """A Ctrl-C during the import of PyTorch is then one line, which tests/test_bad_input.py checks for r1."""
    imports = (ast.Import, ast.ImportFrom)
    first = next(node for node in ast.parse((ROOT / name).read_text()).body if isinstance(node, imports))
    assert [module.name for module in first.names] == ["utils"]


@pytest.mark.parametrize("path", [*(ROOT / "models").glob("*.py")], ids=lambda path: path.stem)
def test_models_import_torch_and_torchvision_only(path):
    assert packages(path) <= {"models", "torch", "torchvision"}


def test_each_mutation_is_of_one_place():
    for file, text, *_ in mutate.MUTATIONS:
        assert (ROOT / file).read_text().count(text) == 1, f"{file} has {text!r} not once"


@pytest.mark.long
def test_each_mutation_has_tests():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for file, text, _, files, expression in mutate.MUTATIONS:
        tests = [name for name in names if name.split("::")[0].removeprefix("tests/") in files.split()]
        words = [alternative.split(" and ") for alternative in expression.split(" or ")]
        selected = any(all(word in test for word in every) for every in words for test in tests)
        assert selected, f"{file}, {text!r}: {expression!r} selects no test"


def test_no_test_imports_a_test():
    for path in (ROOT / "tests").glob("*.py"):
        assert not {name for name in packages(path) if name == "conftest" or name.startswith("test_")}, path.name
