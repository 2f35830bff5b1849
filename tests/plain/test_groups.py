"""A case is held by a group of workers, one per rank: today one, and several run it together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from porthal.conformance.cases.case import Case
from porthal.conformance.report.facts import Facts
from porthal.conformance.report.results import Result
from porthal.conformance.runner.workers import Group, Setup

ADD = "add,T=7,H=96,a:fp32,0"


def setup(ranks: int, backend: str = "reference") -> Setup:
    return Setup(backend, "bring-up", False, 3.0, ranks=ranks)


@pytest.fixture
def groups() -> Any:
    made: list[Group] = []

    def make(*args: Any) -> Group:
        made.append(Group(setup(*args)))
        return made[-1]

    yield make
    for group in made:
        group.close()


def test_every_rank_runs_the_case_and_rank_0_answers(groups: Any) -> None:
    group = groups(2)
    assert isinstance(group.awaited(), Facts) and len({w.process.pid for w in group.workers}) == 2
    heard: list[Any] = []
    group.give(Case.from_token(ADD), 60, returned=heard.append)
    answer = group.awaited()
    assert isinstance(answer, Result) and answer.verdict == "PASS" and answer.token == ADD
    assert len(heard) == 1 and heard[0]["y"].shape == (7, 96)
    assert sorted(group.answers) == [0, 1] and all(r.verdict == "PASS" for r in group.answers.values())


def test_a_rank_that_dies_is_the_verdict_and_is_named(groups: Any, tmp_path: Path) -> None:
    group = groups(2)
    group.awaited()
    os.kill(group.workers[1].process.pid, 9)
    group.give(Case.from_token(ADD), 60)
    answer = group.awaited()
    assert answer.verdict == "CRASH" and answer.message.startswith("rank 1 killed by SIGKILL")
    result = group.result(answer)
    assert (result.token, result.verdict) == (ADD, "CRASH")


def test_a_rank_that_does_not_answer_times_out_all_of_them(groups: Any) -> None:
    group = groups(2)
    group.awaited()
    os.kill(group.workers[1].process.pid, 19)  # SIGSTOP
    group.give(Case.from_token(ADD), 0.5)
    answer = group.awaited()
    assert (answer.verdict, answer.message) == ("TIMEOUT", "no answer within 0.5 s")
    assert [w.process.poll() is not None for w in group.workers] == [True, True]


def test_a_group_of_one_says_nothing_of_ranks(groups: Any) -> None:
    group = groups(1)
    group.awaited()
    os.kill(group.workers[0].process.pid, 9)
    group.give(Case.from_token(ADD), 60)
    assert group.awaited().message.startswith("killed by SIGKILL")
