"""Cases come from contracts alone, their tokens replay them bit for bit, and the numbers need no libm."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest

from porthal.conformance.cases.capture import calls
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.inputs import written_slots
from porthal.conformance.cases.legal import FAR, FAULTS, LAYOUTS, PAST_2G, THREADS, VIEWS, elements
from porthal.conformance.cases.plan import MANY_ROWS, captured, cases, large
from porthal.conformance.cases.values import RECIPES, Draw
from porthal.conformance.execution.outcome import bits
from porthal.conformance.level import LEVELS
from porthal.hal import Operand, UsageError, contracts, dtype, narrow

STRICTLY = ("add", "linear", "take_rows", "topk")  # planned at the strict level, which takes a while
BRING_UP = [case for c in contracts().values() for case in cases(c)]


def arrays(value):
    if isinstance(value, np.ndarray):
        return [value]
    return list(value.leaves()) if isinstance(value, Operand) else []


def digest(case):
    found = hashlib.sha256()
    for name, value in build(case).operands.items():
        for array in arrays(value):
            found.update(f"{name} {array.shape} {array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def test_every_case_is_its_token():
    assert len(BRING_UP) > 800
    assert len({c.token for c in BRING_UP}) == len(BRING_UP)
    assert [Case.from_token(c.token) for c in BRING_UP] == BRING_UP


@pytest.mark.parametrize("op", sorted(contracts()))
def test_every_op_has_every_kind_of_case(op):
    own = [c for c in BRING_UP if c.op == op]
    assert {c.view for c in own} - {*LAYOUTS, FAR, PAST_2G} == {"", *VIEWS, THREADS}
    arrays = contracts()[op].signature.of_kind("array")
    assert {c.fault for c in own} >= ({"", "dtype", "shape", "kind"} if arrays else {""})
    rows = {dict(c.dims).get("T", dict(c.dims).get("M", dict(c.dims).get("R"))) for c in own}
    assert rows >= {1, 7} and rows & set(range(2, 7)) and rows & set(range(9, 64)) and max(rows) > 256
    recipes = {r for values in contracts()[op].values.values() for r in values[1:]}
    assert {r for c in own for _, r in c.recipes} >= recipes - {"integer"}
    first = next(iter(contracts()[op].dtypes))
    if len(contracts()[op].dtypes[first]) > 1:
        assert {c.dtype(first) for c in own} == set(contracts()[op].dtypes[first])


@pytest.mark.parametrize("op", sorted(contracts()))
def test_levels_grow(op):
    levels = list(LEVELS)[: 3 if op in STRICTLY else 2]
    sizes = [len(cases(contracts()[op], level)) for level in levels]
    assert sizes == sorted(sizes) and sizes[0] < sizes[1]


def test_standard_goes_beyond_sixteen_bits_of_rows():
    assert any(("T", MANY_ROWS) in c.dims for c in cases(contracts()["topk"], "standard"))
    assert any(("T", MANY_ROWS) in c.dims for c in cases(contracts()["rms_norm"], "standard"))


def test_first_case_has_the_served_dims():
    for first in (large(contracts()["rms_norm"], level)[0] for level in ("bring-up", "standard")):
        assert dict(first.dims)["H"] == 6144 and first.dtype("x") == "bfloat16"
        assert not first.recipes and not first.view


def test_tokens_replay_bit_for_bit():
    for case in BRING_UP[::23]:
        if elements(case) < 10**6:
            assert digest(case) == digest(Case.from_token(case.token)), case.token


def test_tokens_mean_the_same_on_every_machine():
    token = "rms_norm,T=2,H=3,x:bf16,x~normal,0"
    x = build(Case.from_token(token)).operands["x"]
    assert x.view(np.uint16).tolist() == [[48689, 15852, 49039], [49039, 16338, 49105]]
    assert Draw("key", (3,)).words().tolist() == [3166119419860501449, 13508936312815780146, 11814179065451601972]


OTHER = ["", "nothing,0", "rms_norm", "rms_norm,T=2", "rms_norm,T=2,q:bf16,0", "rms_norm,T=x,0", "rms_norm,T=2,eps=x,0",
         "rms_norm,T=2,x~big,0"]  # fmt: skip


@pytest.mark.parametrize("token", OTHER)
def test_other_text_is_refused(token):
    with pytest.raises(UsageError):
        Case.from_token(token)


@pytest.mark.parametrize("part", ["batch=decode", "block_size=64", "view=rows", "fault=shape", "via=a"])
def test_a_part_given_twice_is_refused(part):
    parts = ["topk", "T=2", "k=7", "batch=decode", "block_size=64"]
    once = parts if part in parts else [*parts, part]
    assert part in Case.from_token(",".join([*once, "0"])).token.split(",")
    with pytest.raises(UsageError, match=f"{part.partition('=')[0]} is given twice$"):
        Case.from_token(",".join([*once, part, "0"]))


def test_unknown_level_is_refused():
    with pytest.raises(UsageError, match="bring-up"):
        cases(contracts()["add"], "quick")


def test_dtypes_choose_cases():
    chosen = cases(contracts()["linear"], dtypes=["float16"])
    assert chosen and {c.dtype("x") for c in chosen} == {"float16"}
    assert cases(contracts()["topk"], dtypes=["float16"])  # fixed dtypes are tested always


# -- values ----------------------------------------------------------------------------------------------------------


def test_the_bell_has_mean_zero_and_variance_one():
    x = Draw("bell", (100_000,)).bell()
    assert abs(x.mean()) < 0.02 and abs(x.var() - 1) < 0.02 and np.abs(x).max() < 3
    assert (x * 2**21 == np.rint(x * 2**21)).all()


def test_streams_differ_by_key_and_part():
    words = {tuple(Draw(k, (4,)).words(p)) for k in "ab" for p in ("", "x")}
    assert len(words) == 4


@pytest.mark.parametrize("name", ["normal", "small", "large", "zeros", "equal", "ties", "integer", "negative", "outlier",
                                  "offset", "denormal", "special", "weight"])  # fmt: skip
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_float_recipes_fit_every_dtype(name, kind):
    x = narrow(np.asarray(RECIPES[name](Draw("fit", (10, 33), kind, {})), np.float64), kind)
    assert x.shape == (10, 33)
    assert np.isfinite(x.astype(np.float64)).all() == (name != "special")
    if name not in ("zeros", "equal", "ties", "integer"):
        assert len(np.unique(bits(x))) > (3 if name == "offset" else 30)


def test_counts_fit_their_rows():
    for E, M in ((8, 64), (1, 5), (33, 7), (3, 0)):
        counts = RECIPES["counts"](Draw("c", (E,), "int32", {"M": M}))
        assert counts.min() >= 0 and counts.sum() <= M
        assert (counts[1::3] == 0).all()


def test_permutation_is_one():
    rows = RECIPES["permutation"](Draw("p", (33,), "int32", {}))
    kept = rows[rows >= 0]
    assert len(np.unique(kept)) == len(kept) == 33 - 4 and kept.max() < 33


def test_narrow_rounds_like_exact_integers():
    """Round to nearest even by rational arithmetic, for values on, beside and between ties, and at both ends."""
    kinds = {"bfloat16": (8, -133), "float16": (11, -24), "float32": (24, -149)}
    for kind, (precision, lowest) in kinds.items():
        draw = Draw(f"narrow/{kind}", (4000,))
        exponent = draw.integers(lowest - 2, 14, "e")
        mantissa = draw.integers(2**precision, 2 ** (precision + 1), "m") * 2 + 1  # ties of the last place
        beside = np.array([0, 1, -1])[draw.integers(0, 3, "b")]
        for e, m, b in zip(exponent.tolist(), mantissa.tolist(), beside.tolist()):
            exact = (Fraction(m) + Fraction(b, 2**20)) * Fraction(2) ** (e - precision)
            got = Fraction(float(narrow(np.array([float(exact)]), kind)[0]))
            assert Fraction(float(exact)) == exact
            step = Fraction(2) ** max(e + 2 - precision, lowest)
            assert got == round(exact / step) * step, (kind, e, m, b)


def test_operands_are_adjusted_as_their_contract_says(monkeypatch):
    """Two of three drafts are made likely, by 8 above what was drawn."""
    contract = contracts()["speculative_verify"]
    case = Case.from_token("speculative_verify@2,R=7,V=256,n=3,0")
    found = build(case).operands
    monkeypatch.setattr(contract, "adjust", None)
    drawn = build(case).operands
    more = np.take_along_axis((found["logits"] - drawn["logits"])[:, :-1], found["draft"][..., None], 2)[..., 0]
    r, i = np.indices(more.shape)
    assert np.array_equal(np.rint(more), np.where((r + i) % 3 != 2, 8, 0))


# -- poison ----------------------------------------------------------------------------------------------------------


def test_what_must_not_be_read_is_nan():
    token = "sparse_mla,T=7,N=1,C=512,R=64,k=16,scale=0.0625,q_latent:bf16,batch=mixed,block_size=64,0"
    inputs = build(Case.from_token(token))
    kv, batch = inputs.operands["kv"], inputs.batch
    read = np.zeros(kv.spec.slots, bool)
    for r in range(batch.R):
        read[batch.slots_of(r)] = True
    assert read.any() and not read.all()
    assert np.isnan(kv["c"][~read].astype(float)).all() and np.isfinite(kv["c"][read].astype(float)).all()


def test_invisible_scores_are_nan():
    inputs = build(Case.from_token("topk,T=7,k=7,batch=mixed,block_size=64,0"))
    scores, visible = inputs.operands["scores"], inputs.batch.visible
    hidden = np.arange(scores.shape[1]) >= visible[:, None]
    assert hidden.any() and np.isnan(scores[hidden]).all() and np.isfinite(scores[~hidden]).all()


def test_rows_beyond_the_counts_are_nan():
    inputs = build(Case.from_token("grouped_gemm,M=64,K=96,N=96,E=8,x:fp32,0"))
    used = int(inputs.operands["counts"].sum())
    assert 0 < used < 64 and np.isnan(inputs.operands["x"][used:]).all()


@pytest.mark.parametrize("batch", ["decode", "prefill", "chunked", "mixed", "padded", "idle", "crowd"])
@pytest.mark.parametrize("rows", [0, 1, 7, 33])
def test_compositions_are_legal_batches(batch, rows):
    if batch == "crowd" and rows == 0:
        rows = 65536
    inputs = build(Case.from_token(f"topk,T={rows},k=7,batch={batch},block_size=64,0"))
    assert rows == inputs.batch.T and inputs.spec.dims["T"] == rows
    if batch == "padded" and rows > 1:
        assert (inputs.batch.kv_len == 0).any()
    if batch == "idle" and rows:
        assert (inputs.batch.q_len == 0).any()


def test_writers_get_slots_of_their_own():
    """In every composition of a batch; dtypes, widths and values have no part in it."""
    plan = cases(contracts()["kv_write"], "standard")
    by_batch = {(dict(c.dims)["T"], c.batch, c.block_size): c for c in sorted(plan, key=elements, reverse=True)}
    assert len(by_batch) > 20
    for case in by_batch.values():
        inputs = build(case)
        slots = inputs.batch.slots[inputs.batch.slots >= 0]
        assert len(np.unique(slots)) == len(slots), case.token
        assert written_slots(inputs, inputs.operands["pages"]).sum() == len(slots)


@pytest.mark.parametrize("op", ["kv_write", "mla_prolog", "index_prolog"])
def test_slot_0_is_written_beside_padding(op):
    """There padding rows of a captured batch write, too, in some kernels."""
    [eager] = [build(c).batch for c in cases(contracts()[op]) if c.batch.startswith("1/0+1/1+1/0")]
    [first] = [calls(c)[1].batch for c in captured(contracts()[op]) if "1/130" in c.batch]
    for batch in (eager, first):
        assert batch.slots[0] == -1 and batch.slots[1] == 0 and (batch.slots[2:] == -1).any()


def test_integer_cases_hold_integers_only():
    case = next(c for c in BRING_UP if c.op == "linear" and ("w", "integer") in c.recipes)
    for value in build(case).operands.values():
        array = arrays(value)[0].astype(float)
        assert (array == np.rint(array)).all() and dtype(arrays(value)[0]) == case.dtype("x")


def test_faults_are_made_once_per_op():
    assert len([c for c in BRING_UP if c.op == "linear" and c.fault]) == len(FAULTS) - 1  # no operand of indices
