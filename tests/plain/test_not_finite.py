"""NaN and infinity end a text before they become one; what came before them is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from porthal import Binding, NotFinite, UsageError
from porthal.hal import numpy_dtype
from porthal.model import Glm5, load
from porthal.model.evaluate import bits_per_token
from porthal.model.generate import Generated, generate
from tests.checkpoints import Tensors, variant
from tests.oracles import tiny

PROMPT = tiny.PROMPT[:20]
NAN, INF = math.nan, math.inf
# temperature and drafts
WAYS = pytest.mark.parametrize(("temperature", "drafts"), [(0.0, 0), (1.0, 0), (0.0, 3), (1.0, 3)])


@pytest.fixture
def spoil(models: dict[str, Glm5], monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[np.ndarray], Any]], Glm5]:
    """A model whose logits for one position of a text are changed, whatever step computes them."""

    def make(position: int, change: Callable[[np.ndarray], Any]) -> Glm5:
        model = models["glm5"]
        hidden, logits, marked = Glm5.hidden, Glm5.logits, []

        def remember(self: Glm5, ids: Any, batch: Any, cache: Any) -> Any:
            out = hidden(self, ids, batch, cache)
            marked[:] = [out[t] for t in range(batch.T) if batch.positions[t] + 1 == position]
            return out

        def spoiled(self: Glm5, g: Any) -> Any:
            found = logits(self, g).copy()
            for row, state in zip(found, g):
                if any(np.array_equal(state, m) for m in marked):
                    change(row)
            return found

        monkeypatch.setattr(Glm5, "hidden", remember)
        monkeypatch.setattr(Glm5, "logits", spoiled)
        return model

    return make


def one_nan(row: np.ndarray) -> None:
    row[5] = NAN


def one_inf(row: np.ndarray) -> None:
    row[5] = INF


def nothing_left(row: np.ndarray) -> None:
    row[:] = -INF


@WAYS
@pytest.mark.parametrize(("change", "after"), [(one_nan, 0), (one_inf, 4), (nothing_left, 2)])
def test_a_text_ends_before_the_first_token_without_finite_logits(
    models: dict[str, Glm5], spoil: Any, temperature: float, drafts: int, change: Any, after: int
) -> None:
    clean = generate(models["glm5"], [PROMPT], 8, temperature=temperature, speculative=drafts).tokens[0]
    model, heard = spoil(len(PROMPT) + after, change), []
    with pytest.raises(NotFinite) as caught:
        generate(
            model, [PROMPT], 8, temperature=temperature, speculative=drafts, on_tokens=lambda _, new: heard.extend(new)
        )
    assert isinstance(caught.value.done, Generated)
    assert caught.value.done.tokens == [clean[:after]] == [heard]
    wanted = f"the logits for position {len(PROMPT) + after} of request 0 are NaN or infinite, after {after} new tokens"
    assert str(caught.value).startswith(wanted) and "\n" not in str(caught.value)


@WAYS
def test_a_mask_of_minus_infinity_is_legal(models: dict[str, Glm5], spoil: Any, temperature: float, drafts: int) -> None:
    def all_but_one(row: np.ndarray) -> None:
        row[np.arange(len(row)) != 7] = -INF

    made = spoil(len(PROMPT) + 2, all_but_one).generate(PROMPT, 6, temperature=temperature, speculative=drafts)
    assert len(made) == 6 and made[2] == 7


@pytest.mark.parametrize("drafts", [0, 3])
def test_other_requests_go_on(models: dict[str, Glm5], spoil: Any, drafts: int) -> None:
    prompts = [PROMPT[:12], PROMPT, PROMPT[:9]]
    clean = generate(models["glm5"], prompts, 8, speculative=drafts).tokens
    with pytest.raises(NotFinite, match="of request 1 are NaN or infinite, after 3 new tokens") as caught:
        generate(spoil(len(PROMPT) + 3, one_nan), prompts, 8, speculative=drafts)
    assert caught.value.done.tokens == [clean[0], clean[1][:3], clean[2]]


@pytest.mark.parametrize("number", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_checkpoint_with_a_number_that_is_none(
    checkpoints: dict[str, Path], reference: Binding, tmp_path: Path, number: float, kind: str
) -> None:
    """Refused as it is read: in a router's bias it would give another text of finite logits."""
    name = "model.layers.2.mlp.gate.e_score_correction_bias"

    def damage(tensors: Tensors) -> None:
        tensors[name] = tensors[name].astype(numpy_dtype(kind))
        tensors[name][3] = number

    with pytest.raises(UsageError, match=f"'{name}' holds NaN or infinity, expected finite numbers"):
        load(variant(checkpoints["glm5"], tmp_path, damage), reference)


def test_a_checkpoint_whose_numbers_overflow(checkpoints: dict[str, Path], reference: Binding, tmp_path: Path) -> None:
    def damage(tensors: Tensors) -> None:
        tensors["model.layers.2.mlp.shared_experts.down_proj.weight"][:] = 3e38

    model = load(variant(checkpoints["glm5"], tmp_path, damage), reference)
    assert np.isnan(model.forward(PROMPT[:5])).all()
    for settings in ({}, {"temperature": 1.0}, {"temperature": 1.0, "speculative": 2}):
        with pytest.raises(NotFinite, match="for position 3 of request 0 are NaN or infinite, after 0 new tokens"):
            model.generate([5, 6, 7], 6, **settings)
    with pytest.raises(NotFinite, match="the log probability of token 1 is nan"):
        bits_per_token(model, PROMPT[:9])


def test_bits_of_a_token_that_a_mask_forbids(models: dict[str, Glm5], spoil: Any) -> None:
    def forbid(row: np.ndarray) -> None:
        row[PROMPT[4]] = -INF

    with pytest.raises(NotFinite, match="the log probability of token 4 is -inf"):
        bits_per_token(spoil(4, forbid), PROMPT[:9])
