"""`porthal generate`: what it draws from, where it stops, and what it says of either."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from porthal.cli.app import app
from tests.checkpoints import Tensors, variant
from tests.oracles import tiny

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            app(["generate", "--backend", "reference", *map(str, args)], prog_name="porthal")
        code = left.value.code
        return code if isinstance(code, int) else 0, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose tokens are bytes, and which asks for drawing."""
    with mock.patch.dict(tiny.CONFIG, vocab_size=256, eos_token_id=None):
        directory = tiny.build(tmp_path_factory.mktemp("bytes"), "glm5")
    generation = {"do_sample": True, "temperature": 0.5, "top_p": 0.9}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.mark.parametrize(
    ("args", "words", "values"),
    [
        ((), "", (0.0, 0.9, 0)),
        (("--temperature", 0), "", (0.0, 0.9, 0)),
        (("--sample",), ", temperature 0.5, top-p 0.9", (0.5, 0.9, 0)),
        (("--temperature", 1.5), ", temperature 1.5, top-p 0.9", (1.5, 0.9, 0)),
        (("--temperature", 1, "--top-p", 1, "--top-k", 9), ", temperature 1, top-k 9", (1.0, 1.0, 9)),
        (("--sample", "--temperature", 2, "--top-p", 0.5), ", temperature 2, top-p 0.5", (2.0, 0.5, 0)),
        (("--sample", "--speculative", 2), ", temperature 0.5, top-p 0.9", (0.5, 0.9, 0)),
    ],
)
def test_what_is_drawn_from_is_said(
    run: Run, texts: Path, args: tuple[Any, ...], words: str, values: tuple[float, ...]
) -> None:
    given = ("x", "--model", texts, "--max-new", 3, *args)
    code, _, err = run(*given)
    assert code == 0 and err.startswith(f"reference (hardware), float32{words}: 3 tokens in ")
    told = json.loads(run(*given, "--json")[1])["sampling"]
    assert (told["temperature"], told["top_p"], told["top_k"]) == values


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--top-p", 0.9), "top_p is 0.9 at temperature 0, which is greedy: give a temperature above 0 as well"),
        (("--temperature", 0, "--top-k", 3), "top_k is 3 at temperature 0, which is greedy"),
        (("--temperature", 1, "--top-p", 2), "top_p is 2.0: expected a number from 0 to 1"),
        (("--temperature", 1, "--top-k", -1), "top_k is -1: expected a whole number of at least 0"),
        (("--temperature", -1), "temperature is -1.0: expected a number from 0 to"),
    ],
)
def test_settings_that_make_no_sense(run: Run, texts: Path, args: tuple[Any, ...], message: str) -> None:
    code, out, err = run("x", "--model", texts, *args)
    assert (code, out) == (2, "") and err.startswith(f"porthal: {message}") and err.count("\n") == 1


def test_own_settings_of_a_checkpoint_that_has_none(run: Run, texts: Path, tmp_path: Path) -> None:
    code, out, err = run("x", "--model", variant(texts, tmp_path), "--sample")
    assert (code, out) == (2, "")
    assert err.startswith(f"porthal: --sample: {tmp_path} has no generation_config.json with do_sample: give --temperature")


@pytest.mark.parametrize(("asked", "made"), [(3, 3), (4, 4), (9, 4)])
def test_a_full_context_is_said(run: Run, texts: Path, tmp_path: Path, asked: int, made: int) -> None:
    model = variant(texts, tmp_path, max_position_embeddings=9)
    code, _, err = run("hello", "--model", model, "--max-new", asked)
    lines = err.splitlines()
    assert code == 0 and f"{made} tokens in " in lines[0]
    assert lines[1:] == ["the context of 9 tokens is full: 4 of 9 new tokens were made"] * (asked == 9)


@pytest.mark.parametrize("args", [(), ("--temperature", 1), ("--speculative", 2)])
def test_numbers_gone_wrong_end_with_exit_code_1(run: Run, texts: Path, tmp_path: Path, args: tuple[Any, ...]) -> None:
    def damage(tensors: Tensors) -> None:
        tensors["model.norm.weight"][:] = 3e38  # which overflows

    model = variant(texts, tmp_path, damage)
    code, out, err = run("wow!", "--model", model, "--max-new", 5, *args)
    assert (code, out) == (1, "wow!")  # what there was is not lost
    assert "0 tokens in" in err.splitlines()[0]
    wanted = "porthal: the logits for position 4 of request 0 are NaN or infinite, after 0 new tokens: "
    assert err.splitlines()[1].startswith(wanted) and err.count("\n") == 2
    code, out, _ = run("wow!", "--model", model, "--json", *args)
    assert (code, json.loads(out)["tokens"]) == (1, [])
