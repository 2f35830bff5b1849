"""Multi-token prediction against the transcript: ids and logits of drafts, with own selections and a shared one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from porthal import Binding
from porthal.model import Glm5, load
from porthal.model.generate import generate
from tests.checkpoints import variant
from tests.oracles.tiny import PROMPT
from tests.oracles.transcript import mtp_drafts

TOLERANCE = 1e-5


def drafts(model: Glm5, tokens: Sequence[int], steps: int, index_share: bool) -> tuple[list[int], np.ndarray]:
    """Ids and logits [steps, vocab] of drafts after `tokens` and the main model's next token."""
    ops, cache = model.ops, model.new_cache([256])
    assert model.mtp
    request = cache.new_request()

    def ids(values: Sequence[int]) -> object:
        return ops.from_numpy(np.asarray(values, np.int32))

    batch = ops.plan(cache.step([request], [len(tokens)]))
    last = ids(batch.last_rows)
    g = model.hidden(ids(tokens), batch, cache)
    following = int(ops.to_numpy(ops.argmax(model.logits(ops.take_rows(g, last))))[0])
    g, selection = model.mtp.hidden(ids([*tokens[1:], following]), model.embed, g, batch, cache.layers[-1], None)
    g, selection = ops.take_rows(g, last), ops.select_rows(selection, last) if index_share else None
    out, logits = [], []
    for step in range(steps):
        if step:
            batch = ops.plan(cache.step([request], [1]))
            g, _ = model.mtp.hidden(ids(out[-1:]), model.embed, g, batch, cache.layers[-1], selection)
        logits.append(ops.to_numpy(model.logits(g))[0])
        out.append(int(logits[-1].argmax()))
    return out, np.array(logits)


@pytest.mark.parametrize("index_share", [False, True])
def test_drafts_equal_the_transcript(directory: Path, model: Glm5, index_share: bool) -> None:
    ids, logits = drafts(model, PROMPT, 3, index_share)
    expected_ids, expected = mtp_drafts(directory, PROMPT, steps=3, index_share=index_share)
    assert np.abs(logits - expected).max() < TOLERANCE
    assert ids == expected_ids


def test_embedding_comes_first(directory: Path, model: Glm5) -> None:
    wrong = mtp_drafts(directory, PROMPT, steps=1, variant={"mtp_hidden_first"})[1]
    assert np.abs(drafts(model, PROMPT, 1, False)[1] - wrong).max() > 10 * TOLERANCE


@pytest.mark.parametrize("chunk", [None, 33])
def test_generation_makes_these_drafts(
    directory: Path, model: Glm5, monkeypatch: pytest.MonkeyPatch, chunk: int | None
) -> None:
    """The drafts of every step of a speculative run, whatever was accepted before, are the transcript's."""
    judged: list[list[int]] = []
    verify = model.ops.speculative_verify

    def record(logits: np.ndarray, draft: np.ndarray, *rest: np.ndarray) -> np.ndarray:
        judged.append(draft[0].tolist())
        return verify(logits, draft, *rest)

    monkeypatch.setitem(vars(model.ops), "speculative_verify", record)
    reached = []
    out = generate(
        model, [PROMPT], 8, speculative=3, prefill_chunk=chunk, on_tokens=lambda _, new: reached.append(len(new))
    )
    for made, end in zip(judged, np.cumsum(reached)):
        text = [*PROMPT, *out.tokens[0][: end - 1]]  # the transcript adds the main model's next token itself
        assert made == mtp_drafts(directory, text, steps=3)[0]
    assert len(judged) == len(reached) - 1 > 1


def test_a_module_that_is_always_right_saves_steps(
    checkpoints: dict[str, Path], reference: Binding, tmp_path: Path
) -> None:
    """Every block adds nothing and the module passes the embedding on: it drafts what the main model will say."""

    def same_answer(tensors: dict[str, np.ndarray]) -> None:
        for name in tensors:
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensors[name][...] = 0
        last = "model.layers.4."
        hidden = tensors["model.norm.weight"].size
        tensors[last + "eh_proj.weight"][...] = np.eye(hidden, 2 * hidden)
        tensors[last + "enorm.weight"][...] = 1
        tensors[last + "shared_head.norm.weight"][...] = tensors["model.norm.weight"]

    perfect = load(variant(checkpoints["glm5"], tmp_path, same_answer, eos_token_id=None), reference)
    plain, speculative = (generate(perfect, [PROMPT, PROMPT[:20]], 24, speculative=n) for n in (0, 5))
    assert speculative.tokens == plain.tokens
    assert (plain.forwards, speculative.forwards) == (24, 1 + 4)  # prefill gives 1 token, each step 6 of the other 23
