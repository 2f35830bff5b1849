"""A model on several ranks makes the text of one, reads its own experts only, and writes once."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from porthal.cli.ranks import ranked
from porthal.hal import Communicator, UsageError, bind, create, simulated
from porthal.model.generate import generate
from porthal.model.layout import Layout
from porthal.model.load import load
from tests.ranks import ROOT

PROMPTS = [list(b"    def get(self, name):\n"), list(b"import os\n"), list(b"class A")]
TEXT = "import os\n"


def texts(model: Any, drafts: int = 0) -> list[list[int]]:
    return generate(model, PROMPTS, 4, speculative=drafts).tokens


@pytest.fixture(scope="module")
def alone() -> dict[int, list[list[int]]]:
    model = load(binding=bind(backend=create("cpu")))
    return {drafts: texts(model, drafts) for drafts in (0, 2)}


@pytest.mark.parametrize(
    ("kind", "size", "drafts"),
    [("ep", 1, 0), ("ep", 3, 2), ("ep", 8, 0), ("dp+ep", 2, 0), ("dp+ep", 8, 2), ("tp+ep", 4, 2)],
)
def test_the_text_is_that_of_one_process_on_every_rank(kind, size, drafts, alone):
    """Of 8 ranks four have no expert, and with requests of their own five have none of them."""

    def run(wire: Any) -> Any:
        model = load(binding=bind(backend=create("cpu")), layout=Layout(Communicator.over(wire), kind))
        return texts(model, drafts)

    assert simulated(size, run, timeout=60) == [alone[drafts]] * size


def test_a_rank_reads_its_own_experts_and_no_others(monkeypatch):
    """An expert of the demo has 3 * 128 * 256 numbers of 2 bytes, and three layers have four."""
    from porthal.model.checkpoint import Checkpoint

    read: Counter[Any] = Counter()  # bytes of experts, by checkpoint, of which each rank opens its own
    held = Checkpoint.read

    def counted(self: Any, name: str, shape: Any, rows: slice) -> Any:
        values = held(self, name, shape, rows)
        read[self] += values.nbytes * (".experts." in name)
        return values

    monkeypatch.setattr(Checkpoint, "read", counted)
    expert = 3 * 128 * 256 * 2
    for size, own in ((1, 4), (2, 2)):
        read.clear()
        simulated(size, lambda wire: load(binding=bind(backend=create("cpu")), layout=Layout(Communicator.over(wire))))
        assert list(read.values()) == [3 * own * expert] * size


def test_what_does_not_fit_is_told_on_every_rank():
    def run(wire: Any) -> Any:
        comm = Communicator.over(wire)
        with pytest.raises(UsageError, match="num_attention_heads is 4 on 3 ranks, expected a number of ranks from 1, 2, 4"):
            load(binding=bind(backend=create("cpu")), layout=Layout(comm, "tp+ep"))
        return load(binding=bind(backend=create("reference" if wire.rank else "cpu")), layout=Layout(comm))

    for rank, error in enumerate(simulated(3, run)):
        assert str(error) == "load: backend is reference on rank 1, expected cpu as on rank 0", rank
    with pytest.raises(UsageError, match="layout is 'pp': expected one of ep, dp"):
        Layout(simulated(1, Communicator.over)[0], "pp")


def test_launch_writes_the_text_once():
    launch = [sys.executable, "-m", "porthal", "launch", "--ranks", "2"]
    command = [*launch, "generate", TEXT, "--max-new", "4", "--backend", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    alone = load(binding=bind(backend=create("cpu"))).generate(list(TEXT.encode()), 4)
    assert done.stdout == TEXT.encode() + bytes(alone)
    assert done.stderr.count(b"per forward of the main model") == 1


def test_ranks_that_are_given_other_prompts_are_refused():
    found = simulated(2, lambda wire: Layout(Communicator.over(wire)).agreed(prompt="a" * (1 + wire.rank)))
    assert {str(each) for each in found} == {"generate: prompt is aa on rank 1, expected a as on rank 0"}


def test_a_layout_without_ranks_is_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="--layout ep is for several ranks: start them with porthal launch or torchrun"):
        ranked(create("cpu"), "ep").__enter__()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="RANK is not set: expected RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, as torchrun"):
        ranked(create("cpu"), None).__enter__()
