"""A decode step that is recorded once and replayed: the bits of the step that is called, in any batch, page and text."""

import numpy as np
import pytest

from porthal.conformance.cases.plan import captured
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.runner.check import check
from porthal.hal import Batch, UsageError, bind, contracts, create
from porthal.model.generate import generate
from porthal.model.load import load
from porthal.model.tokens import ids_array

pytest.importorskip("porthal.backends.cpu._native", reason="the native module is not built; run `pip install .`")

OWN = [contract for op, contract in contracts().items() if hasattr(type(create("cpu")), op)]
CAPTURED = [case for contract in OWN for case in captured(contract)]
PROMPTS = [list(b"    def get(self, name):\n        if "), list(b"import os\n"), list(b"class Parser:\n    " * 4)]


@pytest.fixture(scope="module")
def models():
    """The demo model on calls that are recorded, and on calls with something around them, which are not."""
    recorded, called = (load(binding=bind("cpu", wrap=wrap)) for wrap in ([], [lambda op, function: function]))
    assert recorded.ops.captures and not called.ops.captures
    return recorded, called


@pytest.mark.parametrize("drawn", [{}, {"temperature": 0.8, "top_k": 20, "seed": 3}])
def test_texts_are_those_of_steps_that_are_called(models, drawn):
    new = 70  # past the end of a page in each text
    mine, its = (generate(model, PROMPTS, new, **drawn) for model in models)
    assert mine == its and len(mine.tokens[0]) == new


def test_replays_have_the_bits_of_calls(models):
    model, _ = models
    ops, logits = model.ops, []
    for replayed in (False, True):
        cache = model.new_cache([64])
        request = cache.new_request()
        batch = ops.plan(cache.step([request], [len(PROMPTS[0])]))
        model.hidden(ops.from_numpy(ids_array(PROMPTS[0])), batch, cache)
        ids, held = ops.from_numpy(ids_array([0])), ops.plan(cache.view([request], [1], [64]))
        replay = ops.capture(lambda ids=ids, held=held, cache=cache: model.logits(model.hidden(ids, held, cache)))
        for token in (40, 41, 10):
            step = cache.step([request], [1])
            if replayed:
                ops.plan(step, into=held)
                ops.from_numpy(ids_array([token]), into=ids)
                logits.append(ops.to_numpy(replay()).copy())
            else:
                hidden = model.hidden(ops.from_numpy(ids_array([token])), ops.plan(step), cache)
                logits.append(ops.to_numpy(model.logits(hidden)))
    called, replays = logits[:3], logits[3:]
    assert all(np.array_equal(a, b) for a, b in zip(called, replays)) and not np.array_equal(called[0], called[1])


@pytest.fixture(scope="module")
def bindings():
    return Bindings(create("cpu"))


@pytest.mark.parametrize("case", CAPTURED, ids=[case.token for case in CAPTURED])
def test_every_op_can_be_recorded(case, bindings):
    """But what the reference's kernels compute, which are those of schemes that the backend has no kernel for."""
    under = {*dict(case.schemes).values(), dict(case.attrs).get("scheme")}
    foreign = under & ({"mxfp4", "int8_half_keys"} if case.op in ("quantize", "dequantize") else {"int8_half_keys"})
    assert check(case, bindings).verdict == ("LEFT_OUT" if foreign else "PASS")


def test_another_batch_is_written_over_a_planned_one_and_over_nothing_else():
    cpu = create("cpu")
    given = Batch.build([1, 2], [9, 12], [[0, 1, 2], [3, 4, 5]], 4)
    planned = cpu.plan(given)
    other = Batch.build([2, 1], [5, 10], [[6, 7, -1], [2, 1, 0]], 4)
    assert cpu.plan(other, into=planned) is planned and given.kv_len.tolist() == [9, 12]
    for name in ("q_len", "row_request", "positions", "visible", "slots", "last_rows", "n_decode"):
        assert np.array_equal(getattr(planned, name), getattr(other, name)), name
    assert planned.max_kv == 12  # the room that there is


def test_what_a_recorded_call_refuses_it_refuses_when_it_is_replayed():
    cpu = create("cpu")
    replay = cpu.capture(lambda: cpu.add(np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)))
    with pytest.raises(ValueError, match=r"^b has shape \[2, 4\], expected \[2, 3\]"):
        replay()


def test_after_a_recording_that_failed_calls_compute_again():
    cpu, x = create("cpu"), np.ones((2, 3), np.float32)

    def fails():
        cpu.add(x, x)
        raise UsageError("stop")

    with pytest.raises(UsageError, match=r"^stop$"):
        cpu.capture(fails)
    assert (cpu.add(x, x) == 2).all()


def test_results_of_a_recording_stay_in_their_memory():
    cpu, x = create("cpu"), np.zeros((2, 3), np.float32)
    replay = cpu.capture(lambda: cpu.add(cpu.add(x, x), x))
    x[...] = 1
    first = replay()
    assert (first == 3).all()
    x[...] = 2
    assert replay() is first and (first == 6).all()
