"""The model against transformers in float32, on the reference and torch backends: logits, greedy and sampled text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import porthal
from porthal.model import Glm5, load
from porthal.model.generate import generate
from tests.checkpoints import Tensors, variant
from tests.oracles import tiny
from tests.oracles.tiny import PROMPT

pytest.importorskip("transformers", minversion="5.23")

TOLERANCE = 1e-4  # logits have a standard deviation near 1; 7e-6 was measured
NEW = 24
BACKENDS = ["reference", "torch"]
# One and two pages, within and beyond index_topk; the third meets an end-of-text token.
PROMPTS = [PROMPT, PROMPT[:50], PROMPT[:7], PROMPT[30:95]]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


@pytest.fixture(scope="module", params=[(b, k) for b in BACKENDS for k in ("glm5", "glm52")], ids="-".join)
def loaded(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> tuple[Path, Glm5]:
    backend, kind = request.param
    return checkpoints[kind], load(checkpoints[kind], porthal.bind(backend, overrides={}, fallback="error"))


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


@pytest.fixture(scope="module")
def greedy(loaded: tuple[Path, Glm5]) -> list[list[int]]:
    return [loaded[1].generate(prompt, NEW) for prompt in PROMPTS]


def test_greedy_text_equals_transformers(directory: Path, greedy: list[list[int]]) -> None:
    assert greedy[0] == tiny.hf_greedy(directory, PROMPT, NEW)


@pytest.mark.parametrize("drafts", [1, 3, 5])
def test_speculative_text_equals_greedy_text(model: Glm5, greedy: list[list[int]], drafts: int) -> None:
    assert model.generate(PROMPT, NEW, speculative=drafts) == greedy[0]


@pytest.mark.parametrize(("drafts", "chunk"), [(0, 40), (1, None), (3, 40), (5, None)])
def test_batches_and_chunks_do_not_change_the_text(
    model: Glm5, greedy: list[list[int]], drafts: int, chunk: int | None
) -> None:
    assert generate(model, PROMPTS, NEW, speculative=drafts, prefill_chunk=chunk).tokens == greedy


# -- sampled text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafts", [0, 3])
def test_sampled_text_depends_on_seed_and_index_alone(model: Glm5, drafts: int) -> None:
    def sampled(prompts: list[list[int]], seed: int = 7, chunk: int | None = None) -> list[list[int]]:
        return generate(model, prompts, 8, temperature=0.9, speculative=drafts, seed=seed, prefill_chunk=chunk).tokens

    together = sampled(PROMPTS)
    assert sampled(PROMPTS, chunk=40) == together
    assert sampled(PROMPTS[:1]) == together[:1]
    assert sampled([PROMPT, PROMPT[:3], PROMPTS[2]])[::2] == together[:3:2]  # among other requests
    assert sampled(PROMPTS[:1], seed=8) != together[:1]
    first, second = sampled([PROMPT, PROMPT])
    assert first == together[0] != second


VOCAB, COUNT, BATCH = 4, 1500, 500
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def small(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Glm5:
    """glm52 with a vocabulary of 4 tokens."""

    def cut(tensors: Tensors) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:VOCAB]

    directory = variant(checkpoints["glm52"], tmp_path_factory.mktemp("small"), cut, vocab_size=VOCAB)
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
