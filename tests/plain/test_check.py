"""The minute's look at a port: the stored curve is the checkpoint's, mistakes leave it, and one verdict says so."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from porthal import conformance
from porthal.backends.reference.backend import Reference
from porthal.conformance.diff import check, curve
from porthal.conformance.diff.curve import Probe, probes, stored
from porthal.conformance.report.facts import Facts
from porthal.hal import Need, bind, contracts, create, limits
from porthal.model.evaluate import logprobs
from porthal.model.load import DEMO, load
from porthal.model.quantising import quantise
from tests.plugins import install, installed

TEXT = "multi-byte text"


def bits(backend=None, text=TEXT, dtype=curve.DTYPE, most=1024):
    model = load(DEMO, bind(backend=backend or Reference()), dtype=dtype)
    ids = list(stored().texts[text].encode())[:most]
    return [-x / math.log(2) for x in logprobs(model, ids, len(ids))]


def chip(**members):
    return type("Made", (Reference,), {"name": "made", **members})()


# -- the curve ---------------------------------------------------------------------------------------------------------


def test_the_stored_curve_is_that_of_the_checkpoint():
    assert bits(dtype="float32") == pytest.approx(stored().curve.bits[TEXT], abs=2e-3)
    known = stored()
    assert set(known.texts) == set(known.curve.bits) == set(known.typical) == set(known.stretch)
    for name, text in known.texts.items():
        assert len(known.curve.bits[name]) == min(len(text.encode()), 1024) - 1
    assert sum(byte > 127 for byte in known.texts[TEXT].encode()) > 100
    assert len(known.curve.accepted) == curve.DRAFTS and 0.4 < min(known.curve.accepted) < max(known.curve.accepted) < 1


def test_the_curve_goes_past_what_sparse_attention_selects():
    assert len(stored().texts["source code"].encode()) >= 1024 > 4 * 128


def truth(op):
    return create("reference").derive(contracts()[op])


def signed_bytes(self, ids, table):
    return truth("embedding")(np.where(ids > 127, 256 - ids, ids), table)


def without_the_gain(self, x, weight, *, eps=1e-5):
    return truth("rms_norm")(x, np.ones_like(weight), eps=eps)


def of_another_scale(self, *args, scale, **attrs):
    return truth("sparse_mla")(*args, scale=0.5 * scale, **attrs)


@pytest.mark.parametrize(
    ("op", "kernel", "text"),
    [
        ("embedding", signed_bytes, TEXT),
        ("rms_norm", without_the_gain, "source code"),
        ("sparse_mla", of_another_scale, "source code"),
    ],
)
def test_a_mistake_leaves_the_curve(op, kernel, text):
    theirs = stored().curve.bits[text]
    typical, stretch = curve._apart(bits(chip(**{op: kernel}), text), theirs)
    assert typical > stored().typical[text] or stretch > stored().stretch[text]


def test_rounding_does_not_leave_it():
    typical, stretch = curve._apart(bits(), stored().curve.bits[TEXT])
    assert 0 < typical <= stored().typical[TEXT] and 0 < stretch <= stored().stretch[TEXT]


def test_each_part_is_judged_apart():
    known = stored()
    assert [p.holds for p in probes(known.curve, known)] == [True] * 3

    def found(**changes):
        return {p.name: p.holds for p in probes(replace(known.curve, **changes), known)}

    code = list(known.curve.bits["source code"])
    everywhere = [b + 1.1 * known.typical["source code"] for b in code]
    assert found(bits=known.curve.bits | {"source code": everywhere}) == {"source code": False, TEXT: True, "MTP": True}
    at_the_end = code[:-63] + [b + 1.1 * known.stretch["source code"] for b in code[-63:]]
    assert found(bits=known.curve.bits | {"source code": at_the_end}) == {"source code": False, TEXT: True, "MTP": True}
    lower = [*known.curve.accepted[:-1], known.curve.accepted[-1] - 1.1 * known.accepted]
    assert found(accepted=lower) == {"source code": True, TEXT: True, "MTP": False}


def test_under_schemes_the_reference_under_the_same_is_the_measure():
    known = stored()
    off = {text: [b + 2 * known.typical[text] for b in bits] for text, bits in known.curve.bits.items()}
    coded = replace(known.curve, bits=off, accepted=[a + 0.1 for a in known.curve.accepted])
    assert [p.holds for p in probes(coded, known)] == [False] * 3
    found = list(probes(coded, known, coded))
    assert [p.holds for p in found] == [True] * 3
    assert "(1.2935 without schemes); a byte is off by 0 of at most 0.017" in found[0].words
    assert found[2].words.endswith("(85%, 63%, 55% without schemes): off by 0 of at most 0.15")
    far = [b + 1.1 * curve.CODED * known.typical[TEXT] for b in off[TEXT]]
    assert [p.holds for p in probes(replace(coded, bits=off | {TEXT: far}), known, coded)] == [True, False, True]


def test_the_calls_under_schemes_are_those_of_the_plan(tmp_path: Path):
    quantise(DEMO, tmp_path / "fp8", "fp8")
    assert check.Demo(tmp_path / "fp8", ("int8_keys",)).schemes() == ("fp8_block", "int8_keys")
    assert check.Demo().schemes() == ()
    found = list(check._coded("glm-5", ("int8_keys",)))
    assert {case.op for case in found} == {"index_prolog", "indexer_topk", "indexer_scores", "kv_write"}
    assert {scheme for case in found for _, scheme in case.schemes} == {"int8_keys"}
    assert not list(check._coded("glm-5", ()))


# -- the verdict -------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """The calls of one op, and a curve that is said."""
    all_calls, said = check._calls, [Probe("source code", True, "as it should be")]
    monkeypatch.setattr(check, "_coded", lambda model, schemes: [])
    monkeypatch.setattr(check, "_calls", lambda model: [c for c in all_calls(model) if c.op == "rms_norm"])
    monkeypatch.setattr(check, "_curve", lambda backend, emulated, demo: said)
    return said


def test_one_verdict_and_one_exit_code(command_line, few):
    code, out, _ = command_line("check", "--backend", "reference")
    said = r"^calls: (\d+) of \1 pass, in the sizes of glm-5 and of the demo checkpoint \(\1 own\)$"
    assert code == 0 and re.search(said, out, re.M)
    assert "source code: as it should be\nreference (hardware) in bfloat16 computes what it should, as far as " in out
    code, out, _ = command_line("check", "--backend", "reference", "--cache-scheme", "int8_keys")
    assert code == 0 and "of the demo checkpoint, and under int8_keys (" in out
    assert "reference (hardware) in bfloat16 under int8_keys computes what it should" in out
    code, out, err = command_line("check", "--backend", "reference", "--scheme", "q4")
    assert (code, out) == (2, "") and err.startswith("porthal: scheme is 'q4': expected one of fp8, int8")
    few[:] = [Probe("source code", False, "off")]
    code, out, _ = command_line("check", "--backend", "reference")
    assert code == 1 and "source code: NOT as it must be, off\n" in out
    assert out.endswith("reference (hardware) in bfloat16 does not compute what it should: source code\n")


WRONG = """
    from porthal.backends.reference.backend import Reference

    class Chip(Reference):
        def rms_norm(self, x, weight, *, eps=1e-5):
            y = self.empty(x.shape, x.dtype.name)
            y[...] = x
            return y
"""


def test_a_wrong_kernel_and_a_chip_without_one(command_line, few, tmp_path: Path):
    install(tmp_path, "wrong", backend=WRONG)
    install(tmp_path, "empty")
    with installed(tmp_path):
        code, out, _ = command_line("check", "--backend", "wrong")
        assert code == 1 and out.count("FAIL_VALUE: rms_norm: ") == 1 and "  porthal replay 'rms_norm," in out
        assert out.endswith("wrong (hardware) in bfloat16 does not compute what it should: calls\n")
        code, out, _ = command_line("check", "--backend", "empty")
        assert code == 2 and out.endswith("has no own kernel among these calls: nothing of the chip was tested\n")


DYING = """
    import os

    from porthal.backends.reference.backend import Reference

    class Chip(Reference):
        def embedding(self, ids, table):
            {}
"""


@pytest.mark.parametrize(
    ("does", "said"), [("os._exit(3)", "exited with code 3"), ("raise OSError('no device')", "no device (backend.py:8)")]
)
def test_what_stops_the_demo_checkpoint_is_said(tmp_path: Path, does, said):
    install(tmp_path, "dying", backend=DYING.format(does))
    with installed(tmp_path):
        [probe] = check._curve("dying", False, check.Demo())
    assert (probe.name, probe.holds) == ("the demo checkpoint", False) and said in probe.words


def test_what_is_waived_or_not_claimed_is_no_pass():
    report = conformance.run("reference", ["add"], dtypes=["bfloat16"], isolate=False)
    facts = Facts.of(Reference())
    made = check.Check("reference", facts, "glm-5", report.results, (), 1.0)
    assert made.exit_code == 0
    for verdict in ("WAIVED", "UNCLAIMED", "FAIL_VALUE"):
        other = replace(report.results[0], verdict=verdict, message="of this kind")
        made = check.Check("reference", facts, "glm-5", (other, *report.results[1:]), (), 1.0)
        assert made.exit_code == 1 and f"  {verdict}: add: of this kind" in made.lines()


def test_data_that_a_kernel_does_not_take_are_told_and_fail_nothing():
    """In a model another kernel gets them. Where no other call is left, nothing of the chip was tested."""
    finite = limits(needs={"logits": Need("no NaN", lambda x: not np.isnan(x).any())})
    picky = chip(moe_route=finite(lambda self, *args, **attrs: truth("moe_route")(*args, **attrs)))
    tokens = [f"moe_route,T=3,E=16,k=8,scale=2.5,{values}0" for values in ("", "logits~special,")]
    passed, left = (conformance.replay(token, picky) for token in tokens)
    assert (passed.verdict, left.verdict) == ("PASS", "UNCLAIMED")
    made = check.Check("made", Facts.of(picky), "glm-5", (passed, left), (), 1.0)
    assert made.exit_code == 0 and f"  UNCLAIMED: moe_route: {left.message}" in made.lines()
    assert check.Check("made", Facts.of(picky), "glm-5", (left,), (), 1.0).exit_code == 2
