"""Files that are not what they should be: each is refused with one sentence that names it, before anything is printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from shutil import copytree

import pytest

from porthal import conformance
from tests.plugins import install, installed

Damage = Callable[[Path], object]


def loop(file: Path) -> None:
    """Not readable by anybody, whatever rights they have."""
    file.symlink_to(file.name)


Run = Callable[..., tuple[int, str, str]]
DAMAGES: dict[str, Damage] = {
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(b'{"version": "1.0", "model": {"ty'),
    "another format": lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"),
    "other JSON": lambda file: file.write_text("[1, 2]"),
    "an empty object": lambda file: file.write_text("{}"),
    "binary": lambda file: file.write_bytes(bytes(range(256))),
    "a folder": lambda file: file.mkdir(),
    "unreadable": loop,
}


@pytest.fixture
def run(command_line: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("PORTHAL_BACKEND", "reference")
    monkeypatch.setattr(conformance, "run", partial(conformance.run, isolate=False), raising=False)
    return command_line


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "good.json"
    file.write_text(conformance.run("reference", ["add"], dtypes=["float32"], isolate=False).json())
    return file


def refused(answer: tuple[int, str, str], file: Path) -> None:
    code, out, err = answer
    assert (code, out) == (2, "")
    assert err.startswith("porthal: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert file.name in err, err


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors", "model.safetensors.index.json"])
def test_of_a_checkpoint(run, texts: Path, tmp_path: Path, name: str, damage: str) -> None:
    if (name, damage) == ("model.safetensors", "an empty object"):
        pytest.skip("the same as another format")
    directory = copytree(texts, tmp_path / "model")
    for file in {name, name.replace(".index.json", "")}:  # an index stands in place of the file
        (directory / file).unlink(missing_ok=True)
    DAMAGES[damage](directory / name)
    refused(run("generate", "x", "--model", directory, "--max-new", 1), directory / name)


@pytest.mark.parametrize("damage", DAMAGES)
def test_of_a_report(run, report: Path, tmp_path: Path, damage: str) -> None:
    DAMAGES[damage](tmp_path / "bad.json")
    refused(run("compare", report, tmp_path / "bad.json"), tmp_path / "bad.json")
    refused(run("compare", tmp_path / "bad.json", report), tmp_path / "bad.json")


@pytest.mark.parametrize("damage", DAMAGES)
def test_of_a_run_to_continue(run, tmp_path: Path, damage: str) -> None:
    DAMAGES[damage](tmp_path / "bad.jsonl")
    answer = run("conform", "--op", "add", "--dtype", "float32", "--resume", tmp_path / "bad.jsonl")
    if damage == "empty":  # a run that was stopped as it began: all of it is still to do
        assert answer[0] == 0
    else:
        refused(answer, tmp_path / "bad.jsonl")
        assert damage == "a folder" or damage == "unreadable" or (tmp_path / "bad.jsonl").stat().st_size > 1  # as it was


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[Path]:
    package = install(tmp_path, "chip")
    with installed(tmp_path):
        yield package


@pytest.mark.parametrize("damage", DAMAGES)
def test_of_waivers(run, chip: Path, damage: str) -> None:
    DAMAGES[damage](chip / "waivers.toml")
    answer = run("conform", "--op", "add", "--dtype", "float32", "--backend", "chip")
    if damage == "empty":
        assert answer[1].startswith("chip (hardware)")
    else:
        refused(answer, chip / "waivers.toml")


def test_of_a_whole_report_nothing_is_refused(run, report: Path) -> None:
    assert json.loads(report.read_text())["results"]
    assert run("compare", report, report)[0] == 0
