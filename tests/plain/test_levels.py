"""Levels and profiles: what is required belongs to the contract, and only a chip's own kernels reach anything."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.cli import app as cli
from porthal.conformance import run
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.compositions import requests
from porthal.conformance.cases.plan import cases
from porthal.conformance.execution.traits import left_out
from porthal.conformance.level import LEVELS
from porthal.conformance.report.reached import Reached, called, is_required, members, overall, reached, required
from porthal.hal import Traits, UsageError, contracts, create, limits, multiple_of, one_of
from porthal.model.config import Config
from porthal.model.load import DEMO, profile, trace


def truth(op):
    """The reference's kernel as a method."""
    return lambda self, *args, **attrs: create("reference").derive(contracts()[op])(*args, **attrs)


def made(**members):
    return type("Made", (Reference,), {"name": "made", **members})()


# -- the domain ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "within"),
    [
        ("rms_norm,T=17,H=6144,x:bf16,0", True),
        ("rms_norm,T=0,H=6144,x:bf16,view=rows,0", True),
        ("rms_norm,T=17,H=6144,x:fp16,0", False),
        ("rms_norm,T=17,H=6144,x:bf16,weight:fp32,0", False),
        ("rms_norm,T=17,H=96,x:bf16,0", False),
        ("linear,T=1,K=6144,N=576,x:bf16,0", True),
        ("linear,T=1,K=6144,N=576,out=float32,x:bf16,0", False),
        ("indexer_scores,T=1,G=32,D=128,scale=0.015625000000000003,iq:bf16,batch=decode,block_size=64,0", True),
        ("sparse_mla,T=2,N=64,C=512,R=64,k=2048,scale=0.0625,q_latent:bf16,batch=deep,block_size=64,0", True),
        ("sparse_mla,T=2,N=64,C=512,R=64,k=128,scale=0.0625,q_latent:bf16,batch=deep,block_size=64,0", False),
        ("take_rows,T=7,H=6144,M=17,x:bf16,0", False),
        ("take_rows,T=7,H=6144,M=4,x:bf16,0", True),
    ],
)
def test_the_domain_is_glm5s_dims_in_bfloat16_at_any_number_of_rows(token, within):
    assert is_required(Case.from_token(token)) is within


@pytest.mark.parametrize("op", contracts())
def test_every_op_has_required_cases_at_every_level(op):
    for level in ("bring-up", "standard"):
        wanted = required(contracts()[op], level)
        assert wanted and {c.token for c in wanted} < {c.token for c in cases(contracts()[op], level)}
        assert not any(c.fault for c in wanted)


# -- the levels themselves -------------------------------------------------------------------------------------------


def reaches(lower, upper):
    """Whether a step is as large as another, to a power of two: in requests, rows, and the longest query and context."""
    sizes = [(len(r), sum(x.q for x in r), max(x.q for x in r), max(x.kv for x in r)) for r in map(requests, (lower, upper))]
    return all(low.bit_length() <= high.bit_length() for low, high in zip(*sizes))


def test_a_step_is_as_large_as_another_in_all_that_counts():
    assert reaches("200*1/300", "129*1/300") and reaches("200*1/300", "150*1/300+2*1/9000")
    assert not any(reaches("200*1/300", smaller) for smaller in ("100*2/300", "256/300", "200*1/200", "3*1/300"))


@pytest.mark.parametrize(("lower", "upper"), list(pairwise(LEVELS.values())))
def test_each_level_is_at_least_as_strict_as_the_one_below(lower, upper):
    for field in fields(lower):
        below, above = getattr(lower, field.name), getattr(upper, field.name)
        if field.name == "regimes":
            assert all(any(reaches(b, a) for a in above) for b in below)
        elif isinstance(below, tuple):
            assert set(below) <= set(above), field.name
        elif field.name in ("pointwise", "whole", "row"):  # what is permitted
            assert below > above, field.name
        elif field.name == "turns":  # what is left out
            assert below >= above
        elif field.name != "name":
            assert below <= above, field.name


def test_what_levels_promise():
    promised = {n: (v.runs, v.pointwise, v.whole, v.row) for n, v in LEVELS.items()}
    assert promised == {"bring-up": (2, 4, 4, 8), "standard": (3, 2, 2, 4), "strict": (50, 1, 1.25, 2)}
    assert LEVELS["strict"].production_batches == ("decode", "mixed", "chunked", "padded", "idle")


# -- what is reached -------------------------------------------------------------------------------------------------


def level_of(machine, op):
    return run(machine, [op]).levels[op]


def test_own_kernels_reach_the_level():
    n = len(required(contracts()["rms_norm"], "bring-up"))
    assert level_of(made(rms_norm=truth("rms_norm")), "rms_norm") == Reached("bring-up", "", n, n, n)


def test_inherited_kernels_never_count():
    n = len(required(contracts()["rms_norm"], "bring-up"))
    found = level_of(made(), "rms_norm")
    assert found == Reached("none", "inherited", 0, 0, n) and str(found) == "none (inherited)" and found.fraction == f"0/{n}"


def test_what_glm5_does_not_need_may_be_left_to_others():
    """Limits that GLM-5's call fulfils cost nothing, however many other cases they leave out."""
    narrow = limits(dtypes={"x": one_of("bfloat16")}, H=multiple_of(512))(truth("rms_norm"))
    report = run(made(rms_norm=narrow), ["rms_norm"])
    assert sum(r.own for r in report.results) < len(report.results) / 2
    assert report.levels["rms_norm"].level == "bring-up"


def test_what_the_backends_arrays_leave_out_is_not_required(monkeypatch):
    monkeypatch.setattr("porthal.conformance.execution.bindings.verify", lambda backend: None)  # NumPy's views do alias
    dense = made(index_prolog=truth("index_prolog"), traits=Traits(views_alias=False))
    wanted = required(contracts()["index_prolog"], "bring-up")
    n = sum(not left_out(case, dense) for case in wanted)
    assert n < len(wanted)
    found = level_of(dense, "index_prolog")
    assert found == Reached("bring-up", "", n, n, n)


def test_a_composition_is_not_asked_for_the_parts_of_an_own_kernel():
    own = {op: truth(op) for op in ("moe_experts", "linear", "silu_mul", "add")}
    machine = made(**own, **dict.fromkeys(("moe_permute", "grouped_gemm", "moe_unpermute")))  # it has none of these
    n = len(required(contracts()["moe_layer"], "bring-up"))
    assert level_of(machine, "moe_layer") == Reached("bring-up", "", n, n, n)


def test_a_narrow_claim_shows_as_a_fraction():
    wide = limits(H=6144)(truth("rms_norm"))
    found = level_of(made(rms_norm=wide), "rms_norm")
    assert (found.level, found.why) == ("none", "narrow") and 0 < found.claimed < found.required
    assert found.claimed == found.passed and found.fraction == f"{found.passed}/{found.required}"
    outside = limits(H=96)(truth("rms_norm"))
    assert level_of(made(rms_norm=outside), "rms_norm").why == "inherited"


def test_one_failure_in_the_domain_is_one_too_many():
    def wrong(self, x, weight, *, eps=1e-5):
        y = truth("rms_norm")(self, x, weight, eps=eps)
        return -y if x.shape[-1] == 6144 else y

    report = run(made(rms_norm=wrong), ["rms_norm"])
    found = report.levels["rms_norm"]
    assert (found.level, found.why, found.claimed) == ("none", "failed", found.required) and found.passed < found.claimed
    assert found.fraction == f"{found.passed}/{found.required}"
    waived = [replace(r, verdict="WAIVED", waived=r.verdict) if r.failed else r for r in report.results]
    assert str(reached("rms_norm", "bring-up", waived)) == "none (waived)"


def test_a_failure_outside_the_domain_is_one_too_many_waived_or_not():
    """A level beside failures would be read as proof."""

    def wrong(self, x, weight, *, eps=1e-5):
        y = truth("rms_norm")(self, x, weight, eps=eps)
        return -y if x.dtype == np.float32 else y

    report = run(made(rms_norm=wrong), ["rms_norm"])
    found = report.levels["rms_norm"]
    assert report.failures and not any(is_required(Case.from_token(r.token)) for r in report.failures)
    assert (str(found), found.passed) == ("none (failed)", found.required)
    assert report.overall.startswith("none: 0 of ")
    waived = [replace(r, verdict="WAIVED", waived=r.verdict) if r.failed else r for r in report.results]
    assert str(reached("rms_norm", "bring-up", waived)) == "none (waived)"
    left = [replace(r, verdict="WAIVED", waived="UNCLAIMED", status="missing") if r.failed else r for r in report.results]
    assert str(reached("rms_norm", "bring-up", left)) == "bring-up"


def test_a_run_of_some_dtypes_reaches_nothing():
    report = run(made(rms_norm=truth("rms_norm")), ["rms_norm"], dtypes=["float32"])
    assert str(report.levels["rms_norm"]) == "none (not all run)"
    assert str(reached("add", "bring-up", report.results)) == "none (not run)"


def test_a_composition_counts_when_all_its_parts_are_own():
    parts = ("linear", "head_linear")
    n = len(required(contracts()["mla_output"], "bring-up"))
    complete = made(**{op: truth(op) for op in parts})
    report = run(complete, ["mla_output"])
    plain = [r for r in report.results if "%" not in r.token]  # under schemes the parts are inherited
    assert {(r.status, r.foreign) for r in plain} == {("composed", ()), ("refusal", ())}
    assert report.levels["mla_output"] == Reached("bring-up", "", n, n, n)
    report = run(made(linear=truth("linear")), ["mla_output"])
    assert {r.foreign for r in report.results if r.status == "composed" and "%" not in r.token} == {("head_linear",)}
    assert str(report.levels["mla_output"]) == "none (composed of inherited)"


# -- profiles --------------------------------------------------------------------------------------------------------


def test_inference_is_what_the_model_calls():
    config = Config.read(DEMO)
    step = {op for op, _ in trace(config)}
    inside = {op for op, _ in trace(config, expand=True)}
    composed = {op for op in contracts() if contracts()[op].decomposition}
    generated = set(profile(config)) - inside - composed  # by generation alone, such as sampling
    assert set(called("inference")) == step | generated
    assert set(called("moe")) < set(called("inference"))


def test_a_profile_holds_what_its_ops_are_composed_of():
    assert {"moe_route", "moe_layer", "moe_experts", "grouped_gemm", "moe_permute", "silu_mul"} <= set(members("moe"))
    assert set(members("inference")) == set(profile(Config.read(DEMO)))
    with pytest.raises(UsageError, match="unknown profile 'vision': expected one of inference, moe"):
        members("vision")


def test_the_overall_level_is_the_worst_over_what_a_profile_calls():
    good, bad = Reached("bring-up", "", 2, 2, 2), Reached("none", "inherited", 0, 0, 2)
    assert overall({"moe_route": good, "moe_layer": good, "grouped_gemm": bad}, "bring-up", "moe") == "bring-up"
    assert overall({"moe_route": good, "moe_layer": bad}, "bring-up", "moe") == "none: 1 of 2 ops have reached bring-up"
    assert overall({"moe_route": good}, "strict", "moe") == "none: 1 of 2 ops have reached strict"


def command(capsys, *args):
    with pytest.raises(SystemExit) as left:
        cli.app(["conform", *args], prog_name="porthal")
    return left.value.code or 0, *capsys.readouterr()


def test_an_unknown_profile_is_refused(capsys):
    code, out, err = command(capsys, "--profile", "vision")
    assert (code, out) == (2, "")
    assert err == "porthal: unknown profile 'vision': expected one of inference, moe, distributed\n"


def test_a_profile_and_an_op_are_one_too_many(capsys):
    code, _, err = command(capsys, "--profile", "moe", "--op", "add")
    assert code == 2 and err == "porthal: --profile moe with --op add: give only one of the two\n"
