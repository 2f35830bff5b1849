"""generation_config.json: what ends a text, and what is drawn from; greedy unless a temperature is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from porthal import Binding, UsageError
from porthal.model import Config, Glm5, load
from porthal.model.sampling import Sampling
from tests.checkpoints import variant
from tests.oracles import tiny

PROMPT = tiny.PROMPT[:20]
GLM5 = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "eos_token_id": [154, 155], "pad_token_id": 154}


def written(target: Path, generation: Any, **config: Any) -> Path:
    (target / "config.json").write_text(json.dumps({**tiny.CONFIG, **config}))
    (target / "generation_config.json").write_text(generation if isinstance(generation, str) else json.dumps(generation))
    return target


@pytest.mark.parametrize(
    ("generation", "sampling"),
    [
        (GLM5, Sampling(1.0, 0.95, 0)),
        ({**GLM5, "do_sample": False}, Sampling(0.0, 0.95, 0)),
        ({"temperature": 0.5, "top_k": 20}, Sampling(0.0, 1.0, 20)),
        ({"do_sample": True}, Sampling(1.0, 1.0, 0)),
        ({"do_sample": True, "temperature": None, "top_p": None, "top_k": None}, Sampling(1.0, 1.0, 0)),
        ({}, Sampling()),
    ],
)
def test_settings(tmp_path: Path, generation: dict[str, Any], sampling: Sampling) -> None:
    assert Config.read(written(tmp_path, generation)).sampling == sampling


@pytest.mark.parametrize("other", [None, 0, [3, 4]])
@pytest.mark.parametrize(("given", "ids"), [([95], (95,)), (95, (95,)), ([], ()), (None, ()), ([7, 0], (7, 0))])
def test_the_file_alone_says_what_ends_a_text(tmp_path: Path, other: Any, given: Any, ids: tuple[int, ...]) -> None:
    directory = written(tmp_path, {"eos_token_id": given}, eos_token_id=other)
    assert Config.read(directory).eos_token_id == ids
    (directory / "generation_config.json").unlink()
    assert Config.read(directory).eos_token_id == (() if other is None else (0,) if other == 0 else (3, 4))


@pytest.mark.parametrize(
    ("generation", "parts"),
    [
        ({"eos_token_id": 160}, ("eos_token_id = 160", "token ids below 160")),
        ({"eos_token_id": [3, -1]}, ("eos_token_id = [3, -1]", "token ids below 160")),
        ({"eos_token_id": "2"}, ("eos_token_id = '2'", "token ids below 160")),
        ({"eos_token_id": [True]}, ("eos_token_id = [True]", "token ids below 160")),
        ({"eos_token_id": [[3]]}, ("eos_token_id = [[3]]", "token ids below 160")),
        ({"eos_token_id": 2.0}, ("eos_token_id = 2.0", "token ids below 160")),
        ({"eos_token_id": {"a": 1}}, ("eos_token_id = {'a': 1}", "token ids below 160")),
        ({"top_p": 1.5}, ("top_p = 1.5", "a number from 0 to 1")),
        ({"top_p": float("nan")}, ("top_p = nan", "a number from 0 to 1")),
        ({"top_p": "0.9"}, ("top_p = '0.9'", "a number from 0 to 1")),
        ({"top_k": -1}, ("top_k = -1", "a whole number of at least 0")),
        ({"top_k": 2.5}, ("top_k = 2.5", "a whole number of at least 0")),
        ({"temperature": -1}, ("temperature = -1", "a number of at least 0")),
        ({"temperature": float("inf")}, ("temperature = inf", "a number of at least 0")),
        ({"temperature": True}, ("temperature = True", "a number of at least 0")),
        ({"do_sample": "yes"}, ("do_sample = 'yes'", "true or false")),
        ({"do_sample": 1}, ("do_sample = 1", "true or false")),
        ("[]", ("is a list", "expected a JSON object")),
        ("{", ("is not valid JSON",)),
        ("[" * 100_000, ("is not valid JSON",)),
    ],
)
def test_what_is_wrong_is_named_with_its_file_and_key(tmp_path: Path, generation: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        Config.read(written(tmp_path, generation))
    text = str(caught.value)
    assert [part for part in (str(tmp_path / "generation_config.json"), *parts) if part not in text] == [], text
    assert "\n" not in text


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    written(tmp_path, {})
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"generation_config\.json cannot be read: No such file"):
        Config.read(tmp_path)


@pytest.mark.parametrize("given", [160, [3, -1], "2", [True]])
def test_ids_of_config_json_are_ids_of_the_vocabulary_too(given: Any) -> None:
    with pytest.raises(UsageError, match=r"^config\.json has eos_token_id = .*: expected token ids below 160"):
        Config.parse({**tiny.CONFIG, "eos_token_id": given}, "config.json")


# -- what a run draws from -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def configured(checkpoints: dict[str, Path], reference: Binding, tmp_path_factory: pytest.TempPathFactory) -> Glm5:
    directory = variant(checkpoints["glm5"], tmp_path_factory.mktemp("configured"))
    (directory / "generation_config.json").write_text(json.dumps({**GLM5, "top_k": 30}))
    return load(directory, reference)


def drawn_from(model: Glm5, monkeypatch: pytest.MonkeyPatch, **given: Any) -> set[tuple[float, ...]]:
    """The settings that `sample` and `speculative_verify` are called with, in all rows."""
    seen: set[tuple[float, ...]] = set()

    def watched(kernel: Any) -> Any:
        def call(*operands: np.ndarray) -> Any:
            seen.update(tuple(round(float(x), 6) for x in row) for row in zip(*operands[-3:]))
            return kernel(*operands)

        return call

    for op in ("sample", "speculative_verify"):
        monkeypatch.setitem(vars(model.ops), op, watched(getattr(model.ops, op)))
    model.generate(PROMPT[:9], 5, **given)
    return seen


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({}, set()),
        ({"temperature": None}, {(1.0, 30, 0.95)}),
        ({"temperature": 0.5}, {(0.5, 30, 0.95)}),
        ({"temperature": 0.5, "top_p": 1, "top_k": 0}, {(0.5, 0, 1.0)}),
        ({"temperature": None, "top_p": 0.5}, {(1.0, 30, 0.5)}),
        ({"temperature": 2, "top_k": 10_000}, {(2.0, 160, 0.95)}),
    ],
)
def test_what_is_given_comes_before_the_file(
    configured: Glm5, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], settings: set[tuple[float, ...]]
) -> None:
    assert drawn_from(configured, monkeypatch, **given) == settings
    if settings:  # and drafts are judged by the same
        assert drawn_from(configured, monkeypatch, **given, speculative=2) == settings


def test_few_candidates_leave_the_greedy_text(configured: Glm5) -> None:
    greedy = configured.generate(PROMPT, 8)
    for few in ({"top_k": 1}, {"top_p": 0.0}):
        for drafts in (0, 3):
            assert configured.generate(PROMPT, 8, temperature=1.5, seed=3, speculative=drafts, **few) == greedy


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_p": 0.9}, r"top_p is 0\.9 at temperature 0, which is greedy: give a temperature above 0"),
        ({"temperature": 0, "top_k": 5}, "top_k is 5 at temperature 0, which is greedy"),
        ({"temperature": 1, "top_p": 1.01}, r"top_p is 1\.01: expected a number from 0 to 1"),
        ({"temperature": 1, "top_p": "x"}, "top_p is 'x': expected a number from 0 to 1"),
        ({"temperature": 1, "top_k": -1}, "top_k is -1: expected a whole number of at least 0"),
        ({"temperature": 10**400}, "temperature is 10+: expected a number from 0 to"),
        ({"temperature": 1e-6}, r"temperature is 1e-06: expected 0 or 1e-05 to 10000, which chips can divide by"),
    ],
)
def test_bad_settings(configured: Glm5, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        configured.generate(PROMPT, 2, **given)
