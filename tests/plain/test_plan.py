"""`porthal plan`: what is predicted follows from the model's own calls and the stated figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from porthal.bench.plan import Asked, Device, plans
from porthal.cli.app import app
from porthal.conformance.cases.profiles import home_of
from porthal.hal import UsageError
from porthal.model.config import Config

GLM5 = Config.read(home_of())
SIMPLE = Device("simple", "", 2e12, 1e12, {"bf16": 1e15, "int8": 2e15}, 8, 1e11, 1e10, 1e-5, 1e-6, ())


def test_one_device_holds_all_parameters_and_reads_those_of_a_token():
    """Of GLM-5 743.91 G without its MTP layer, of which norms, biases and index keys are left out here; 39.88 G are active, and
    the embedding is not read."""
    [plan] = plans(GLM5, SIMPLE, Asked(1, 1, 1))
    assert plan.memory == pytest.approx(2 * 743.91e9, rel=1e-3)
    active = 2 * 39.88e9
    assert plan.parts["memory"] == pytest.approx(active / 1e12, rel=0.05)
    assert plan.limit == "memory" and plan.rate == pytest.approx(1 / plan.seconds)
    assert not plan.parts["all-reduce"] and not plan.parts["all-to-all"]


def test_a_published_config_is_known_by_its_name():
    asked = ["plan", "--device", "h200", "--devices", "8", "--scheme", "fp8_block", "--model", "glm-5.2"]
    made = CliRunner().invoke(app, asked)
    assert made.exit_code == 0 and made.stdout.count("tp ") == 3


def test_layouts_are_all_that_fit_the_fastest_first():
    found = plans(GLM5, SIMPLE, Asked(6, 1024, 12))
    expected = {(t, e, 6 // t) for t in (1, 2) for e in (1, 2, 3, 6)}  # 3 does not divide heads
    assert {(p.tp, p.ep, p.dp) for p in found} == expected
    assert [p.seconds for p in found] == sorted(p.seconds for p in found)
    with pytest.raises(UsageError, match=r"the leanest layout needs .* GB on each of 2 devices, of which each has 400 GB"):
        plans(GLM5, replace(SIMPLE, memory=4e11), Asked(2, 1024, 1))


def test_an_exchange_is_as_slow_as_its_slower_link():
    assert SIMPLE.exchange(1e9, 1) == 0
    assert SIMPLE.exchange(1e9, 4) == pytest.approx(1e-5 + 0.75 * 1e9 / 1e11)
    assert SIMPLE.exchange(1e9, 32) == pytest.approx(1e-5 + 24 / 32 * 1e9 / 1e10)  # 24 of 32 are in other nodes
    assert SIMPLE.sum(1e9, 8) == pytest.approx(1e-5 + 7 / 8 * 1e9 / 1e11)


def test_a_scheme_makes_weights_and_what_is_sent_smaller():
    plain, coded = (plans(GLM5, SIMPLE, Asked(8, 1024, 8, scheme=scheme))[0] for scheme in ("", "int8_channel"))
    assert coded.memory == pytest.approx(plain.memory / 2, rel=0.03)
    assert coded.parts["all-to-all"] < plain.parts["all-to-all"]


@pytest.mark.parametrize(("scheme", "bits"), [("int4_g128", 4.25), ("int4_g32", 5), ("mxfp4", 4.25), ("nvfp4", 4.5)])
def test_weights_of_few_bits_are_as_large_as_codes_and_scales(scheme, bits):
    """All but the embedding, the head and the routers."""
    [plain], [coded] = (plans(GLM5, SIMPLE, Asked(1, 1, 1, scheme=each)) for each in ("", scheme))
    assert coded.memory / plain.memory == pytest.approx(bits / 16, rel=0.02)


def test_devices_of_the_table_have_sources():
    for name in ("h800", "h200", "ascend-910c", "s5000"):
        device = Device.named(name, 1)
        assert device.sources and device.memory > 1e10 and device.rates["bf16"] > 1e14


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (Asked(0, 1, 1), "--devices is 0: expected 1 to 65536"),
        (Asked(1, 10**7, 1), "--context is 10000000: expected 1 to 202752"),
        (Asked(1, 1, 0), "--batch is 0: expected 1 to 1048576"),
        (Asked(1, 1, 1, scheme="int9"), "--scheme is 'int9': expected one of int8_channel, fp8_block"),
        (Asked(1, 1, 1, scheme="fp8_block"), "fp8_block needs a rate of fp8, and of simple are known bf16, int8"),
    ],
)
def test_what_cannot_be_planned_is_said(asked, why):
    with pytest.raises(UsageError, match=why):
        plans(GLM5, SIMPLE, asked)
    made = CliRunner().invoke(app, ["plan", "--device", "here", "--devices", "0"])  # nothing is measured before
    assert made.exit_code == 2 and "--devices is 0: expected 1 to 65536" in made.stderr
    with pytest.raises(UsageError, match="device is 'abacus': expected here or one of h800"):
        Device.named("abacus", 1)
