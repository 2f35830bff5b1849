"""A model on several ranks makes the text of one, reads its own experts only, and writes once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from porthal.cli.app import app
from porthal.cli.experts import Chosen
from porthal.cli.ranks import Said, listed, ranked
from porthal.hal import Communicator, UsageError, bind, create, simulated
from porthal.model.generate import generate
from porthal.model.layout import Layout, owner_of
from porthal.model.load import DEMO, load
from tests.ranks import ROOT, environment, ran

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


@pytest.mark.parametrize(
    ("kind", "table"),
    [("ep", ((3, 1, 0), (0, 2, 1))), ("dp+ep", ((2, 3), (0, 3), (3, 1))), ("tp+ep", ((0, 1, 2, 3), (0, 1, 2, 3)))],
)
def test_experts_lie_where_a_table_says_and_may_have_copies(kind, table, alone):
    def run(wire: Any) -> Any:
        layout = Layout(Communicator.over(wire), kind, table)
        counted = Chosen(create("cpu"), 4)
        model = load(binding=bind(backend=create("cpu"), wrap=[counted]), layout=layout)
        return texts(model), counted.told(layout)

    found = simulated(len(table), run, timeout=60)
    counted = Chosen(create("cpu"), 4)
    assert texts(load(binding=bind(backend=create("cpu"), wrap=[counted]))) == alone[0]
    expected = counted.told(None)["rows_of_experts"]
    for text, told in found:
        assert text == alone[0]
        assert told["rows_of_experts"] == expected and sum(told["rows_of_ranks"]) == sum(expected)
    if kind == "tp+ep":  # each rank has all experts, and its own rows
        assert max(found[0][1]["rows_of_ranks"]) < 0.7 * sum(expected)


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (((0, 1), (2,)), "the table of experts lists 2 ranks with 1, 2 experts: expected 2, each with equally many"),
        (((0, 1, 2, 3),), "lists 1 ranks with 4 experts: expected 2"),
        (((0, 1), (2, 1)), "the table of experts lacks expert 3: expected 0 to 3, each at least once"),
        (((0, 1), (2, 99)), "the table of experts has expert 99: expected 0 to 3, each at least once"),
        (((0, 0, 1), (2, 3, 1)), "the table of experts has expert 0 twice on rank 0: expected copies on other ranks"),
        (((0, 1, 2), (3, 4, 0)), "the table of experts has expert 4: expected 0 to 3"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(table, why):
    def run(wire: Any) -> Any:
        load(binding=bind(backend=create("cpu")), layout=Layout(Communicator.over(wire), "ep", table))

    for error in simulated(2, run):
        assert type(error) is UsageError and why in str(error)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    file = tmp_path / "table.json"
    wrong = {"[[0, 1], [2": "cannot read the table of experts", "{}": "is no table of experts", "[[true]]": "lists True"}
    for said, why in wrong.items():
        file.write_text(said)
        with pytest.raises(UsageError, match=why):
            listed(file)
    with pytest.raises(UsageError, match="No such file"):
        listed(tmp_path / "missing.json")


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


def test_checkpoints_of_the_same_shapes_are_told_apart(tmp_path):
    """As those of two releases of one model are: here one number differs."""
    shutil.copytree(DEMO, tmp_path / "other")
    [file] = (tmp_path / "other").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    places = [DEMO, tmp_path / "other"]
    found = simulated(
        2, lambda wire: load(places[wire.rank], bind(backend=create("cpu")), layout=Layout(Communicator.over(wire)))
    )
    assert all(type(each) is UsageError and "load: checkpoint is " in str(each) for each in found)


@pytest.mark.parametrize("pages", [1, 2, 3, 4, 8, 16, 17, 32, 64])
def test_requests_of_so_many_pages_are_spread_over_ranks(pages):
    for ranks in (2, 4, 8):
        owners = Counter(owner_of(pages * request, ranks) for request in range(64))
        assert len(owners) == ranks and max(owners.values()) <= 1.6 * 64 / ranks, owners


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
    command = [*launch, "generate", TEXT, "--max-new", "4", "--backend", "cpu", "--stats"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    alone = load(binding=bind(backend=create("cpu"))).generate(list(TEXT.encode()), 4)
    assert done.stdout == TEXT.encode() + bytes(alone)
    assert done.stderr.count(b"per forward of the main model") == 1
    rows = (len(TEXT) + 3) * 2 * 2  # of two layers, two experts for each row
    assert b"experts: %d rows over all layers, of which go to expert" % rows in done.stderr
    assert done.stderr.count(b"\nranks: ") == 1


def test_launch_runs_nothing_else():
    done = subprocess.run([sys.executable, "-m", "porthal", "launch", "conform"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "launch runs generate, not 'conform'" in done.stderr


def test_launch_ends_with_the_code_of_a_rank_that_fails():
    command = [sys.executable, "-m", "porthal", "launch", "--ranks", "3", "generate", TEXT, "--backend", "cpu"]
    done = subprocess.run([*command, "--layout", "tp+ep"], cwd=ROOT, capture_output=True, timeout=100)
    assert done.returncode == 2 and done.stderr.count(b"num_attention_heads is 4 on 3 ranks") == 1
    assert len(done.stderr.splitlines()) == 1


def test_what_ranks_say_is_said_once_and_in_whole_lines(capfd):
    """Of each line as often as the rank that says it most often."""
    said = Said()
    for lines in (r"a\nb\na\n", r"b\na\nc", r"a\na\na\n"):
        said.listen(subprocess.Popen(["sh", "-c", f"printf '{lines}' >&2"], stderr=subprocess.PIPE))
    said.close()
    assert sorted(capfd.readouterr().err.splitlines()) == ["a", "a", "a", "b", "c"]


def test_ranks_end_with_the_process_that_started_them():
    arguments = ["launch", "--ranks", "2", "generate", TEXT, "--backend", "cpu", "--max-new", "2000"]
    command = [sys.executable, "-m", "porthal", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launcher:
        ranks = awaited(lambda: len(found := children(launcher.pid)) == 2 and found)
        launcher.kill()
    assert awaited(lambda: not any(os.path.exists(f"/proc/{rank}") for rank in ranks))


def children(parent: int) -> list[int]:
    with open(f"/proc/{parent}/task/{parent}/children") as file:
        return list(map(int, file.read().split()))


def awaited(seen: Any) -> Any:
    end = time.monotonic() + 60
    while not (found := seen()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def test_ranks_compare_all_that_a_text_depends_on(monkeypatch):
    compared: dict[str, Any] = {}

    def agreed(self: Layout, **facts: Any) -> int:
        compared.update(facts)
        return 0

    monkeypatch.setattr(Layout, "agreed", agreed)
    for name, value in environment(0, 1, 19000).items():
        monkeypatch.setenv(name, value)
    made = CliRunner().invoke(app, ["generate", "x", "--max-new", "2", "--temperature", "1", "--seed", "3", "--backend", "cpu"])
    assert made.exit_code == 0
    expected = {"max_new": 2, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 3, "speculative": 0, "prompt": "x"}
    assert {name: compared[name] for name in expected} == expected and compared["eos"]


def test_ranks_that_draw_otherwise_are_refused():
    program = ["-c", "import os, sys; from porthal.cli import main; sys.argv[1:] = ['generate', 'x', '--backend', 'cpu', "
               "'--max-new', '2', *(['--temperature', '1'] if os.environ['RANK'] == '1' else [])]; main()"]  # fmt: skip
    for code, out, err in ran(2, program):
        assert (code, out) == (2, "") and "generate: temperature is 1.0 on rank 1, expected 0.0 as on rank 0" in err


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


@pytest.mark.parametrize(("kind", "size"), [("tp+ep", 4), ("dp+ep", 2)])
def test_in_bfloat16_a_text_differs_first_at_a_near_tie(kind, size):
    """Logits of the demo lie 9 apart, and the first two of a token 3."""
    model = load(binding=bind(backend=create("cpu")), dtype="bfloat16")
    expected, near = generate(model, PROMPTS, 24).tokens, 0.5

    def run(wire: Any) -> Any:
        ranked = load(binding=bind(backend=create("cpu")), dtype="bfloat16", layout=Layout(Communicator.over(wire), kind))
        return generate(ranked, PROMPTS, 24).tokens, ranked.forward(PROMPTS[0] + expected[0])

    found = simulated(size, run, timeout=120)
    off = np.abs(found[0][1] - model.forward(PROMPTS[0] + expected[0])).max()
    assert 0 < off < near and all(np.array_equal(logits, found[0][1]) and text == found[0][0] for text, logits in found)
    for prompt, one, many in zip(PROMPTS, expected, found[0][0]):
        at = next((n for n, pair in enumerate(zip(one, many)) if pair[0] != pair[1]), None)
        if at is not None:
            logits = model.forward(prompt + one[:at])[-1]
            assert logits[one[at]] - logits[many[at]] < near
