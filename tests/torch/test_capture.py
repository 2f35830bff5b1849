"""Graph capture, emulated on the CPU: what is captured stays as it was, what changes comes by `into`, and cases find both."""

from functools import cache

import numpy as np
import pytest
import torch

from porthal.backends.torch.backend import Torch
from porthal.backends.torch.capture import Capturing
from porthal.conformance.cases.capture import calls
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.legal import elements
from porthal.conformance.cases.plan import captured, cases
from porthal.conformance.diff.captured import Replays, replays
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.runner.check import check
from porthal.conformance.runner.runs import replay, run
from porthal.conformance.selftest.capture import DEFECTS
from porthal.conformance.selftest.run import attempt, plan
from porthal.conformance.selftest.variants import variants
from porthal.hal import Batch, NotClaimed, UsageError, WeightSpec, bind, contracts, create
from tests.oracles.tiny import PROMPT

CAPTURED = [case for contract in contracts().values() for case in captured(contract)]


@cache
def right():
    return Bindings(create("torch:capture"))


@pytest.fixture
def ops():
    return bind(backend=create("torch:capture"), overrides={}, fallback="error", check=False)


# -- the service -----------------------------------------------------------------------------------------------------


def floats(*values):
    return np.array(values, np.float32)


def test_a_replay_repeats_the_calls_on_new_values_in_the_same_memory(ops):
    a, b = ops.from_numpy(floats([1, 2])), ops.from_numpy(floats([3, 4]))
    replay = ops.capture(lambda: ops.add(ops.add(a, b), b))
    first = replay()
    assert first.tolist() == [[7, 10]]
    assert ops.from_numpy(floats([5, 6]), into=a) is a
    second = replay()
    assert second is first and first.tolist() == [[11, 14]]
    a = ops.from_numpy(floats([0, 0]))  # another array under the same name is none of the graph's
    assert replay().tolist() == [[11, 14]]


def test_python_numbers_are_those_of_the_capture(ops):
    x, scale = ops.from_numpy(floats([1, 2])), [2.0]
    replay = ops.capture(lambda: x * scale[0])
    scale[0] = 100.0
    assert replay().tolist() == [[2, 4]]


def test_mutated_operands_change_in_each_replay(ops):
    x = torch.zeros(2)
    replay = ops.capture(lambda: x.add_(1))
    x.zero_()
    assert [replay().tolist() for _ in range(3)] == [[1, 1], [2, 2], [3, 3]]


READS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "numpy": lambda x: x.numpy(),
    "__array__": np.asarray,
    "__bool__": lambda x: bool(x[0, 0] > 0),
    "__int__": lambda x: int(x[0, 0]),
    "aten.nonzero": lambda x: x.nonzero(),
    "aten.index": lambda x: x[x > 1],
    "aten.index_put_": lambda x: x.__setitem__(x > 1, x[:1, 0]),
    "aten.masked_select": lambda x: x.masked_select(x > 1),
    "aten.unique_dim": lambda x: x.unique(dim=0),
    "tensor": lambda x: torch.tensor([1.0]),
}


@pytest.mark.parametrize("name", READS)
def test_what_waits_for_the_host_is_refused_in_one_sentence(ops, name):
    x = ops.from_numpy(floats([1, 2]))
    with pytest.raises(UsageError, match=rf"^{name} copies between host and device, or waits .* capturable = False$"):
        ops.capture(lambda: READS[name](x))
    assert ops.to_numpy(x).tolist() == [[1, 2]]  # no longer captured


def test_services_that_copy_are_refused_in_one_sentence(ops):
    x, batch = ops.from_numpy(floats([1, 2])), Batch.build([1], [1], [[0]], 64)
    spec = WeightSpec("linear", "w", (1, 2), "float32")
    for what, call in {
        "to_numpy": lambda: ops.to_numpy(x),
        "from_numpy": lambda: ops.plan(batch),
    }.items():
        with pytest.raises(UsageError, match=f"^torch:capture captures a graph, in which {what} cannot be repeated: copy .*"):
            ops.capture(call)
    weight = ops.prepare(spec, floats([1, 2]).__getitem__)
    with pytest.raises(UsageError, match="in which to_numpy"):
        ops.capture(lambda: ops.to_logical(weight))
    ops.plan(batch)


def test_the_other_devices_of_pytorch_capture_nothing_yet():
    assert not create("torch").captures and create("torch:capture").captures
    with pytest.raises(NotClaimed, match=r"^torch:cpu captures no graphs: "):
        bind(backend=create("torch")).capture(lambda: None)


def test_what_a_kernel_declares_is_known(ops):
    assert not ops.capturable("grouped_gemm") and ops.capturable("moe_experts")
    assert not bind(backend=create("torch")).capturable("moe_experts")
    assert ops.capturable("moe_layer")  # a composite is what it is made of


# -- its kernels, called without a graph -----------------------------------------------------------------------------


@pytest.mark.parametrize("op", [op for op in vars(Capturing) if op in contracts()])
def test_kernels_that_take_lengths_from_the_device_are_right_as_well(op):
    assert op in vars(Torch)
    small = sorted((c for c in cases(contracts()[op]) if not c.fault), key=elements)[:40:4]
    assert {check(case, right()).verdict for case in small} == {"PASS"}


# -- cases -----------------------------------------------------------------------------------------------------------


def test_there_is_one_for_every_op_and_its_token_reads_back():
    assert list(dict.fromkeys(case.op for case in CAPTURED)) == [op for op, c in contracts().items() if not c.collective]
    under = {(case.op, scheme) for case in CAPTURED for _, scheme in case.schemes}
    assert under == {(op, s) for op, c in contracts().items() for taken in c.schemes.values() for s in taken}
    assert all(Case.from_token(case.token) == case and ",capture," in case.token for case in CAPTURED)
    assert {case.capture for contract in contracts().values() for case in cases(contract)} == {False}


@pytest.mark.parametrize("case", CAPTURED, ids=lambda case: case.token)
def test_right_kernels_pass(case):
    """But kernels that read counts or codes on the host, which no graph can repeat."""
    result = check(case, right())
    parts = ("grouped_gemm", "moe_experts", "moe_layer", "indexer_scores", "indexer_topk")
    read = case.op == "grouped_gemm" or (case.schemes and case.op in parts)
    assert result.verdict == ("LEFT_OUT" if read else "PASS"), result.explain()


def test_replays_vary_what_they_say():
    case = Case.from_token("kv_write,T=5,A=8,B=4,pages:bf16,batch=1/70+1/9+1/0+2/150,block_size=64,capture,0")
    captured, short, grown, idle = (inputs.operands for inputs in calls(case))
    lengths = [found["batch"].kv_len.tolist() for found in (captured, short, grown, idle)]
    assert lengths == [[70, 9, 0, 150], [17, 0, 0, 37], [70, 9, 1, 150], [0, 0, 0, 0]]
    assert len({found["pages"].spec for found in (captured, short, grown, idle)}) == 1
    assert not np.array_equal(short["first"], grown["first"])
    [_, first, second] = calls(next(c for c in CAPTURED if c.op == "moe_experts"))
    assert [dict(inputs.case.recipes)["ids"] for inputs in (first, second)] == ["crowded", "nowhere"]
    assert not np.array_equal(first.operands["w13"].native, second.operands["w13"].native)
    [_, first, second] = calls(next(c for c in CAPTURED if c.op == "indexer_scores"))
    assert first.batch.max_kv == second.batch.max_kv  # the result is as wide


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        ("add,T=3,H=8,a:bf16,view=rows,capture,0", "a captured call has no view, fault, copies nor program"),
        ("add,T=3,H=8,a:bf16,fault=shape,capture,0", "a captured call has no view, fault, copies nor program"),
        ("add,T=0,H=8,a:bf16,capture,0", "a captured call has rows, and requests with pages of their own"),
        ("add,T=3,H=8,a:bf16,capture,capture,0", "capture is given twice"),
        ("add,T=3,H=8,a:bf16,capture=1,0", "capture is not one of its sizes, expected one of T, H"),
    ],
)
def test_tokens_of_no_captured_call_are_refused(token, sentence):
    with pytest.raises(UsageError, match=sentence):
        Case.from_token(token)


def test_a_run_has_them_where_graphs_are_captured_and_says_so_elsewhere():
    token = next(case.token for case in CAPTURED if case.op == "concat")
    there, here = (run(create(name), ["concat"]) for name in ("torch:capture", "torch"))
    assert next(r for r in there.results if r.token == token).verdict == "PASS" and there.exit_code == 2  # inherited
    assert not any(",capture," in r.token for r in here.results)
    assert not there.left_out and [line for line in here.left_out if "captured as a graph" in line]
    left = replay(token, "torch", isolate=False)
    assert (left.verdict, left.message) == ("LEFT_OUT", "torch:cpu captures no graphs")
    declared = replay(next(c.token for c in CAPTURED if c.op == "grouped_gemm"), "torch:capture", isolate=False)
    assert declared.message == "grouped_gemm on torch:capture cannot be captured: the kernel says so, or needs data"


# -- defects and honest variants ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.key)
def test_planted_defects_are_found_in_replays_alone(defect):
    dtype = "" if defect.scored == ("",) else "bfloat16"
    trial = attempt(("defect", defect.key, dtype, 0))
    assert ",capture," in trial.token and trial.verdict.startswith("FAIL"), trial
    assert trial.message.startswith(("replayed as ", "when captured: UsageError: __bool__ copies")), trial.message


def test_planted_defects_are_right_when_they_are_called():
    from porthal.conformance.selftest.planting import planted

    for defect in DEFECTS:
        bench = Bindings(planted(defect))
        some = [c for c in plan(defect.op, "bfloat16") if dict(c.dims).get("T") == 7][:3]
        assert {check(c, bench).verdict for c in some} == {"PASS"}, defect.key


@pytest.mark.parametrize("variant", [v for v in variants() if v.source == "capture"], ids=lambda v: v.key)
def test_honest_captured_variants_pass(variant):
    for seed in range(3):
        trial = attempt(("variant", variant.key, "", seed))
        assert not trial.token and trial.cases >= 3, trial


# -- a decode step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), [("glm5", "float32"), ("glm52", "bfloat16")])
def test_a_decode_step_is_captured_once_and_right_in_every_replay(ops, checkpoints, kind, dtype):
    found = replays(ops, PROMPT[:24], checkpoints[kind], dtype, decode=6)
    assert found.ok and len(found.errors) == 6, found.sentence


def test_a_step_with_stale_lengths_is_wrong(checkpoints):
    class Stale(Capturing):
        name = "stale"

        def plan(self, batch, into=None):
            return super().plan(batch)

    found = replays(bind(backend=Stale()), PROMPT[:24], checkpoints["glm5"], decode=2)
    assert not found.ok and found.sentence.startswith("Captured once, the decode step is wrong in replay 0: off by "), found


def test_a_step_that_reads_on_the_host_says_which_and_one_that_declares_it_is_left_out(checkpoints):
    class Reading(Capturing):
        name = "reading"

        def add(self, a, b):
            return a + b if a.sum().item() else b.clone()

    class Declared(Reading):
        name = "declared"

        def add(self, a, b):
            return super().add(a, b)

        add.capturable = False

    found = replays(bind(backend=Reading()), PROMPT[:24], checkpoints["glm5"], decode=2)
    assert not found.ok and "item copies between host and device" in found.sentence
    left = replays(bind(backend=Declared()), PROMPT[:24], checkpoints["glm5"], decode=2)
    assert left.ok and left.sentence == "The decode step was not captured: add of declared cannot be."
    assert replays(bind(backend=create("torch")), [1], decode=1).sentence.endswith("torch:cpu captures no graphs.")
    assert not Replays("float32", (0.0, float("nan"))).ok
