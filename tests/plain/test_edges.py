"""Calls at the ends of what kernels state."""

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.edges import edges
from porthal.conformance.runner.runs import run
from porthal.hal import (
    any_of,
    at_least,
    at_most,
    between,
    contracts,
    create,
    limits,
    multiple_of,
    one_of,
    per_dtype,
)


def chip(op, *, wrong=lambda *operands, **attrs: False, **stated):
    """A backend whose kernel for an op states this, and gives zeros where it is wrong."""
    right = create("reference").derive(contracts()[op])

    @limits(**stated)
    def kernel(self, *operands, **attrs):
        y = right(*operands, **attrs)
        return np.zeros_like(y) if wrong(*operands, **attrs) else y

    return type("Chip", (Reference,), {"name": "chip", op: kernel})()


def sizes(found, name):
    return [{**dict(c.dims), **c.attributes, "block_size": c.block_size}[name] for c in found]


@pytest.mark.parametrize(
    ("limit", "ends"),
    [
        (at_most(96), [96]),
        (at_least(24), [24]),
        (between(5, 77), [5, 77]),
        (multiple_of(32), [32]),
        (multiple_of(48, at_most=250), [48, 240]),
        (one_of(256, 160, 384), [160, 256, 384]),
        (any_of(one_of(17), multiple_of(32, at_most=128)), [17, 32, 128]),
        (per_dtype("x", float32=at_most(1000), bfloat16=at_most(2000)), [1000, 2000]),
        (one_of(96), [96]),
    ],
)
def test_there_is_a_call_at_each_end(limit, ends):
    found = edges(chip("rms_norm", H=limit))
    assert sizes(found, "H") == ends
    assert [Case.from_token(c.token) for c in found] == found


def test_an_end_is_of_the_dtypes_for_which_it_is_stated():
    found = edges(chip("rms_norm", H=per_dtype("x", float32=at_most(1000), bfloat16=at_most(2000))))
    assert [c.dtype("x") for c in found] == ["float32", "bfloat16"]


def test_other_facts_are_what_the_kernel_takes():
    stated = {"dtypes": {"iq": "bfloat16"}, "G": at_most(64), "k": one_of(512), "block_size": multiple_of(16, at_most=1024)}
    found = edges(chip("indexer_topk", **stated))
    assert sorted(zip(sizes(found, "G"), sizes(found, "block_size"))) == [(8, 16), (8, 1024), (64, 16)]
    assert {c.dtype("iq") for c in found} == {"bfloat16"} and set(sizes(found, "k")) == {512}


def test_schemes_are_those_that_the_kernel_takes():
    (found,) = edges(chip("linear", schemes="int8_channel", N=at_most(500)))
    assert found.schemes == (("w", "int8_channel"),) and dict(found.dims)["N"] == 500


def test_what_no_memory_holds_is_left_out():
    assert edges(chip("rms_norm", H=at_most(2**31))) == []


def test_a_kernel_without_limits_has_none():
    assert edges(create("reference")) == []


def test_a_kernel_that_is_wrong_at_its_end_is_found():
    """A row of 4099 is nothing that a plan of all backends has."""
    made = chip("rms_norm", wrong=lambda x, weight, eps=0: x.shape[1] == 4099, H=at_most(4099))
    report = run(made, ["rms_norm"])
    assert [(r.verdict, dict(Case.from_token(r.token).dims)["H"]) for r in report.results if r.failed] == [("FAIL_VALUE", 4099)]


def test_edges_are_of_the_ops_and_dtypes_that_are_asked_for():
    made = chip("rms_norm", H=at_most(4099))

    def met(ops, dtypes=None):
        return any("H=4099" in r.token for r in run(made, ops, dtypes=dtypes).results)

    assert met(["rms_norm"]) and met(["rms_norm"], ["float32"])
    assert not met(["rms_norm"], ["bfloat16"]) and not met(["layer_norm"])


@pytest.mark.parametrize("limit", [at_least(-5), between(-3, 100), one_of(-1, 96), at_most(2**70)])
def test_an_end_that_no_call_has_is_left_out(limit):
    found = edges(chip("rms_norm", H=limit))
    assert all(0 <= h <= 100 for h in sizes(found, "H"))


def test_of_many_numbers_the_first_and_the_last_are_called():
    assert sizes(edges(chip("rms_norm", H=one_of(*range(64, 4097, 64)))), "H") == [64, 128, 192, 256, 3904, 3968, 4032, 4096]


def test_numbers_of_numpy_are_numbers():
    assert sizes(edges(chip("rms_norm", H=at_most(np.int64(77)))), "H") == [77]


def test_what_the_batch_alone_decides_is_no_end_of_a_call_that_lacks_it():
    assert edges(chip("topk", R=at_least(5000))) == []


def test_other_sizes_are_least_where_usual_ones_are_too_many():
    [found] = edges(chip("linear", T=at_most(100000)))
    assert dict(found.dims)["T"] == 100000


def test_a_call_that_takes_too_long_is_left_out():
    assert edges(chip("moe_experts", k=at_most(100000))) == []
