"""`porthal plan`: what is predicted follows from the model's own calls and the stated figures."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from porthal.bench import plan, planned
from porthal.bench.plan import Asked, Device, Plan, plans
from porthal.cli.app import app
from porthal.conformance.cases.profiles import home_of
from porthal.hal import Communicator, CommunicatorSpec, UsageError, contracts
from porthal.model.config import Config
from porthal.model.layout import Layout
from porthal.model.load import stepped

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
    with pytest.raises(UsageError, match=r"the leanest layout needs .* GB per device, and 2 with 400 GB are given: "):
        plans(GLM5, replace(SIMPLE, memory=4e11), Asked(2, 1024, 1))


def test_an_exchange_is_as_slow_as_its_slower_link():
    assert SIMPLE.exchange(1e9, 1) == 0
    assert SIMPLE.exchange(1e9, 4) == pytest.approx(1e-5 + 0.75 * 1e9 / 1e11)
    assert SIMPLE.exchange(1e9, 32) == pytest.approx(1e-5 + 24 / 32 * 1e9 / 1e10)  # 24 of 32 are in other nodes
    assert SIMPLE.sum(1e9, 8) == pytest.approx(1e-5 + 7 / 8 * 1e9 / 1e11)


    assert replace(SIMPLE, sums=1e-6).sum(1e9, 8) == pytest.approx(1e-6 + 7 / 8 * 1e9 / 1e11)
    assert SIMPLE.sum(1e9, 16) == pytest.approx(1e-5 + 15 / 16 * 1e9 / 1e10)  # through the network all


def of(tp: int, ep: int, asked: Asked, device: Device = SIMPLE) -> Plan:
    return next(plan for plan in plans(GLM5, device, asked) if (plan.tp, plan.ep) == (tp, ep))


def test_each_call_of_all_layers_takes_what_a_call_takes():
    layout = Layout(Communicator(CommunicatorSpec(0, 1), None), "tp+ep")
    made = [op for op, _ in stepped(GLM5, [(1, 100)], "bfloat16", layout=layout) if op in contracts()]
    assert len(made) > 10 * 78 and made.count("moe_experts") == 75
    assert of(1, 1, Asked(1, 100, 1)).parts["calls"] == pytest.approx(1e-6 * len(made))


def test_heads_that_are_shared_are_summed_and_rows_gathered():
    """A sum behind each of 78 attentions and 3 dense layers, which moves rows twice, and 75 times all rows are gathered."""
    row = 6144 * 2
    found = of(2, 2, Asked(2, 100, 6)).parts["all-reduce"]
    assert found == pytest.approx((78 + 3 + 75) * 1e-5 + (2 * (78 + 3) + 75) * 6 * row / 2 / 1e11)


@pytest.mark.parametrize(("scheme", "out"), [("", 2), ("int8_channel", 1)])
def test_rows_go_to_their_experts_and_back(scheme, out):
    """75 times, eight choices of each of 2 requests per device; on the way back as they are."""
    moved = 2 * 8 * 6144 * 7 / 8
    found = of(1, 8, Asked(8, 100, 16, scheme=scheme)).parts["all-to-all"]
    assert found == pytest.approx(75 * (2 * 1e-5 + moved * (out + 2) / 1e11))


def test_a_cache_holds_latents_and_keys_of_every_request():
    few, many = (of(1, 1, Asked(1, 1000, batch)).memory for batch in (1, 5))
    assert many - few == 4 * 1000 * 78 * (512 + 64 + 128) * 2


def test_requests_that_do_not_divide_are_as_many_on_the_fullest_device():
    three, four = (of(1, 2, Asked(2, 1000, batch)) for batch in (3, 4))
    assert three.parts == four.parts and three.memory == four.memory
    assert of(1, 2, Asked(2, 1000, 2)).parts != four.parts


def test_the_router_the_embedding_and_the_head_are_not_quantised():
    plain, coded = (of(1, 1, Asked(1, 1, 1, scheme=scheme)).memory for scheme in ("", "int8_channel"))
    kept = 2 * 154880 * 6144 + 75 * 256 * 6144
    assert coded == pytest.approx(plain / 2 + kept, rel=1e-6)


def test_this_machine_has_the_rates_that_are_measured(monkeypatch):
    rates = {"dram": 20e9, "copy": 10e9, "bf16": 1e12, "l2": 1e11}

    class Measuring:
        side = SimpleNamespace(holds=rates)

        def ask(self, what: str, peak: str) -> float:
            assert what == "peak"
            return rates[peak]

        def close(self) -> None:
            pass

    monkeypatch.setattr(plan, "Backstage", lambda backend, threads: Measuring())
    monkeypatch.setattr(plan.os, "sched_getaffinity", lambda _: {0, 1})
    for ranks, turns in ((1, 1), (2, 1), (8, 4)):  # which share two processors
        here = Device.named("here", ranks)
        assert (here.bandwidth, here.link, here.rates) == (20e9 / turns, 5e9 / turns, {"bf16": 1e12 / turns})
        assert (here.latency, here.sums, here.call) == (turns * plan.LATENCY, turns * plan.SUM, turns * plan.CALL)


def test_a_scheme_makes_weights_and_what_is_sent_smaller():
    plain, coded = (plans(GLM5, SIMPLE, Asked(8, 1024, 8, scheme=scheme))[0] for scheme in ("", "int8_channel"))
    assert coded.memory == pytest.approx(plain.memory / 2, rel=0.03)
    assert coded.parts["all-to-all"] < plain.parts["all-to-all"]


@pytest.mark.parametrize(("scheme", "bits"), [("int4_g128", 4.25), ("int4_g32", 5.0), ("mxfp4", 4.25), ("nvfp4", 4.5)])
def test_weights_of_few_bits_are_as_large_as_codes_and_scales(scheme, bits):
    """All but the embedding, the head and the routers."""
    assert Asked(1, 1, 1, scheme=scheme).width == bits / 8
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


def test_what_is_measured_beside_a_plan_takes_no_words(monkeypatch):
    monkeypatch.setattr(planned, "beside", lambda: pytest.fail("it measures first"))
    monkeypatch.setattr(sys, "argv", ["planned", "--help"])
    with pytest.raises(SystemExit, match="takes no arguments, and was given --help"):
        planned.main()
