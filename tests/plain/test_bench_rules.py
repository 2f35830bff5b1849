"""The rules by which times are taken, kept, judged and compared, each on a clock, samples or backends that are made up."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from porthal.bench import curve, run, step, verify, worker
from porthal.bench.call import Judged
from porthal.bench.compare import comparison
from porthal.bench.measured import Measured
from porthal.bench.report import Report
from porthal.bench.roofline import Work
from porthal.bench.run import BURSTS, Run
from porthal.bench.scale import Sized
from porthal.bench.speeds import Speeds
from porthal.bench.statistics import LEAST, MOST, Summary
from porthal.bench.worker import Backstage, Bench, Setup, Side
from porthal.bench.workloads import Row, Workload
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.compositions import Request
from porthal.conformance.cases.copies import build
from porthal.conformance.report.facts import Facts
from porthal.hal import CallSpec, UsageError, contracts, create
from tests.benchfiles import benchmark_file, sealed

GROUP = "decode, 1 request, context 1k"
WORK = Work(1e3, 1e6, 10.0, "float32")
CASE = Case.from_token("add,T=3,H=96,a:fp32,0")
WORKLOAD = Workload("demo", "float32", (Row("decode", GROUP, CASE, 3.0),))


def timed(*samples, token=CASE.token, backend="a", **rates):
    """A call that was measured; `rates` are those of the limits around it."""
    return Measured(token, backend, "cold", "PASS", "", "own", "", WORK, samples, rates)


def side(name="a", place="hardware", sources=None):
    facts = Facts(name, place, {"porthal": "0"}, (), device="here", sources=sources or {"porthal": "0"})
    return Side(facts, "CPU time", 1, False, {"fp32": math.inf, "dram": math.inf})


def reported(*found, workload=WORKLOAD):
    return Report(Run(workload, 1, {m.backend: side(m.backend) for m in found}, list(found)))


# -- a worker ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench():
    """A worker's bench and what happens on it, in order; what is timed takes 5 seconds, of which 1 is the timing itself."""
    made, happened = Bench.__new__(Bench), []

    def take(run, clock):
        happened.append("start")
        run()
        happened.append("stop")
        return 5.0

    made.backend, made.clock, made.cores, made.overhead = SimpleNamespace(timed=take), None, [], 1.0
    made.evict = lambda: happened.append("evict")
    made.call = SimpleNamespace(
        run=lambda: happened.append("run"),
        other=lambda: happened.append("other"),
        repeat=lambda n: lambda: happened.extend(["run"] * n),
    )
    return made, happened


def test_a_cold_call_finds_nothing_in_the_caches_but_its_code(bench):
    made, happened = bench
    assert made.cold(0.0) == 4.0
    assert happened == ["evict", "other", "start", "run", "stop"]


def test_a_warm_sample_is_of_one_of_its_calls(bench):
    made, happened = bench
    assert made.warm(4) == 1.0
    assert happened == ["run", "start", *["run"] * 4, "stop"]


def test_a_cache_is_filled_before_its_rate_is_taken(bench):
    made, happened = bench

    def work():
        happened.append("work")
        return 10.0

    made.peaks = {"l2": (work, 2.0**20), "dram": (work, math.inf)}
    assert made.peak("l2") == 10.0 * worker.PASSES / 5
    assert happened == ["work", "start", *["work"] * worker.PASSES, "stop"]
    happened.clear()
    assert made.peak("dram") == 2.0 and happened == ["start", "work", "stop"]


def test_a_worker_keeps_to_its_processors_before_a_backend_counts_them(monkeypatch):
    happened = []
    monkeypatch.setattr(worker, "processors", lambda threads: [5, 7][-threads:])
    monkeypatch.setattr(worker.os, "sched_setaffinity", lambda process, cores: happened.append((process, cores)))
    monkeypatch.setattr(worker, "create", lambda name: happened.append(name) or create(name))
    Bench(Setup("reference", 2))
    assert happened == [(0, [5, 7]), "reference"]


def test_every_library_of_a_worker_gets_the_same_number_of_threads(monkeypatch):
    given = []

    class Started:
        def __init__(self, setup, module, settings, python):
            given.append(settings)

        close = staticmethod(lambda: None)

    monkeypatch.setattr(worker, "Worker", Started)
    monkeypatch.setattr(Backstage, "_answer", lambda self, patience: side())
    Backstage("a", 3)
    assert given == [dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PORTHAL_THREADS"), "3")]


# -- a run ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """What workers are asked for, in order: none is started, each answer is always the same, and no time passes."""
    found = []

    class Stage:
        place, sources = "hardware", {"porthal": "0"}

        def __init__(self, name, *_):
            self.name, self.side = name, side(name, Stage.place, Stage.sources)

        def ask(self, method, *args):
            found.append((self.name, method, *(args if method == "peak" else ())))
            return {"open": Judged("PASS", "", "own", "", WORK), "peak": 1e9, "cold": 2e-3}.get(method)

        def close(self):
            pass

    monkeypatch.setattr(run, "Backstage", Stage)
    monkeypatch.setattr(run, "probe", lambda name: SimpleNamespace(state="not here"))
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: 0.0))
    return SimpleNamespace(found=found, stage=Stage)


def test_backends_take_turns_and_limits_are_taken_in_every_round(asked):
    made = run.bench(WORKLOAD, ["a", "b"], 1)
    assert [m.samples for m in made.timed] == [(2e-3,) * LEAST] * 2
    of_call = asked.found[asked.found.index(("b", "open")) + 1 : asked.found.index(("a", "close"))]
    turn = 2 + 2 * 2 * BURSTS  # a sample of each backend, and of each the two limits that may bind the call
    rounds = [of_call[at : at + turn] for at in range(0, len(of_call), turn)]
    peaks = sorted((name, "peak", peak) for name in "ab" for peak in ("dram", "fp32") for _ in range(BURSTS))
    assert len(rounds) == LEAST
    for one in rounds:
        assert one[:2] == [("a", "cold"), ("b", "cold")] and sorted(one[2:]) == peaks
    assert {len(rates) for m in made.timed for rates in m.rates.values()} == {BURSTS * LEAST}


def test_a_call_is_measured_until_every_backend_tells_enough(monkeypatch):
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: 0.0))
    quiet, restless = [1.0] * 9, [1.0, 2.0] * 5
    assert run.enough({"a": quiet, "b": quiet}, until=1.0)
    assert not run.enough({"a": quiet, "b": restless}, until=1.0) and not run.enough({"a": restless, "b": quiet}, until=1.0)
    assert run.enough({"a": quiet, "b": restless}, until=0.0)
    assert not run.enough({"a": quiet, "b": restless[:2]}, until=0.0)  # two samples say nothing


@pytest.mark.parametrize("place", ["emulated device", "stub runtime"])
def test_what_is_no_hardware_gets_no_time(asked, place):
    asked.stage.place = place
    made = run.bench(WORKLOAD, ["a"], 1)
    [found] = made.found
    assert made.timed == [] and found.why == f"{place}: no speed of a chip"
    assert {method for _, method, *_ in asked.found} <= {"peak"} and Report(made).exit_code == 2


@pytest.mark.parametrize("other", ["dtype", "backends"])
def test_a_run_does_not_go_on_from_one_with_another_dtype_or_other_sources(asked, tmp_path, other):
    journal = tmp_path / "journal"
    run.bench(WORKLOAD, ["a"], 1, journal=journal)
    assert run.bench(WORKLOAD, ["a"], 1, journal=journal, resume=True).timed
    asked.stage.sources = {"porthal": "1" if other == "backends" else "0"}
    workload = replace(WORKLOAD, dtype="bfloat16" if other == "dtype" else "float32")
    with pytest.raises(UsageError, match=f"is the journal of a benchmark run with {other} "):
        run.bench(workload, ["a"], 1, journal=journal, resume=True)


@pytest.mark.parametrize("late", [False, True])
def test_the_journal_stays_where_a_run_can_go_on(command_line, monkeypatch, tmp_path, late):
    file = tmp_path / "report.json"
    journal = file.with_name("report.json.journal")

    def half(calls, names, *_, **__):
        journal.write_text("kept\n")
        found = [timed(*[1e-3] * 9, token=row.case.token, backend=names[0]) for row in calls.rows]
        return Run(calls, 1, {name: side(name) for name in names}, found, late=late)

    monkeypatch.setattr(run, "bench", half)
    monkeypatch.setattr(Report, "document", {})
    code, _, err = command_line("bench", "--workload", "demo", "--op", "argmax", "--backend", "reference", "--json", file)
    assert code == 0 and file.exists() and journal.exists() is late
    assert (f"--resume {journal}" in err) is late


# -- what was measured ---------------------------------------------------------------------------------------------------


def test_nothing_is_said_of_a_share_of_a_noisy_limit():
    steady, restless = (1e9,) * 5, (1e9, 2e9, 3e9, 4e9, 5e9)
    assert not timed(2e-3, 2e-3, dram=steady, fp32=restless).noisy  # which does not bind it
    assert timed(2e-3, 2e-3, dram=restless, fp32=steady).noisy
    assert timed(1e-3, 2e-3, 3e-3, dram=steady).noisy


@pytest.mark.parametrize("samples", [[0.0], [-1e-3], [1e-3, 0.0]])
def test_a_time_that_is_none_is_not_read(samples):
    facts = asdict(timed(1e-3, dram=(1e9,)))
    assert Measured.read(facts) == timed(1e-3, dram=(1e9,))
    with pytest.raises(ValueError, match="not above 0"):
        Measured.read({**facts, "samples": samples})


def test_samples_are_enough_at_a_narrow_interval_or_at_their_greatest_number():
    def settled(width, rounds):
        return Summary(1.0, 1.0, (1 - width / 2, 1 + width / 2), 0.0, rounds).settled

    assert settled(0.03, LEAST) and not settled(0.03, LEAST - 1) and not settled(0.05, MOST - 1)
    assert settled(0.05, MOST) and MOST == 200


def test_a_time_beyond_its_limit_is_an_error():
    """A megabyte at 1 GB/s takes a millisecond."""
    steady = (1e9,) * 5
    near, beyond = (reported(timed(1e-3 / share, dram=steady)) for share in (1.04, 1.06))
    assert near.impossible == [] and near.exit_code == 0
    assert beyond.impossible == beyond.run.found and beyond.exit_code == 1


def test_what_is_wrong_is_exit_code_1_though_nothing_was_timed():
    assert reported(replace(timed(), samples=(), verdict="FAIL_VALUE")).exit_code == 1


def test_a_row_of_a_prompt_meets_as_many_keys_as_it_sees():
    """Four rows see 97 to 100 keys, or 1 to 4: the mean of each."""
    token = "indexer_scores,T=4,G=8,D=128,scale=0.5,iq:bf16,batch=4/{},block_size=64,0"
    flops = [Work.of(build(Case.from_token(token.format(n)))).flops for n in (100, 4)]
    assert flops[0] / flops[1] == round(98.5) / round(2.5)


def test_a_step_is_all_of_its_calls_and_so_is_its_limit():
    console = Console(width=200)
    with console.capture() as shown:
        console.print(reported(timed(2e-3, dram=(1e9,))).table())
    assert f"{GROUP}: one step takes a 6 ms (limit 3 ms)" in shown.get()


# -- comparing -----------------------------------------------------------------------------------------------------------


def file_of(noisy=0.0, **settings):
    """A file of one step; of its time, a part is noisy."""
    data = benchmark_file({"cpu": 0.9, "torch": 0.5}, rows=(1,), contexts=("1k",), only=("rms_norm", "linear"), **settings)
    for entry in data["benchmarks"] if noisy else ():
        first = entry["extra_info"]["op"] == "rms_norm"
        time = (noisy if first else 1 - noisy) / entry["extra_info"]["calls"]
        entry["stats"] |= {"min": time, "median": time, "max": time}
        entry["extra_info"] |= {"p10": time, "ci95": [time * 0.99, time * 1.01], "noise": 0.5 * first}
    return data


def speeds(data):
    return Speeds.of_object(sealed(data))


@pytest.mark.parametrize(("noisy", "compared"), [(0.05, True), (0.2, False)])
def test_a_step_of_which_much_is_noisy_is_not_compared(noisy, compared):
    [[_, found]] = comparison(speeds(file_of(noisy))).steps.values()
    assert (found.ratio is not None) is compared


@pytest.mark.parametrize(("times", "said"), [(0.9, True), (1.1, True), (0.97, False)])
def test_a_limit_that_moved_between_two_runs_is_said(times, said):
    other = file_of()
    other["porthal"]["limits"]["cpu"]["dram"] *= times
    found = [line for line in comparison(speeds(file_of()), speeds(other)).differences if "the machine's own limits" in line]
    assert found == ([f"the machine's own limits for cpu B against cpu A: dram {times:.2f}x"] if said else [])


def test_other_backends_are_told_apart_by_threads_and_place():
    data = file_of()
    data["porthal"]["backends"]["torch"] |= {"threads": 2, "place": "stub runtime", "version": "2.9"}
    found = [line for line in comparison(speeds(data)).differences if line.startswith("different")]
    assert found == ["different place: hardware (cpu), stub runtime (torch)", "different threads: 1 (cpu), 2 (torch)"]


def test_a_call_that_never_had_a_time_is_no_regression():
    later = file_of()
    gone = {"op": "argmax", "token": "argmax,T=1,0", "backend": "cpu", "group": GROUP, "why": "there was no time left for it"}
    later["porthal"]["unmeasured"].append(gone)
    assert comparison(speeds(file_of()), speeds(later)).regressions(0.0) == []


# -- verifying -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("times", "holds"), [(0.5, True), (1.05, True), (1.3, False)])
def test_a_row_holds_unless_it_is_a_tenth_slower(times, holds):
    row = speeds(file_of()).rows[0]
    again = timed(*[times * row.time.median] * 9)
    assert verify._checked(row, "cpu", 0, again, same=False).holds is holds


def test_a_row_that_is_noisy_here_is_not_judged(monkeypatch):
    data = benchmark_file({"cpu": 0.9}, rows=(1,), contexts=("1k",), only=("rms_norm", "linear"))
    tokens = ["rms_norm,T=1,H=96,x:bf16,0", "linear,T=1,K=64,N=32,x:bf16,0"]
    for entry, token in zip(data["benchmarks"], tokens):
        entry["extra_info"]["token"] = token
    noisy, slow = (1.0, 2.0, 3.0), (3.0, 3.0, 3.0)

    def found(*samples):
        made = [timed(*times, token=token, backend="cpu") for token, times in zip(tokens, samples)]
        monkeypatch.setattr(verify, "bench", lambda workload, names, *_, **__: Run(workload, 1, {"cpu": side("cpu")}, made))
        return verify.verify(speeds(data), 1.0, 1)

    made = found(noisy, slow)
    assert [row.row.partition(" ")[0] for row in made.checked] == ["linear"] and made.exit_code == 1
    assert (made.noisy, made.reproduced.rows) == (1, 1)
    with pytest.raises(UsageError, match=r"^all 2 rows that were drawn were too noisy here"):
        found(noisy, noisy)


# -- steps and curves ----------------------------------------------------------------------------------------------------


def test_a_smaller_call_stands_for_as_many_as_move_its_bytes():
    """Of few rows, the weights are nearly all there is to move, and what a call costs."""
    spec = CallSpec({"T": 4, "K": 2048, "N": 2048}, {"x": "bfloat16", "w": "bfloat16"}, {"out": "bfloat16"}, {})
    sized = Sized(contracts()["linear"], spec, (), (), {"T": 2, "K": 2048, "N": 2048})
    assert sized.stands_for == pytest.approx((2048**2 + 4 * 4096) / (2048**2 + 2 * 4096))


def test_sparse_attention_is_charged_with_its_indexer_and_every_call():
    """By context, milliseconds of the indexer, which is called twice, of sparse and of dense attention."""
    times = {1024: (1, 2, 3), 2048: (1, 2, 6)}
    rows, found = [], []
    for context, parts in times.items():
        for part, took in zip(curve.PARTS, parts):
            case = Case.from_token(f"add,T={len(rows) + 1},H=96,a:fp32,0")
            rows.append(Row(part, f"curve, context {context}", case, 2.0 if part == curve.INDEXER else 1.0))
            found.append(timed(took * 1e-3, token=case.token))
    made = reported(*found, workload=Workload("curve", "float32", tuple(rows), {"topk": 512})).run
    lines = list(curve.markdown(made))
    assert [line.split(" | ", 3)[3] for line in lines if line.startswith(("| 1024", "| 2048"))] == [
        "2 ms | 2 ms | 4 ms | 3 ms | 0.75 |",
        "2 ms | 2 ms | 4 ms | 6 ms | 1.50 |",
    ]
    assert "Indexer and sparse attention together cost less than dense attention from a context of 1365 on." in lines


class Hand:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_what_a_composite_calls_is_part_of_it():
    clock = Hand()
    ops = step.Clocked(clock)

    def part():
        clock.now += 1.0

    inner = ops("part", part)

    def whole():
        clock.now += 2.0
        inner()
        inner()

    ops("whole", whole)()
    assert (ops.spent, ops.calls) == (4.0, 1)


def test_the_first_steps_are_not_counted(monkeypatch):
    """The n-th step takes n milliseconds, of which its one op takes half."""
    clock, made, ops = Hand(), [], []

    @dataclass
    class Config:
        eos_token_id: tuple[int, ...]

    def took(seconds):
        clock.now += seconds

    def one():
        made.append(None)
        took(len(made) * 5e-4)
        ops[0](len(made) * 5e-4)

    stands_in = {
        "bind": lambda wrap, **_: ops.append(wrap[0]("op", took)),
        "opened": lambda *_: (Config((1,)), None),
        "profile": lambda *_: None,
        "needed": lambda *_: None,
        "Glm5": lambda *_: SimpleNamespace(),
        "step": lambda *_: one,
        "stepped": lambda *_: ["op"],
        "time": SimpleNamespace(perf_counter=clock),
    }
    for name, value in stands_in.items():
        monkeypatch.setattr(step, name, value)
    found = step.whole_step(SimpleNamespace(captures=False), step.Whole("", (Request(1, 8),)), "float32", clock)
    middle = step.FIRST + (step.STEPS + 1) / 2
    assert (found.seconds, found.host, found.calls) == pytest.approx((1e-3 * middle, 5e-4 * middle, 1))
