"""The backend that runs them: cases of every operator, sessions, providers."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is not installed: pip install -e '.[dev]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[dev]'")

import porthal  # noqa: E402
from porthal.backends.onnxruntime import backend as module  # noqa: E402
from porthal.backends.onnxruntime.functions import variants  # noqa: E402
from porthal.conformance.cases.cost import seconds  # noqa: E402
from porthal.conformance.cases.plan import cases  # noqa: E402
from porthal.conformance.execution.bindings import Bindings  # noqa: E402
from porthal.conformance.runner.check import check  # noqa: E402
from porthal.hal import Unavailable, contracts, create  # noqa: E402


@pytest.fixture(scope="module")
def made():
    return Bindings(create("onnxruntime"))


@pytest.mark.parametrize("op", [op for op in contracts() if variants(op)])
def test_the_cheapest_cases_of_each_dtype_pass(op, made):
    whole = sorted((c for c in cases(contracts()[op]) if not c.seq), key=lambda c: (c.dtypes, seconds(c)))
    chosen = [c for _, each in groupby(whole, key=lambda c: c.dtypes) for c in list(each)[:4]]
    found = {case.token: check(case, made) for case in chosen}
    assert len(found) >= 4
    assert {token: outcome.verdict for token, outcome in found.items() if outcome.failed} == {}


def test_a_cache_is_written_in_place():
    b = porthal.bind("onnxruntime")
    spec = porthal.hal.PagesSpec((("c", 4), ("kp", 2)), "bfloat16", 2, 4)
    pages = b.alloc_pages(spec)
    before = pages.native["c"]
    batch = b.plan(porthal.hal.Batch.build([3], [3], [[1]], 4))
    rows = [np.arange(3 * w, dtype=np.float32).reshape(3, w).astype(before.dtype) for w in (4, 2)]
    after = b.kv_write(pages, batch, *rows)
    assert after.native["c"] is before
    assert (before[4:7] == rows[0]).all() and not before[:4].any() and not before[7:].any()
    assert (after.native["kp"][4:7] == rows[1]).all()


def test_a_cache_with_gaps_is_written_too():
    b = porthal.bind("onnxruntime")
    spec = porthal.hal.PagesSpec((("k", 4),), "float32", 2, 4)
    whole = np.zeros((8, 6), np.float32)
    batch = b.plan(porthal.hal.Batch.build([3], [3], [[1]], 4))
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    b.kv_write(porthal.hal.Pages(spec, {"k": whole[:, 1:5]}), batch, rows)
    assert (whole[4:7, 1:5] == rows).all() and whole.sum() == rows.sum()


def test_draws_at_the_borders():
    """Quarters are exact: u times the mass that was reached is exceeded, and the shortest prefix reaches top_p."""
    b = porthal.bind("onnxruntime")
    u = np.array([0, 0.2, 0.25, 0.5, 0.75, 0.5], np.float32)
    top_p = np.array([1, 1, 1, 1, 1, 0.5], np.float32)
    ones, none = np.ones(6, np.float32), np.zeros(6, np.int32)
    assert b.sample(np.zeros((6, 4), np.float32), u, ones, none, top_p).tolist() == [0, 0, 1, 2, 3, 1]
    half = np.full(6, 0.5, np.float32)
    assert b.sample(np.zeros((6, 2), np.float32), u, ones, none, half).tolist() == [0] * 6


@pytest.mark.parametrize(("scheme", "top"), [("int8_token", 127), ("fp8_group", 448)])
def test_codes_are_those_of_the_rule(scheme, top):
    """Rows whose scale is 1, so that halves are ties; a row of zeros; 130 columns, the last two of which are a group in fp8."""
    b = porthal.bind("onnxruntime")
    x = np.zeros((4, 130), np.float32)
    x[0, :6] = top, -top, 2.5, 3.5, -0.5, -0.0
    x[1, 128:] = 3 * top, -top
    x[2] = np.linspace(-top, top, 130)
    found, wanted = b.quantize(x, scheme=scheme), porthal.bind("reference").quantize(x, scheme=scheme)
    for part in ("codes", "scale"):
        assert found.native[part].tobytes() == wanted.native[part].tobytes(), part
    said = b.dequantize(found, out="float32")
    assert said[0, 0] == top and said[1, 128] == 3 * top and (said[3] == 0).all()


def test_sessions_are_kept_and_bounded(monkeypatch):
    monkeypatch.setattr(module, "SESSIONS", 3)
    b = create("onnxruntime")
    rms_norm = next(k.function for k in b.candidates(contracts()["rms_norm"]))
    x, weight = np.ones((2, 8), np.float32), np.ones(8, np.float32)
    for eps in (0.1, 0.2, 0.3, 0.4):
        assert np.allclose(rms_norm(x, weight, eps=eps), 1 / np.sqrt(1 + eps))
    assert len(b.sessions) == 3
    kept = list(b.sessions.values())
    rms_norm(x[:1], weight, eps=0.3)  # of other rows, so the same graph
    assert sorted(map(id, b.sessions.values())) == sorted(map(id, kept))


def test_a_provider_that_is_not_here_is_named(monkeypatch):
    with pytest.raises(Unavailable, match=r"has no provider 'cann' here: expected one of .*cpu"):
        create("onnxruntime:cann")
    monkeypatch.setenv("PORTHAL_ORT_PROVIDERS", "tensorrt, cpu")
    with pytest.raises(Unavailable, match="has no provider 'tensorrt' here"):
        create("onnxruntime")
    monkeypatch.setenv("PORTHAL_ORT_PROVIDERS", "CPUExecutionProvider")
    assert create("onnxruntime").providers == ["CPUExecutionProvider"]
