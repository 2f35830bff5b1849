"""Benchmark files beside each other: ratios and intervals, whole steps, what became slower, what is refused."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from statistics import median

import pytest

from porthal.bench.compare import Ratio, comparison
from porthal.bench.speeds import Speeds, Timed
from porthal.hal import UsageError
from tests.benchfiles import OPS, benchmark_file, sealed, unmeasured

ONE = {"rows": (1,), "contexts": ("1k",)}


def measured(*args, **settings):
    return Speeds.of_object(benchmark_file(*args, **settings))


def test_a_ratio_is_of_medians_and_its_interval_that_of_both_logarithms():
    ratio = Ratio.of(Timed(2.0, 1.9, 2.2), Timed(5.0, 4.5, 5.5))
    assert ratio.value == 2.5 and ratio.word == "faster"
    assert ratio.low == pytest.approx(2.5 / math.exp(math.hypot(math.log(5 / 4.5), math.log(2.2 / 2))))
    assert ratio.high == pytest.approx(2.5 * math.exp(math.hypot(math.log(5.5 / 5), math.log(2 / 1.9))))
    swapped = Ratio.of(Timed(5.0, 4.5, 5.5), Timed(2.0, 1.9, 2.2))
    assert swapped == pytest.approx((1 / ratio.value, 1 / ratio.high, 1 / ratio.low)) and swapped.word == "slower"
    assert Ratio(1.1, 0.99, 1.2).word == "not significant"


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Two medians of 25 draws each with exact intervals of the median, whose true ratio is known."""
    draw, held, trials = random.Random(7), 0, 400

    def drawn(center):
        times = sorted(center * draw.lognormvariate(0, 0.2) for _ in range(25))
        return Timed(median(times), times[7], times[17])  # the 8th and 18th of 25 hold the median in 95.7 %

    for _ in range(trials):
        ratio = Ratio.of(drawn(1.0), drawn(1.5))
        held += ratio.low <= 1.5 <= ratio.high
    assert 0.93 <= held / trials <= 0.995


def test_a_geometric_mean_is_sharper_than_its_parts():
    parts = [Ratio(2.0, 1.8, 2.2), Ratio(0.5, 0.45, 0.55), Ratio(1.0, 0.9, 1.1)]
    mean = Ratio.mean(parts)
    assert mean.value == pytest.approx(1.0) and 0.9 < mean.low < 1 < mean.high < 1.1
    assert Ratio.mean(parts[:1]) == pytest.approx(parts[0])


def test_a_backend_is_compared_with_itself_in_the_first_file_else_with_the_first_of_all():
    made = comparison(measured({"cpu": 0.9, "torch": 0.4}), measured({"torch": 0.5, "other": 0.3}))
    against = {side.label: side.reference and side.reference.label for side in made.sides}
    assert against == {"cpu A": None, "torch A": "cpu A", "torch B": "torch A", "other B": "cpu A"}
    means = {side.label: made.mean(side) for side in made.sides}
    assert means["cpu A"] is None and means["torch A"].value == pytest.approx(0.4 / 0.9, rel=0.01)
    assert means["torch B"].value == pytest.approx(0.5 / 0.4, rel=0.01) and means["torch B"].significant
    alone = comparison(measured({"cpu": 0.9, "torch": 0.4}))
    assert [side.label for side in alone.sides] == ["cpu", "torch"]


def test_a_call_that_several_groups_share_counts_once():
    data = benchmark_file({"cpu": 0.9, "torch": 0.4}, **ONE)
    again = [{**entry, "group": "decode, 1 request, context 8k"} for entry in data["benchmarks"]]
    twice = comparison(Speeds.of_object(sealed(data | {"benchmarks": data["benchmarks"] + again})))
    once = comparison(measured({"cpu": 0.9, "torch": 0.4}, **ONE))
    assert twice.mean(twice.sides[1]) == once.mean(once.sides[1]) and len(twice.steps) == 2
    assert twice.summary[twice.sides[1]] == once.summary[once.sides[1]]


def test_a_little_noise_leaves_a_step_comparable():
    data = benchmark_file({"cpu": 0.9, "torch": 0.4}, **ONE)
    for entry in data["benchmarks"]:
        entry["extra_info"]["noise"] = 0.5 if entry["extra_info"]["op"] == "rms_norm" else 0.01
    ((_, (_, step)),) = comparison(Speeds.of_object(sealed(data))).steps.items()
    assert step.ratio.value == pytest.approx(0.4 / 0.9, rel=0.02)


def test_warm_calls_are_compared_and_belong_to_no_step():
    data = benchmark_file({"cpu": 0.9}, **ONE)
    warm = {**data["benchmarks"][0], "extra_info": {**data["benchmarks"][0]["extra_info"], "cache": "warm"}}
    made = comparison(Speeds.of_object(sealed(data | {"benchmarks": [*data["benchmarks"], warm]})))
    ((_, (step,)),) = made.steps.items()
    assert len(made.calls) == len(step.rows) + 1 == len(OPS) + 1


def test_a_step_is_the_sum_over_its_calls():
    data = benchmark_file({"cpu": 0.5}, **ONE)
    ((_, (step,)),) = comparison(Speeds.of_object(sealed(data))).steps.items()
    assert step.time.median == pytest.approx(sum(b["extra_info"]["calls"] * b["stats"]["median"] for b in data["benchmarks"]))
    widths = [b["extra_info"]["calls"] * (b["stats"]["median"] - b["extra_info"]["ci95"][0]) for b in data["benchmarks"]]
    assert step.time.median - step.time.low == pytest.approx(math.hypot(*widths))
    assert step.lacks == [] and step.ratio is None


def test_steps_with_other_calls_are_compared_over_those_in_common():
    fewer = [op for op in OPS if op != "sample"]
    made = comparison(measured({"cpu": 0.5}, **ONE), measured({"cpu": 0.5}, only=tuple(fewer), spread=0.001, **ONE))
    ((_, (whole, part)),) = made.steps.items()
    assert part.lacks == ["sample"] and part.time.median < whole.time.median
    assert not part.ratio.significant and part.ratio.value == pytest.approx(1, rel=0.02)
    assert "cpu B lacks 1 of 9 calls: sample" in made.differences


def test_what_is_noisy_is_shown_and_not_compared():
    made = comparison(measured({"cpu": 0.9}, **ONE), measured({"cpu": 0.3}, noise=0.5, **ONE))
    assert made.mean(made.sides[1]) is None and made.summary == {}
    with pytest.raises(UsageError, match="no call could be compared, all are noisy or impossible"):
        made.regressions(0)  # nothing found is not nothing worse
    assert all(step.ratio is None for steps in made.steps.values() for step in steps)
    assert "too noisy to be compared: cpu B: 9 of 9 calls" in made.differences


def test_what_is_impossible_is_said_and_not_compared():
    made = comparison(measured({"cpu": 0.9, "torch": 4.1}, **ONE))
    assert made.mean(made.sides[1]) is None and made.summary == {}
    said = "impossible, faster than 105% of what the machine's limit permits, and compared with nothing: torch: 9 of 9 calls"
    assert said in made.differences and "%, impossible</span>" in made.html()
    assert all(row.words.endswith(f"% of {row.bound}, which is impossible") for row in made.sides[1].calls.values())
    data = benchmark_file({"cpu": 0.9, "torch": 4.1}, **ONE)
    for entry in data["benchmarks"]:
        entry["extra_info"]["limit_noise"] = 0.4  # then the limit says nothing
    assert len(comparison(Speeds.of_object(sealed(data))).summary) == 1


def test_what_was_wrong_with_the_machine_is_said():
    data = benchmark_file({"cpu": 0.9}, **ONE)
    data["porthal"]["load"] = 8.5
    data["porthal"]["limits"]["cpu"]["l3"] = 8.28e9
    said = comparison(Speeds.of_object(sealed(data))).differences
    assert said[0].startswith("the machine was busy as the run began: 8.5 processes for each processor waited or ran")
    assert "l3 was measured with 8.28 GB/s, below dram with 25 GB/s: shares of limits say little" in said
    both = comparison(measured({"cpu": 0.9}, **ONE), Speeds.of_object(data)).differences
    assert any(line.startswith("B: the machine was busy") for line in both)


def test_regressions_are_significant_and_beyond_the_share():
    before, slower = measured({"cpu": 0.9}, spread=0.001, **ONE), measured({"cpu": 0.9 / 1.08}, spread=0.001, seed=1, **ONE)
    made = comparison(before, slower)
    found = made.regressions(0.05)
    assert [line.split()[0] for line in found] == [*OPS, "a"] and re.search(r"takes (7\.\d+|8(\.\d+)?) % longer", found[0])
    assert made.regressions(0.1) == [] and comparison(slower, before).regressions(0.05) == []
    vague = comparison(before, measured({"cpu": 0.9 / 1.08}, spread=0.2, **ONE))
    assert not any(line.startswith("linear") for line in vague.regressions(0.05))


def test_a_call_that_has_no_time_any_more_is_worse():
    data = benchmark_file({"cpu": 0.9}, **ONE)
    gone = unmeasured(data, 0, "FAIL_VALUE: y")
    made = comparison(measured({"cpu": 0.9}, **ONE), Speeds.of_object(sealed(data)))
    ((_, (_, step)),) = made.steps.items()
    assert step.lacks == ["rms_norm"] and comparison(Speeds.of_object(data)).steps[gone["group"]][0].lacks == ["rms_norm"]
    assert made.regressions(1.0) == [f"rms_norm [{gone['token']}] has no time on cpu B any more: FAIL_VALUE: y"]


def test_what_differs_is_said():
    other = benchmark_file({"cpu": 0.9}, machine="Ampere Altra", threads=2, **ONE)
    other["porthal"]["limits"]["cpu"]["dram"] *= 0.8
    found = comparison(measured({"cpu": 0.9}, **ONE), Speeds.of_object(sealed(other))).differences
    assert found[0] == "different machine: AMD EPYC 9R14, x86_64, box (A), Ampere Altra, x86_64, box (B)"
    assert "different threads: 1 (cpu A), 2 (cpu B)" in found
    assert "the machine's own limits for cpu B against cpu A: dram 0.80x" in found
    same = comparison(measured({"cpu": 0.9}, **ONE), measured({"cpu": 0.9}, seed=1, **ONE)).differences
    assert [line for line in same if line.startswith("different")] == []


def test_calls_of_no_step_and_without_a_limit_are_compared_too(command_line, tmp_path: Path):
    data = benchmark_file({"cpu": 0.9}, **ONE)
    for entry in data["benchmarks"]:
        entry["extra_info"] |= {"step": "alone", "bound": "", "limit_s": 0.0, "kernel": "inherited"}
    file, html = tmp_path / "a.json", tmp_path / "page.html"
    file.write_text(json.dumps(sealed(data)))
    code, out, _ = command_line("compare", file, file, "--html", html)
    assert code == 0 and "one step" not in out and "linear" in out
    assert "cpu A has no own kernel, but one that is inherited, for rms_norm, linear, " in out
    text = html.read_text()
    assert "<h2>One step</h2>" not in text and "a step" not in text and '<span class="soft">inherited</span>' in text


def test_steps_of_some_ops_alone_are_called_parts(command_line, tmp_path: Path):
    data = benchmark_file({"cpu": 0.9}, **ONE)
    data["porthal"]["workload"]["part"] = True
    file, html = tmp_path / "a.json", tmp_path / "page.html"
    file.write_text(json.dumps(sealed(data)))
    code, out, _ = command_line("compare", file, file, "--html", html)
    assert code == 0 and "\npart of a step " in out and "<h2>Part of one step</h2>" in html.read_text()


def test_files_without_a_call_in_common_are_refused():
    with pytest.raises(UsageError, match=r"^files A and B have no call in common: measure the same workload"):
        comparison(measured({"cpu": 1}, rows=(1,)), measured({"cpu": 1}, rows=(8,)))


def put(data, path, value):
    *steps, last = path
    for step in steps:
        data = data[step]
    data[last] = value


FIRST = ("benchmarks", 0)


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        (("porthal",), None, "of pytest-benchmark, but not of porthal bench: "),
        (("porthal", "schema"), 7, "a benchmark file of schema 7, expected 1: measure again"),
        (("benchmarks",), [], "a benchmark file in which nothing was measured"),
        ((*FIRST, "stats"), {}, "'median' is missing"),
        ((*FIRST, "stats", "median"), "1", "median is '1', expected a number"),
        ((*FIRST, "stats", "median"), 0, "times of rms_norm are "),
        ((*FIRST, "stats", "median"), 10**400, "median is 1000"),
        ((*FIRST, "stats", "median"), 1e999, "median is inf"),
        ((*FIRST, "extra_info", "ci95"), [2, 1], "times of rms_norm are "),
        ((*FIRST, "extra_info", "ci95"), [1], ""),
        ((*FIRST, "extra_info", "verdict"), "FAIL_VALUE", "rms_norm has verdict 'FAIL_VALUE', and a time"),
        ((*FIRST, "extra_info", "op"), "a\x1b[2J", r"op is 'a\x1b[2J', expected a line of text"),
        ((*FIRST, "extra_info", "backend"), "gone", "nothing is said of backend gone"),
        ((*FIRST, "extra_info", "backend"), ["cpu"], "backend is ['cpu']"),
        ((*FIRST, "extra_info", "noise"), None, "noise is None, expected a number"),
        ((*FIRST, "extra_info", "bytes"), 0, "rms_norm has "),
        (("benchmarks", 1), benchmark_file({"cpu": 1}, **ONE)["benchmarks"][0], "a call stands there twice"),
        (("porthal", "limits"), [], "[] stands where an object is expected"),
        (("porthal", "limits", "cpu", "dram"), -1, "limit dram of cpu is -1, expected a rate"),
        (("porthal", "backends", "cpu"), 3, "3 stands where an object is expected"),
        (("porthal", "unmeasured"), [{"op": "x"}], "'token' is missing"),
        (("porthal", "steps"), {"cpu": {"1": {"seconds": "x", "host_s": 1, "calls": 1}}}, "a whole step is "),
        (("porthal", "steps"), {"cpu": {"one": {"seconds": 1, "host_s": 1, "calls": 1}}}, "invalid literal"),
        (("porthal", "command"), "porthal bench --json G", "a report that was changed after it was written"),
        (("porthal", "reproduced"), {"rows": 1}, ""),
        (("porthal", "reproduced"), 3, "reproduced is 3"),
        (("porthal", "receipt"), "a\nb", "'a\\nb' stands where a line of text is expected"),
        ((*FIRST, "extra_info", "limit_s"), 1e-9, "the limit of rms_norm, 1e-09 s, is not what dram says"),
        ((*FIRST, "stats", "min"), 1, "times of rms_norm are (1, "),
        ((*FIRST, "extra_info", "p10"), 0, "expected the least, a tenth, the middle and the most, rising"),
        (("porthal", "load"), -1, "load is -1, expected a number"),
        ((*FIRST, "extra_info", "limit_s"), 0, "times of rms_norm are "),
        (("machine_info",), None, "None stands where an object is expected"),
    ],
)
def test_a_damaged_file_gets_one_sentence(command_line, tmp_path: Path, path, value, why):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    data = benchmark_file({"cpu": 1}, **ONE)
    good.write_text(json.dumps(data))
    put(data, path, value)
    bad.write_text(json.dumps(data).replace("Infinity", "1e999"))
    code, out, err = command_line("compare", good, bad)
    assert (code, out) == (2, "") and err.startswith(f"porthal: {bad} is ") and err.count("\n") == 1, err
    assert why in err


def test_a_full_disk_is_a_sentence_and_loses_no_table(command_line, tmp_path: Path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(benchmark_file({"cpu": 0.9}, **ONE)))
    code, out, err = command_line("compare", file, file, "--html", "/dev/full")
    assert code == 2 and "rms_norm" in out
    assert err == "porthal: cannot write /dev/full: No space left on device; what it was to hold is printed above\n"


def test_the_command_compares_and_fails_over_a_share(command_line, tmp_path: Path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps(benchmark_file({"cpu": 0.9}, **ONE)))
    b.write_text(json.dumps(benchmark_file({"cpu": 0.45}, seed=1, threads=2, **ONE)))
    code, out, err = command_line("compare", a, b)
    assert (code, err) == (0, "") and "worse:" not in out
    assert re.search(r"^linear +1 +0\.\d+x \(0\.\d+ to 0\.\d+\)  slower$", out, re.M)
    assert re.search(r"^decode, 1 request, context 1k +[\d.]+ ms +\d+ ms +0\.\d+x", out, re.M)
    assert re.search(r"^cpu B is 0\.\d+x \(.+\) as fast as cpu A, geometric mean of 9 calls$", out, re.M)
    assert command_line("compare", a, b, "--fail-over", "5%")[0] == 1
    code, out, _ = command_line("compare", b, a, "--fail-over", "5%")
    assert code == 0 and "faster" in out
    for wrong in ("5", "x%", "-1%", "101%", "%", "٥%", "1e1%"):
        code, out, err = command_line("compare", a, b, "--fail-over", wrong)
        assert (code, out) == (2, "") and "is not a share: expected 0% to 100%, like 5%." in err
