"""Backends in interpreters of their own: one made on the spot is judged and timed there, and the page says what results say."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from porthal.bench.worker import Backstage
from porthal.conformance import replay, run
from porthal.conformance.runner.peers import Peers
from porthal.hal import Unavailable, UsageError, backend_names
from tests.plugins import install

ROOT = Path(__file__).resolve().parents[2]
CHIP = """
    from porthal.backends.reference.backend import Reference

    class Chip(Reference):
        def add(self, a, b):
            return a + b
"""
Run = Callable[..., tuple[int, str, str]]


def interpreter(folder: Path, *flags: str, path: str = "") -> Path:
    """A Python that sees what this one does not."""
    made = folder / "python"
    made.write_text(f'#!/bin/sh\nPYTHONPATH="{path}" exec "{sys.executable}" {" ".join(flags)} "$@"\n')
    made.chmod(0o755)
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (site := tmp_path / "site").mkdir()
    install(site, "neighbour", backend=CHIP)
    interpreter(tmp_path, path=os.pathsep.join([str(site), str(ROOT)]))
    made = tmp_path / "peers.json"
    made.write_text('{"neighbour": "python"}')
    return made


def test_a_peer_is_judged_in_its_own_interpreter(file: Path) -> None:
    assert "neighbour" not in backend_names()
    report = run("neighbour", ["add"], dtypes=["float32"], peers=Peers.read(file))
    own = [r for r in report.results if r.status == "own"]
    assert report.backend == "neighbour" and len(own) > 5 and {r.verdict for r in own} == {"PASS"}
    assert report.replay(own[0]) == f"porthal replay '{own[0].token}' --backend neighbour --peers {file}"
    assert replay(own[0].token, "neighbour", peers=Peers.read(file)).own
    with pytest.raises(UsageError, match="unknown backend 'neighbour'"):
        run("neighbour", ["add"], dtypes=["float32"])


def test_the_commands_take_the_file(file: Path, command_line: Run) -> None:
    code, out, _ = command_line("replay", "add,T=7,H=96,0", "--backend", "neighbour", "--peers", file)
    assert code == 0 and out.startswith("PASS: add by neighbour's own kernel")


def test_a_peer_is_timed_in_its_own_interpreter(file: Path) -> None:
    worker = Backstage("neighbour", 1, Peers.read(file).python("neighbour"))
    try:
        assert worker.side.facts.backend == "neighbour" and worker.side.clock == "CPU time"
    finally:
        worker.close()


def test_what_is_no_peer_runs_here(file: Path) -> None:
    peers = Peers.read(file)
    assert peers.python("reference") == "" and peers.option("reference") == ""
    assert peers.python("neighbour:1") == str(file.parent / "python")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"neighbour": "gone/python"}', "{file}: neighbour has no Python at {folder}/gone/python: install the peer there"),
        ('{"neighbour": 3}', "{file} is no file of peers: 'neighbour' is 3, expected the path of its Python"),
        ("[1]", "{file} is not a report: expected a JSON object"),
        ("{", "{file} is not JSON: "),
    ],
)
def test_a_wrong_file_is_one_sentence(file: Path, command_line: Run, text: str, said: str) -> None:
    file.write_text(text)
    code, _, err = command_line("conform", "--backend", "neighbour", "--op", "add", "--peers", file)
    assert code == 2
    assert err.startswith("porthal: " + said.format(file=file, folder=file.parent)) and err.count("\n") == 1


def test_an_interpreter_without_porthal_says_so(file: Path) -> None:
    interpreter(file.parent, "-I", "-S")
    with pytest.raises(Unavailable, match=r"does not start: exited with code 1: ModuleNotFoundError: No module named"):
        run("neighbour", ["add"], dtypes=["float32"], peers=Peers.read(file))


def test_the_page_says_what_the_results_say() -> None:
    spec = spec_from_file_location("peers_page", ROOT / ".ci" / "peers.py")
    assert spec and spec.loader
    made = module_from_spec(spec)
    spec.loader.exec_module(made)
    data = json.loads(made.FOUND.read_text(encoding="utf-8"))
    assert made.PAGE.read_text(encoding="utf-8") == made.page(data, made.deviations()), "run python .ci/peers.py page"
    assert set(data) == set(json.loads((made.PEERS / "peers.json").read_text()))
    assert not [what for peer in data.values() for op in peer["ops"].values() for what in op["unexplained"]]
