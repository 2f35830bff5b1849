"""What is kept of runs on emulated devices: docs/results/vendors.json is of the sources as they are now."""

from __future__ import annotations

import pytest

from porthal.conformance.report import vendors
from porthal.conformance.report.vendors import KEPT, hashed, kept, objection


@pytest.mark.parametrize("entry", kept(), ids=lambda entry: f"{entry['backend']}-{entry['op']}")
def test_a_result_is_of_these_sources(entry):
    assert objection(entry) == ""


def test_entries_are_one_line_each_and_in_order():
    keys = [(entry["backend"], entry["op"]) for entry in kept()]
    assert keys == sorted(set(keys)) and len(KEPT.read_text(encoding="utf-8").splitlines()) == len(keys) + 2


ADAPTER = """
from porthal.backends.torch.interfaces.shared import half
class Chip:
    kind = "c"

    def plan(self):
        return both()

    def topk(self, x):
        return LIB.best(x)

    topk.capturable = False

    @limits(k=MOST)
    def rope(self, x):
        return LIB.turn(half(x))

MOST = 3

def both():
    return 0
"""
STAND_IN = """
def best(x):
    return 1

def turn(x):
    return 2

def idle(x):
    return best(x)
"""
FILES = {
    "ops/topk.py": "TOPK = 1\n",
    "ops/rope.py": "from porthal.ops.topk import TOPK\n",
    "backends/torch/interfaces/shared.py": "def half(x):\n    return x\n",
    "backends/chip/backend.py": ADAPTER,
    "backends/chip/emulated/__init__.py": STAND_IN,
    "backends/chip/emulated/schemas.txt": "best(Tensor x)\n",
}


@pytest.fixture
def chip(tmp_path, monkeypatch):
    """An adapter with two ops and its stand-in, in a tree of their own."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(vendors, "ROOT", tmp_path)
    yield tmp_path
    forget()


def forget():
    vendors._pieces_of.cache_clear()
    vendors._by_ops.cache_clear()


def state():
    forget()
    return hashed("chip", "topk"), hashed("chip", "rope")


@pytest.mark.parametrize(("file", "old", "new", "stale"), [
    ("backends/chip/backend.py", "LIB.best(x)", "LIB.best(x, 1)", "topk"),
    ("backends/chip/backend.py", "capturable = False", "capturable = True", "topk"),
    ("backends/chip/backend.py", "k=MOST", "k=MOST + 1", "rope"),
    ("backends/chip/backend.py", "MOST = 3", "MOST = 4", "rope"),
    ("backends/torch/interfaces/shared.py", "return x", "return -x", "rope"),
    ("backends/chip/emulated/__init__.py", "return 1", "return 3", "topk"),
    ("backends/chip/emulated/__init__.py", "return 2", "return 3", "rope"),
    ("ops/rope.py", "TOPK", "TOPK as K", "rope"),
    ("backends/chip/backend.py", 'kind = "c"', 'kind = "d"', "topk rope"),
    ("backends/chip/backend.py", "return 0", "return 1", "topk rope"),
    ("backends/chip/emulated/__init__.py", "return best(x)", "return x", "topk rope"),
    ("backends/chip/emulated/schemas.txt", "Tensor x", "Tensor y", "topk rope"),
    ("ops/topk.py", "1", "2", "topk rope"),
    ("backends/chip/backend.py", "import half", "import half  # noqa", ""),
])  # fmt: skip
def test_a_change_makes_stale_what_it_may_concern(chip, file, old, new, stale):
    before = state()
    text = (chip / file).read_text()
    assert old in text
    (chip / file).write_text(text.replace(old, new))
    now = state()
    assert [op for op, a, b in zip(("topk", "rope"), before, now, strict=True) if a != b] == stale.split()
