"""The direction of dependency: cli > bench > conformance > model > ops > hal < backends."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINE = ("hal", "ops", "model", "conformance", "bench", "cli")
ROOMS = (*LINE, "backends")
MAY_IMPORT = {room: set(LINE[: i + 1]) for i, room in enumerate(LINE)} | {"backends": {"hal", "backends"}}
BY_NAME = {"hal": {"backends", "ops"}}  # hal finds chips and contracts by listing their folders
CONFORMANCE = ("cases", "execution", "judgement", "report", "runner", "diff", "selftest")  # its rooms, from left to right
# Methods that hand over to what is written with their class.
SHORTCUTS = (
    ("porthal.model.glm5", "porthal.model.generate"),
    ("porthal.hal.contract", "porthal.hal.binding"),
    ("porthal.backends.torch.backend", "porthal.backends.torch.capture"),
    ("porthal.backends.onnxruntime.backend", "porthal.backends.onnxruntime.graph"),
)
PLUGINS = "peers/"  # of bench: packages apart, that see of porthal what any plugin sees
EDITED = "selftest/"  # of conformance: plants defects in backends' sources, so it names them
FILES_IN_MODEL = {"config.py", "checkpoint.py", "quantised.py", "quantising.py", "tokens.py"}
ARRAYS_IN_MODEL = FILES_IN_MODEL | {"demo/corpus.py", "demo/train.py"}  # scripts


class Import(NamedTuple):
    line: int
    target: str
    by_name: bool = False  # importlib.import_module("...")


def imports(source: str) -> Iterator[Import]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module == "porthal":
                yield from (Import(node.lineno, f"porthal.{alias.name}") for alias in node.names)
            else:
                yield Import(node.lineno, module)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0]
            if isinstance(name, ast.JoinedStr):
                name = name.values[0]
            if called == "import_module" and isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield Import(node.lineno, name.value, by_name=True)


def objection(room: str, path: str, found: Import) -> str | None:
    """Why a file of a room may not have this import, or None."""
    package, _, rest = found.target.partition(".")
    target = rest.split(".")[0]
    if found.target.startswith("."):
        return "is relative"
    if package in ROOMS:
        return f"makes a second copy of porthal.{package}"
    if package == "porthal" and room != "cli" and target not in ROOMS:
        return "goes through the facade"
    if room == "conformance" and path.startswith(EDITED) and target == "backends":
        return None
    if package == "porthal" and target in ROOMS and target not in MAY_IMPORT[room]:
        return None if found.by_name and target in BY_NAME.get(room, ()) else f"points up, from {room} to {target}"
    if room == "model" and package in ("numpy", "torch") and path not in ARRAYS_IN_MODEL:
        return "computes outside the binding's ops"
    return None


@pytest.mark.parametrize("room", ROOMS)
def test_imports_follow_the_line(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files, f"{room}/ has no Python file"
    wrong = []
    for file in files:
        path = file.relative_to(ROOT / room).as_posix()
        for found in imports(file.read_text(encoding="utf-8")):
            if why := objection("backends" if room == "bench" and path.startswith(PLUGINS) else room, path, found):
                wrong.append(f"{room}/{path}:{found.line}: import of {found.target} {why}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("room", "path", "source", "why"),
    [
        ("hal", "x.py", "from porthal.ops import rms_norm", "points up, from hal to ops"),
        ("hal", "x.py", "import_module('porthal.model')", "points up, from hal to model"),
        ("hal", "x.py", "importlib.import_module(f'porthal.backends.{name}')", None),
        ("hal", "x.py", "from porthal.backends.cpu import Cpu", "points up, from hal to backends"),
        ("ops", "x.py", "def f():\n    from porthal import model", "points up, from ops to model"),
        ("ops", "x.py", "from porthal import bind", "goes through the facade"),
        ("backends", "cpu/x.py", "import porthal.ops.topk", "points up, from backends to ops"),
        ("backends", "ascend/x.py", "from porthal.backends.torch import Torch", None),
        ("bench", "x.py", "from porthal.conformance import judge", None),
        ("conformance", "x.py", "from porthal.bench import peaks", "points up, from conformance to bench"),
        ("conformance", "x.py", "import porthal.backends.cpu.backend", "points up, from conformance to backends"),
        ("conformance", "selftest/x.py", "from porthal.backends.torch.backend import Torch", None),
        ("cli", "x.py", "import porthal", None),
        ("cli", "x.py", "from .text import table", "is relative"),
        ("cli", "x.py", "import hal.registry", "makes a second copy of porthal.hal"),
        ("model", "attention.py", "import numpy as np", "computes outside the binding's ops"),
        ("model", "checkpoint.py", "import numpy as np", None),
    ],
)
def test_the_rule_itself(room, path, source, why):
    (found,) = imports(source)
    assert objection(room, path, found) == why


def modules(folder: Path, package: str) -> dict[str, Path]:
    """The modules of a folder by their full names."""
    found = {}
    for file in folder.rglob("*.py"):
        parts = file.relative_to(folder).with_suffix("").parts
        found[".".join((package, *(p for p in parts if p != "__init__")))] = file
    return found


def graph(known: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> the modules among these that it imports, also inside functions; for types alone does not count."""
    found = {}
    for name, file in known.items():
        pairs = _targets(file.read_text(encoding="utf-8"))
        targets = {f"{module}.{part}" if f"{module}.{part}" in known else module for module, part in pairs}
        found[name] = {t for t in targets if t in known and t != name}
    return found


def _targets(source: str) -> Iterator[tuple[str, str]]:
    """What a program imports: modules, and what of each ("" where it is the module itself)."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def circles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """The groups of modules that reach one another."""
    reach = {name: set(targets) for name, targets in arrows.items()}
    for middle in reach:
        for name in reach:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    return [c for c in {frozenset(b for b in reach if b in reach[a] and a in reach[b]) for a in reach} if c]


def backward(arrows: dict[str, set[str]]) -> list[str]:
    """Imports between rooms of conformance that do not point left."""
    room = {name: parts[2] for name in arrows if len(parts := name.split(".")) > 3}
    order = {name: CONFORMANCE.index(r) for name, r in room.items()}
    return [f"{a} imports {b}" for a in order for b in arrows[a] if b in order and order[b] > order[a]]


@pytest.mark.parametrize("room", ROOMS)
def test_no_imports_run_in_a_circle(room):
    arrows = graph(modules(ROOT / room, f"porthal.{room}"))
    for name, target in SHORTCUTS:
        arrows.get(name, set()).discard(target)
    assert circles(arrows) == []


def test_the_rooms_of_conformance_form_a_line():
    folders = {path.name for path in (ROOT / "conformance").iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(CONFORMANCE)
    assert backward(graph(modules(ROOT / "conformance", "porthal.conformance"))) == []


def test_a_circle_and_a_step_back_would_be_seen():
    a, b = "porthal.conformance.cases.a", "porthal.conformance.judgement.b"
    assert backward({a: {b}, b: set()}) == [f"{a} imports {b}"]
    assert backward({a: set(), b: {a}}) == []
    assert circles({a: {b}, b: {a}, "c": {a}}) == [{a, b}]
    assert set(_targets("if TYPE_CHECKING:\n    from x import y\ndef f():\n    from p.q import r\nimport m.n")) == {
        ("p.q", "r"),
        ("m.n", ""),
    }


def test_hal_needs_numpy_alone():
    program = """
import sys

class OnlyNumpy:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("numpy", "porthal"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, OnlyNumpy())
import porthal, porthal.hal
from porthal.hal import *
print(sorted(m for m in ("torch", "ml_dtypes", "rich", "typer", "jinja2", "safetensors") if m in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
