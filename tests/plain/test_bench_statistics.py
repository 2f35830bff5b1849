"""What samples say: the middle, its interval, noise; and the least time that a call can take."""

import math
import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from porthal.bench.measured import Journal, Measured, sustained
from porthal.bench.roofline import Limit, Work, limit, needed
from porthal.bench.statistics import LEAST, NOISY, Summary, interval, quantile
from porthal.hal import UsageError

TIMES = st.lists(st.floats(1e-7, 1e2), min_size=1, max_size=60)


@given(TIMES)
def test_a_summary_is_of_the_samples_themselves(times):
    found = Summary.of(times)
    assert found.median == pytest.approx(statistics.median(times))
    assert min(times) <= found.ci95[0] <= found.median * (1 + 1e-12) and found.median <= found.ci95[1] * (1 + 1e-12)
    assert found.ci95[1] <= max(times) and min(times) <= found.p10 <= found.median * (1 + 1e-12)
    assert found.rounds == len(times)


def test_the_interval_is_the_binomial_one():
    assert interval(range(10)) == (1, 8)  # 97.9 %; 2 and 7 would hold it with 89 %
    assert interval(range(7)) == (0, 6)
    assert interval(range(5)) == (0, 4)  # the widest there is
    assert interval(range(100)) == (39, 60)


@pytest.mark.parametrize("n", [7, 12, 30])
def test_the_interval_holds_the_median_as_often_as_it_says(n):
    draw = random.Random(n)
    held = 0
    for _ in range(2000):
        low, high = interval(sorted(draw.expovariate(1.0) for _ in range(n)))
        held += low <= math.log(2) <= high
    assert held / 2000 > 0.94


def test_quantiles_lie_between_their_neighbours():
    assert quantile([1.0, 2.0, 4.0], 0.5) == 2.0
    assert quantile([1.0, 2.0, 4.0], 0.75) == 3.0
    assert quantile([5.0], 0.1) == 5.0


def test_noise_is_the_distance_between_the_quartiles():
    assert Summary.of([1.0, 1.0, 1.0, 1.0]).noise == 0.0
    apart = Summary.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert apart.noise == pytest.approx(2 / 3) and apart.noise > NOISY and apart.noisy


def test_measuring_ends_when_the_interval_is_narrow():
    assert Summary.of([1.0] * LEAST).settled
    assert not Summary.of([1.0] * (LEAST - 1)).settled
    assert not Summary.of([1.0, 1.1] * LEAST).settled
    assert Summary.of([1.0, 1.1] * 100).settled  # there must be an end


# -- the roofline --------------------------------------------------------------------------------------------------------

HOLDS = {"fp32": math.inf, "bf16": math.inf, "dram": math.inf, "l3": 2.0**25, "l2": 2.0**20, "copy": math.inf}


@pytest.mark.parametrize(
    ("work", "cold", "names"),
    [
        (Work(1, 2.0**30, 0, "bfloat16"), False, ("bf16", "dram")),
        (Work(1, 2.0**24, 0, "bfloat16"), False, ("bf16", "l2", "l3")),
        (Work(1, 2.0**19, 2.0**18, "float32"), False, ("fp32", "l2")),
        (Work(1, 2.0**19, 2.0**18, "float32"), True, ("fp32", "dram", "copy")),  # half of it is written
        (Work(1, 2.0**19, 2.0**10, "float16"), True, ("fp32", "dram")),  # no arithmetic of its own: widened
    ],
)
def test_which_limits_can_bind_a_call(work, cold, names):
    assert needed(work, HOLDS, cold) == names


def test_the_slower_of_arithmetic_and_memory_binds():
    work = Work(1e9, 1e9, 0, "bfloat16")
    assert limit(work, {"bf16": 2e11, "dram": 2e10}, {}) == Limit("dram", 0.05)
    assert limit(work, {"bf16": 1e9, "dram": 2e10}, {}) == Limit("bf16", 1.0)
    assert limit(work, {"bf16": 1e12, "dram": 2e10, "copy": 4e10}, {}) == Limit("copy", 0.025)  # the faster of two memories
    assert limit(work, {}, {}) == Limit("", 0.0)
    assert limit(work, {"dram": 2e10}, {}).share(0.1) == 0.5


def test_what_an_inner_cache_has_no_room_for_comes_from_the_next():
    work = Work(1.0, 3e6, 0, "float32")
    assert limit(work, {"l2": 1e11, "l3": 5e10}, {"l2": 1e6, "l3": 3e7}) == Limit("l3", 1e6 / 1e11 + 2e6 / 5e10)
    assert limit(replace(work, bytes=1e6), {"l2": 1e11}, {"l2": 1e6}) == Limit("l2", 1e-5)


def test_a_limit_is_what_a_peak_sustains():
    assert sustained((1.0,)) == 1.0
    assert sustained(tuple(float(n) for n in range(11))) == 9.0


# -- what is kept --------------------------------------------------------------------------------------------------------

WORK = Work(1e6, 1e3, 10.0, "float32")
MEASURED = Measured("op,T=1,0", "cpu", "cold", "PASS", "", "own", "C++", WORK, (1e-3, 2e-3), {"fp32": (1e9, 2e9)}, 3)
HEAD = {"workload": "demo", "threads": 1}


def kept(file, resume=True, **head):
    journal = Journal(file, {**HEAD, **head}, resume)
    journal.close()
    return journal.known


def test_what_was_measured_is_there_again(tmp_path):
    file = tmp_path / "run"
    journal = Journal(file, HEAD, resume=False)
    journal.add(MEASURED)
    journal.close()
    assert kept(file) == [MEASURED]
    with file.open("a") as cut:
        cut.write('{"token": "cut')  # the run was stopped while it wrote
    assert kept(file) == [MEASURED] == kept(file)
    assert kept(file, resume=False) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"bench": 1, "workload": "glm5", "threads": 1}\n', 'of a benchmark run with workload "glm5", this one has "demo"'),
        ('{"bench": 1, "workload": {"a": 1}, "threads": 1}\n', 'a benchmark run with workload {"a": 1}, this one has "demo"'),
        ('{"bench": 0, "workload": "demo", "threads": 1}\n', "of a benchmark run with bench 0, this one has 1"),
        ('{"bench": 1, "workload": "demo", "threads": 1}\n{"token": 1}\n', "is a damaged journal of a benchmark run"),
        ("a text\n", "is not the journal of a benchmark run"),
        ("[]\n", "is not the journal of a benchmark run"),
    ],
)
def test_another_file_is_refused_in_one_sentence(tmp_path, text, said):
    file = tmp_path / "run"
    file.write_text(text)
    with pytest.raises(UsageError, match=said) as refused:
        kept(file)
    assert "\n" not in str(refused.value)
    assert file.read_text() == text
