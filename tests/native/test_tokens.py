"""From logits to tokens on the cpu backend, against the contracts in float64, in every instruction set that this CPU runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

try:
    from porthal.backends.cpu import _native  # noqa: F401
except ImportError as error:
    pytest.skip(f"the native module is not built ({error}); run `pip install .`", allow_module_level=True)

from porthal.hal import contracts, create, numpy_dtype, widen

pytestmark = pytest.mark.usefixtures("isa")
CPU = create("cpu")
INF = np.inf
DTYPES = ("float32", "bfloat16", "float16")


def exact(op, *operands, **attrs):
    return contracts()[op].reference(*map(widen, operands), **attrs)


def row(name, n, rng):
    """One row of logits, larger than a block of the loops."""
    x = rng.standard_normal(n) * 3
    return {
        "normal": x,
        "first blocks masked": np.where(np.arange(n) < n - 3, -INF, x),
        "nothing": np.full(n, -INF),
        "infinite": np.where(np.arange(n) == n - 2, INF, x),
        "nan": np.where(np.arange(n) == n // 2, np.nan, x),
        "only nan": np.full(n, np.nan),
        "rising": np.arange(n) / 64,
        "equal": np.full(n, -2.0),
        "zeros": np.where(np.arange(n) % 2, 0.0, -0.0),
    }[name]


ROWS = ("normal", "first blocks masked", "nothing", "infinite", "nan", "only nan", "rising", "equal", "zeros")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 5, 16, 2050, 5003])
def test_what_one_pass_finds(dtype, n):
    rng = np.random.default_rng(n)
    logits = np.stack([row(name, n, rng) for name in ROWS if n > 3 or name not in ("infinite", "first blocks masked")])
    logits = logits.astype(numpy_dtype(dtype))
    ids = np.int32(rng.integers(-1, n, len(logits)))
    assert np.array_equal(CPU.argmax(logits), exact("argmax", logits))
    assert np.array_equal(CPU.check_finite(logits, ids), exact("check_finite", logits, ids))
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = exact("log_softmax", logits)
    found = CPU.log_softmax(logits)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    at = np.maximum(ids, 0)
    assert np.array_equal(CPU.gather_logprob(logits, at), found[np.arange(len(at)), at], equal_nan=True)
    strided = np.repeat(logits, 2, axis=1)[:, ::2]
    assert np.array_equal(CPU.log_softmax(strided), found, equal_nan=True)
    assert np.array_equal(CPU.argmax(strided), CPU.argmax(logits))


def admitted(op, operands, results):
    """The first row that the contract forbids, or None."""
    contract = contracts()[op]
    wide = {name: widen(value) for name, value in operands.items() if value is not None}
    return contract.admits(**wide, results=results, slack=contract.slack(**wide))


SIZES = st.sampled_from([1, 2, 7, 300, 4096, 9000])


@settings(max_examples=120, deadline=None)
@given(
    n=SIZES,
    name=st.sampled_from([name for name in ROWS if name not in ("infinite", "first blocks masked")]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from([0.0, 1e-5, 0.3, 1.0, 1e4]),
    top_p=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    share=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
)
def test_sample_draws_what_may_be_drawn(n, name, dtype, seed, temperature, top_p, share):
    rng = np.random.default_rng(seed)
    logits = np.stack([row(name, n, rng)] * 3).astype(numpy_dtype(dtype))
    logits[1] = np.round(logits[1])  # many equals
    operands = {
        "logits": logits,
        "u": np.float32([0, rng.random(), 1 - 2**-24]),
        "temperature": np.full(3, temperature, np.float32),
        "top_k": np.full(3, int(share * n), np.int32),
        "top_p": np.full(3, top_p, np.float32),
    }
    ids = CPU.sample(*operands.values())
    assert admitted("sample", operands, ids) is None
    for t in range(3):  # a row does not depend on the others
        assert CPU.sample(*(value[t : t + 1] for value in operands.values())) == ids[t]


@settings(max_examples=80, deadline=None)
@given(
    n=st.sampled_from([1, 7, 300, 4100]),
    drafts=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_p=st.sampled_from([0.5, 0.95, 1.0]),
    share=st.sampled_from([0.0, 0.01, 0.5]),
    proposed=st.booleans(),
)
def test_drafts_are_judged_as_the_contract_says(n, drafts, seed, temperature, top_p, share, proposed):
    rng = np.random.default_rng(seed)
    draft_probs = rng.dirichlet(np.ones(n), (2, drafts)).astype(np.float32) if proposed else None
    operands = {
        "logits": np.float32(rng.standard_normal((2, drafts + 1, n)) * 2),
        "draft": np.int32(rng.integers(0, n, (2, drafts))),
        "u": np.float32(rng.random((2, drafts + 1))),
        "temperature": np.full(2, temperature, np.float32),
        "top_k": np.full(2, int(share * n), np.int32),
        "top_p": np.full(2, top_p, np.float32),
        "draft_probs": draft_probs,
    }
    contracts()["speculative_verify"].adjust(**{k: v for k, v in operands.items() if v is not None})
    tokens = CPU.speculative_verify(*operands.values())
    assert admitted("speculative_verify", operands, tokens) is None


def test_sampled_tokens_have_the_distribution(isa):
    """All u of a grid: each token is drawn as often as its probability says."""
    rng, count = np.random.default_rng(1), 4000
    logits = np.float32(rng.standard_normal(12))
    rows = (np.broadcast_to(logits, (count, 12)), np.float32((np.arange(count) + 0.5) / count), np.full(count, 0.7, np.float32))
    ids = CPU.sample(*rows, np.zeros(count, np.int32), np.ones(count, np.float32))
    p = np.exp(logits.astype(np.float64) / 0.7)
    np.testing.assert_allclose(np.bincount(ids, minlength=12) / count, p / p.sum(), atol=2 / count)


def test_bad_settings_are_refused_in_a_sentence():
    logits, one = np.zeros((2, 5), np.float32), np.float32([0.5, 0.5])
    good = {"u": one, "temperature": one, "top_k": np.int32([1, 1]), "top_p": one}
    for name, value, words in [
        ("u", np.float32([0, 1]), r"^u\[1\] is 1.0+, expected 0 to less than 1\.$"),
        ("temperature", np.float32([np.nan, 1]), r"^temperature\[0\] is nan, expected at least 0\.$"),
        ("temperature", np.float32([1, -1]), r"^temperature\[1\] is -1.0+, expected at least 0\.$"),
        ("top_k", np.int32([6, 1]), r"^top_k\[0\] is 6, expected 0 to 5\.$"),
        ("top_p", np.float32([0.5, 1.5]), r"^top_p\[1\] is 1.50*, expected 0 to 1\.$"),
        ("top_p", np.float32([0.5]), r"^top_p has shape \[1\], expected \[2\]\.$"),
    ]:
        with pytest.raises(ValueError, match=words):
            CPU.sample(logits, *(good | {name: value}).values())
    with pytest.raises(ValueError, match=r"^ids\[1\] is 5, expected 0 to 4\.$"):
        CPU.gather_logprob(logits, np.int32([0, 5]))
    with pytest.raises(ValueError, match=r"^draft\[0, 0\] is -1, expected 0 to 4\.$"):
        CPU.speculative_verify(logits.reshape(1, 2, 5), np.int32([[-1]]), one.reshape(1, 2), one[:1], np.int32([0]), one[:1])
