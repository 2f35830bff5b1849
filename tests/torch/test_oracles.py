"""The oracles against each other: the float64 transcript, written from formulas, and transformers in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.oracles import tiny
from tests.oracles.transcript import WRONG, Transcript, forward, mtp_drafts

pytest.importorskip("transformers", minversion="5.23")

PROMPT = tiny.PROMPT
# Logits have a standard deviation near 1; float32 against float64 was measured at 8e-6 or less.
TOLERANCE = 2e-5
KINDS = ["glm5", "glm52"]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def test_transcript_equals_transformers(directory: Path) -> None:
    difference = distance(forward(directory, PROMPT), tiny.hf_logits(directory, PROMPT))
    assert difference < TOLERANCE


def test_sparse_mask_acts(directory: Path) -> None:
    model = Transcript(directory)
    logits = model.head(model.hidden(PROMPT))
    model.config["index_topk"] = len(PROMPT)
    difference = np.abs(model.head(model.hidden(PROMPT)) - logits).max(1)
    assert difference[:16].max() == 0
    assert difference[16:].max() > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_choice_is_close(checkpoints: dict[str, Path], tmp_path: Path, kind: tiny.Kind, dtype: tiny.Dtype) -> None:
    directory = checkpoints[kind] if dtype == "float32" else tiny.build(tmp_path, kind, dtype=dtype)
    tokens = [*PROMPT, *tiny.hf_greedy(directory, PROMPT, 24)]
    assert min(tiny.smallest_gap(directory, PROMPT), tiny.smallest_gap(directory, tokens)) > 1e-4
    first, second = np.sort(forward(directory, tokens)[len(PROMPT) - 1 :], axis=1)[:, -2:].T[::-1]
    assert (first - second).min() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_shards(tmp_path: Path, kind: tiny.Kind) -> None:
    directory = tiny.build(tmp_path, kind, shards=2, dtype="bfloat16")
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert distance(forward(directory, PROMPT), tiny.hf_logits(directory, PROMPT)) < TOLERANCE


# The rest of WRONG needs exact ties or the MTP module, and has its own tests below.
@pytest.mark.parametrize("name", sorted(WRONG.keys() - {"ties_highest", "indexer_on_shared", "mtp_hidden_first"}))
def test_wrong_variant_differs(directory: Path, name: str) -> None:
    difference = distance(forward(directory, PROMPT, {name}), tiny.hf_logits(directory, PROMPT))
    assert difference > 10 * TOLERANCE


def test_indexer_on_shared_layers_differs(tmp_path: Path) -> None:
    directory = tiny.build(tmp_path, "glm52")
    difference = np.abs(forward(directory, PROMPT, {"indexer_on_shared"}) - tiny.hf_logits(directory, PROMPT)).max(1)
    assert difference[:16].max() < TOLERANCE  # nothing shows before more than index_topk tokens are visible
    assert difference[16:].max() > 10 * TOLERANCE


def test_ties_take_the_lowest_index(directory: Path, tmp_path: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    for name in tensors:
        if name.endswith("weights_proj.weight"):
            tensors[name] = np.zeros_like(tensors[name])
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    right, wrong = Transcript(tmp_path), Transcript(tmp_path, {"ties_highest"})
    assert distance(right.hidden(PROMPT), wrong.hidden(PROMPT)) > 10 * TOLERANCE
    for layer in range(4):
        assert [list(np.flatnonzero(row)) for row in right.selected[layer]] == [
            list(range(min(16, t + 1))) for t in range(len(PROMPT))
        ]
        assert list(np.flatnonzero(wrong.selected[layer][-1])) == list(range(len(PROMPT) - 16, len(PROMPT)))


def test_unknown_variant_is_refused(directory: Path) -> None:
    with pytest.raises(ValueError, match=r"\['half'\] is unknown"):
        forward(directory, PROMPT, {"half"})


def test_transformers_cache(directory: Path) -> None:
    full = tiny.hf_logits(directory, PROMPT)
    assert distance(tiny.hf_chunked(directory, PROMPT, [40, 30, 26]), full) < TOLERANCE
    assert distance(tiny.hf_cached_decode(directory, PROMPT, 80), full) < TOLERANCE


def test_greedy(directory: Path) -> None:
    tokens = list(PROMPT)
    for _ in range(6):
        tokens.append(int(forward(directory, tokens)[-1].argmax()))
    assert tiny.hf_greedy(directory, PROMPT, 6) == tokens[-6:]


@pytest.mark.parametrize("index_share", [False, True])
def test_mtp_equals_transformers_block(directory: Path, index_share: bool) -> None:
    ids, logits = mtp_drafts(directory, PROMPT, steps=3, index_share=index_share)
    expected_ids, expected = tiny.hf_mtp_drafts(directory, PROMPT, steps=3, index_share=index_share)
    assert distance(logits, expected) < TOLERANCE
    assert ids == expected_ids


def test_mtp_index_share(directory: Path) -> None:
    own, shared = (mtp_drafts(directory, PROMPT, index_share=share)[1] for share in (False, True))
    assert distance(own[0], shared[0]) == 0
    assert distance(own[1], shared[1]) > 10 * TOLERANCE
    default = mtp_drafts(directory, PROMPT)[1]
    assert distance(default, shared if "glm52" in directory.name else own) == 0


def test_mtp_hidden(directory: Path) -> None:
    model = Transcript(directory)
    ids, logits = mtp_drafts(directory, PROMPT)
    given_ids, given = mtp_drafts(directory, PROMPT, hidden=model.hidden(PROMPT))
    assert ids == given_ids
    assert distance(logits, given) == 0
    assert len(ids) == 3


def test_mtp_wrong_order_and_zeroed_embedding_differ(directory: Path) -> None:
    right = mtp_drafts(directory, PROMPT, steps=1)[1]
    assert distance(right, mtp_drafts(directory, PROMPT, steps=1, variant={"mtp_hidden_first"})[1]) > 10 * TOLERANCE
    # Row 0 reaches the last row only where that row selects key 0, so a prompt within index_topk is used.
    short = PROMPT[:12]
    plain, zeroed = (mtp_drafts(directory, short, steps=1, zero_first=zero)[1] for zero in (False, True))
    assert distance(plain, zeroed) > 10 * TOLERANCE
