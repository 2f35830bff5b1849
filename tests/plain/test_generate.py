"""Generation on the reference backend: where it stops, what it frees, how checkpoints and dtypes reach it; tracing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from porthal import Binding
from porthal.hal import contracts
from porthal.model import Config, Glm5, load, profile, trace
from porthal.model.cache import Cache
from porthal.model.generate import generate
from tests.checkpoints import variant
from tests.oracles import tiny
from tests.oracles.tiny import PROMPT


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Cache, int]]:
    """Every cache made during the test, with its number of pages."""
    made: list[tuple[Cache, int]] = []
    new_cache = Glm5.new_cache

    def record(self: Glm5, lengths: Sequence[int]) -> Cache:
        cache = new_cache(self, lengths)
        made.append((cache, len(cache.free)))
        return cache

    monkeypatch.setattr(Glm5, "new_cache", record)
    return made


def short_context(checkpoints: dict[str, Path], target: Path, reference: Binding, context: int) -> Glm5:
    return load(variant(checkpoints["glm52"], target, max_position_embeddings=context), reference)


@pytest.fixture(scope="module")
def ten_tokens(models: dict[str, Glm5]) -> list[int]:
    return models["glm52"].generate(PROMPT, 10)


@pytest.mark.parametrize("speculative", [0, 1, 3])
@pytest.mark.parametrize("asked", [10, 11, 500])
def test_text_ends_with_the_context(
    checkpoints: dict[str, Path],
    reference: Binding,
    ten_tokens: list[int],
    tmp_path: Path,
    speculative: int,
    asked: int,
) -> None:
    small = short_context(checkpoints, tmp_path, reference, len(PROMPT) + 10)
    assert small.generate(PROMPT, asked, speculative=speculative) == ten_tokens


def test_prompt_that_fills_the_context(checkpoints: dict[str, Path], reference: Binding, tmp_path: Path) -> None:
    small = short_context(checkpoints, tmp_path, reference, len(PROMPT))
    out = generate(small, [PROMPT, PROMPT[:-2]], 5, speculative=1)
    assert [len(tokens) for tokens in out.tokens] == [0, 2]
    assert small.generate(PROMPT, 5) == []


def test_a_request_at_the_end_of_the_context_does_not_disturb_others(
    checkpoints: dict[str, Path], reference: Binding, tmp_path: Path
) -> None:
    """It has no room for drafts, while the others go on drafting: else their sampled text would depend on it."""
    small = short_context(checkpoints, tmp_path, reference, len(PROMPT) + 5)
    together, alone = (
        generate(small, prompts, 30, temperature=0.9, speculative=3).tokens
        for prompts in ([PROMPT[:20], PROMPT], [PROMPT[:20]])
    )
    assert together[0] == alone[0]
    assert len(together[1]) == 5


@pytest.mark.parametrize("speculative", [0, 3])
def test_end_of_text_token_stops(
    checkpoints: dict[str, Path], reference: Binding, models: dict[str, Glm5], tmp_path: Path, speculative: int
) -> None:
    free = generate(models["glm5"], [PROMPT, PROMPT[:30]], 12).tokens
    stop = free[0][4]
    assert stop not in free[0][:4] + free[1]
    model = load(variant(checkpoints["glm5"], tmp_path, eos_token_id=[stop, 154, 155, 156]), reference)
    stopped = generate(model, [PROMPT, PROMPT[:30]], 12, speculative=speculative).tokens
    assert stopped == [free[0][:5], free[1]]


def test_nothing_asked_nothing_computed(model: Glm5) -> None:
    done = generate(model, [PROMPT, [1]], 0, speculative=3)
    assert (done.tokens, done.forwards) == ([[], []], 0)


@pytest.mark.parametrize("speculative", [0, 3])
@pytest.mark.parametrize("chunk", [None, 30])
def test_all_pages_come_back(model: Glm5, caches: list[tuple[Cache, int]], speculative: int, chunk: int | None) -> None:
    prompts = [PROMPT, PROMPT[:64], PROMPT[:7]]  # the second fills a page, and its text begins another
    generate(model, prompts, 12, speculative=speculative, prefill_chunk=chunk)
    [(cache, pages)] = caches
    assert sorted(cache.free) == list(range(pages))


def test_tokens_are_announced_as_they_come(model: Glm5) -> None:
    heard: list[list[int]] = [[], []]
    done = generate(model, [PROMPT, PROMPT[:9]], 12, speculative=3, on_tokens=lambda r, new: heard[r].extend(new))
    assert heard == done.tokens


def test_steps_are_counted(model: Glm5) -> None:
    assert generate(model, [PROMPT], 6).forwards == 6
    assert generate(model, [PROMPT], 6, prefill_chunk=40).forwards == 8


# -- checkpoints and dtypes ------------------------------------------------------------------------------------------


def test_shards_equal_one_file(model: Glm5, directory: Path, reference: Binding, tmp_path: Path) -> None:
    shards = tiny.build(tmp_path, directory.name, shards=3)
    assert len(list(shards.glob("*.safetensors"))) == 3
    assert np.array_equal(load(shards, reference).forward(PROMPT), model.forward(PROMPT))


def test_bfloat16_checkpoint_equals_its_values_in_float32(directory: Path, reference: Binding, tmp_path: Path) -> None:
    stored = load(tiny.build(tmp_path, directory.name, dtype="bfloat16"), reference)
    error = np.abs(stored.forward(PROMPT) - tiny.Transcript(tmp_path).head(tiny.Transcript(tmp_path).hidden(PROMPT)))
    assert error.max() < 2e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(directory: Path, model: Glm5, reference: Binding, dtype: str) -> None:
    half = load(directory, reference, dtype=dtype)
    cache = half.new_cache([64])
    assert {layer.kv.spec.dtype for layer in cache.layers} == {dtype}
    short = PROMPT[:16]  # within index_topk: above it, rounding may turn a choice
    logits = half.forward(short)
    assert logits.dtype == np.float32
    # Rounding errors of a few times 2^-8 (2^-11) on logits of standard deviation 1; an expert may be chosen otherwise.
    assert 0 < np.median(np.abs(logits - model.forward(short))) < {"bfloat16": 0.03, "float16": 0.004}[dtype]
    assert half.generate(PROMPT, 6, speculative=3) == half.generate(PROMPT, 6)


# -- tracing without weights -----------------------------------------------------------------------------------------

MOE, LAYERS = 3, 4


def test_trace_lists_the_calls_of_a_step(directory: Path) -> None:
    calls = [op for op, _ in trace(Config.read(directory), rows=3, context=40)]
    full = {"glm5": 4, "glm52": 2}[directory.name] + 1  # the MTP layer always selects for itself
    assert {op: calls.count(op) for op in ("mla_prolog", "sparse_mla", "moe_layer", "indexer_topk", "mtp_input")} == {
        "mla_prolog": LAYERS + 1,
        "sparse_mla": LAYERS + 1,
        "moe_layer": MOE + 1,
        "indexer_topk": full,
        "mtp_input": 1,
    }
    [head] = [spec for op, spec in trace(Config.read(directory), rows=3) if op == "argmax"]
    assert head.dims == {"T": 1, "V": 160}


def test_expanded_trace_holds_primitives_only(directory: Path) -> None:
    calls = {op for op, _ in trace(Config.read(directory), rows=3, expand=True)}
    assert calls >= {"rms_norm", "linear", "rope", "kv_write", "indexer_scores", "topk", "grouped_gemm"}
    assert not {op for op in calls if contracts()[op].decomposition}


def test_trace_makes_the_calls_of_the_model(directory: Path, model: Glm5, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    for op in contracts():

        def call(*args: object, op: str = op, function: object = getattr(model.ops, op), **attrs: object) -> object:
            made.append(op)
            return function(*args, **attrs)  # type: ignore[operator]

        monkeypatch.setitem(vars(model.ops), op, call)
    model.forward(PROMPT)
    step = [op for op, _ in trace(model.config, rows=len(PROMPT))]
    assert step[: len(made) - 1] == made[:-1]
    assert made[-1] == "linear"


def test_profile_covers_one_row_to_the_whole_context(directory: Path) -> None:
    calls = profile(Config.read(directory))
    assert {"mla_prolog", "rms_norm", "rope", "moe_layer", "grouped_gemm"} <= calls.keys()
    [prolog] = calls["mla_prolog"]
    assert prolog.dims["T"] == (1, 512)
    assert prolog.dims["H"] == 96
    assert {spec.dims["S"] for spec in calls["indexer_topk"]} == {(1, 512)}


@pytest.mark.parametrize("block_size", [16, 128])
def test_text_does_not_depend_on_the_page_size(directory: Path, reference: Binding, model: Glm5, block_size: int) -> None:
    other = load(directory, reference, block_size=block_size)
    assert other.generate(PROMPT, 8, speculative=2) == model.generate(PROMPT, 8)
