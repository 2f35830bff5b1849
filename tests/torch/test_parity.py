"""The model against transformers in float32, on the reference and torch backends: logits, greedy and sampled text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import porthal
from porthal.model import Glm5, load
from porthal.model.generate import generate
from tests.checkpoints import Tensors, variant
from tests.oracles import tiny
from tests.oracles.tiny import PROMPT
from tests.parity import BATCHES, DRAFTS, NEW, SAMPLED, check_sampling, one_by_one, together

pytest.importorskip("transformers", minversion="5.23")

TOLERANCE = 1e-4  # logits have a standard deviation near 1; 7e-6 was measured
MODELS = [(backend, kind) for backend in ("reference", "torch") for kind in ("glm5", "glm52")]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def everything(names: str, values: Iterable[Any], on_the_reference: Any) -> pytest.MarkDecorator:
    """All values on torch; on the reference, where they take long, one: tests/proof has the rest."""
    made = [(m, value) for m in MODELS for value in values if m[0] == "torch" or value == on_the_reference]
    return pytest.mark.parametrize(("loaded", names), made, indirect=["loaded"])


@pytest.fixture(scope="module")
def every_model(checkpoints: dict[str, Path]) -> dict[tuple[str, str], Glm5]:
    return {(b, k): load(checkpoints[k], porthal.bind(b, overrides={}, fallback="error")) for b, k in MODELS}


@pytest.fixture(params=MODELS, ids="-".join)
def loaded(request: pytest.FixtureRequest, checkpoints: dict[str, Path], every_model: Any) -> tuple[Path, Glm5]:
    return checkpoints[request.param[1]], every_model[request.param]


@pytest.fixture
def directory(loaded: tuple[Path, Glm5]) -> Path:
    return loaded[0]


@pytest.fixture
def model(loaded: tuple[Path, Glm5]) -> Glm5:
    return loaded[1]


def stepwise(model: Glm5, tokens: list[int], lengths: Sequence[int]) -> np.ndarray:
    """Logits [T, vocab] of feeding the tokens in pieces of these lengths through one cache."""
    ops, cache, start, parts = model.ops, model.new_cache([128]), 0, []
    request = cache.new_request()
    for length in lengths:
        ids = ops.from_numpy(np.array(tokens[start : start + length], np.int32))
        hidden = model.hidden(ids, ops.plan(cache.step([request], [length])), cache)
        parts.append(ops.to_numpy(model.logits(hidden)))
        start += length
    return np.concatenate(parts)


# -- logits ----------------------------------------------------------------------------------------------------------


def test_prefill(directory: Path, model: Glm5) -> None:
    assert distance(model.forward(PROMPT), tiny.hf_logits(directory, PROMPT)) < TOLERANCE


@pytest.mark.parametrize("chunk", [7, 16, 40])
def test_chunked_prefill(directory: Path, model: Glm5, chunk: int) -> None:
    pieces = [len(PROMPT[start : start + chunk]) for start in range(0, len(PROMPT), chunk)]
    assert distance(model.forward(PROMPT, chunk=chunk), tiny.hf_chunked(directory, PROMPT, pieces)) < TOLERANCE


def test_cached_decode(directory: Path, model: Glm5) -> None:
    logits = stepwise(model, PROMPT, [80] + [1] * (len(PROMPT) - 80))
    assert distance(logits, tiny.hf_cached_decode(directory, PROMPT, 80)) < TOLERANCE


# -- greedy text -----------------------------------------------------------------------------------------------------


@pytest.fixture
def greedy(model: Glm5) -> list[list[int]]:
    return one_by_one(model)


def test_greedy_text_equals_transformers(directory: Path, greedy: list[list[int]]) -> None:
    assert greedy[0] == tiny.hf_greedy(directory, PROMPT, NEW)


@everything("drafts", DRAFTS, on_the_reference=3)
def test_speculative_text_equals_greedy_text(model: Glm5, greedy: list[list[int]], drafts: int) -> None:
    assert model.generate(PROMPT, NEW, speculative=drafts) == greedy[0]


@everything("way", BATCHES, on_the_reference=(3, 40))
def test_batches_and_chunks_do_not_change_the_text(
    model: Glm5, greedy: list[list[int]], way: tuple[int, int | None]
) -> None:
    assert together(model, *way) == greedy


# -- sampled text ----------------------------------------------------------------------------------------------------


@everything("drafts", SAMPLED, on_the_reference=3)
def test_sampled_text_depends_on_seed_and_index_alone(model: Glm5, drafts: int) -> None:
    check_sampling(model, drafts)


VOCAB, COUNT, BATCH = 4, 1500, 500
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def small(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Glm5:
    """glm52 with a vocabulary of 4 tokens."""

    def cut(tensors: Tensors) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:VOCAB]

    directory = variant(checkpoints["glm52"], tmp_path_factory.mktemp("small"), cut, vocab_size=VOCAB, eos_token_id=None)
    return load(directory, porthal.bind("torch", overrides={}, fallback="error"))


@pytest.fixture(scope="module")
def exact(small: Glm5) -> np.ndarray:
    """[V, V, V]: the probability of every continuation of three tokens, from the logits of a plain forward pass."""
    chances = np.zeros((VOCAB,) * 3)
    for a, b in np.ndindex(VOCAB, VOCAB):
        scaled = small.forward([1, 2, a, b]).astype(np.float64)[1:] / TEMPERATURE
        p = np.exp(scaled) / np.exp(scaled).sum(1, keepdims=True)
        chances[a, b] = p[0, a] * p[1, b] * p[2]
    return chances


def misfit(counts: np.ndarray, chances: np.ndarray) -> float:
    """Pearson's chi-square of the counts, as a standard normal deviate (Wilson and Hilferty); rare cells are pooled."""
    order = np.argsort(chances)
    expected, seen = chances[order] * counts.sum(), counts[order]
    rare = max(int((expected < 5).sum()), 1)
    expected = np.concatenate([[expected[:rare].sum()], expected[rare:]])
    seen = np.concatenate([[seen[:rare].sum()], seen[rare:]])
    freedom = len(expected) - 1
    spread = 2 / (9 * freedom)
    return float(((((seen - expected) ** 2 / expected).sum() / freedom) ** (1 / 3) - 1 + spread) / spread**0.5)


@pytest.mark.parametrize("drafts", [0, 1, 2])
def test_sampling_has_the_distribution_of_the_model(small: Glm5, exact: np.ndarray, drafts: int) -> None:
    counts = np.zeros_like(exact)
    for seed in range(COUNT // BATCH):
        done = generate(small, [[1, 2]] * BATCH, 3, temperature=TEMPERATURE, speculative=drafts, seed=seed)
        for text in done.tokens:
            counts[tuple(text)] += 1
    assert exact.sum() == pytest.approx(1, abs=1e-6)
    assert abs(misfit(counts.ravel(), exact.ravel())) < 3.3  # a fair sampler fails once in a thousand seeds
    other = exact**1.15 / (exact**1.15).sum()
    assert misfit(counts.ravel(), other.ravel()) > 4  # a sampler slightly too warm would be seen
