"""The cases of collectives find what is planted, and let pass what is right."""

from __future__ import annotations

from contextlib import closing

import pytest

from porthal.conformance import Case, replay
from porthal.conformance.cases.legal import refusal
from porthal.conformance.cases.plan import cases
from porthal.conformance.cases.ranked import given, world
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.report.reached import members
from porthal.conformance.runner.ranked import Ranked, in_threads
from porthal.conformance.runner.workers import Bounds, Setup
from porthal.conformance.selftest.ranked import DEFECTS, Planted, caught
from porthal.hal import UsageError, collectives, contracts
from tests.plugins import install, installed


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_mistake_is_caught(defect):
    token, judged = next(caught(defect))
    assert judged.verdict in ("FAIL_VALUE", "FAIL_SHAPE", "FAIL_DTYPE", "FAIL_ERROR", "FAIL_NONDETERMINISTIC", "FAIL_MUTATED")
    assert judged.message.startswith("rank "), (token, judged)


def test_at_least_thirty_mistakes_are_planted_in_all_ops_but_one_that_moves_nothing():
    assert len(DEFECTS) == 66
    assert {op for op, _ in DEFECTS.values()} == set(collectives())


@pytest.mark.parametrize("op", collectives())
def test_what_is_right_passes(op):
    """A case of each kind on three ranks: plain, of other values, of a view, in two groups, and each fault."""
    bindings = Bindings(Planted())
    planned = [case for case in cases(collectives()[op]) if case.dims[0] == ("ranks", 3) or case.seq]
    kinds = {(bool(case.recipes), case.view, case.seq, case.fault): case for case in planned}
    assert len(kinds) >= (4 if op == "barrier" else 8)
    for case in kinds.values():
        judged = in_threads(case, bindings, "bring-up")
        assert judged.verdict == "PASS", (case.token, judged.message)


def test_a_misplaced_number_says_where_it_comes_from():
    token, judged = next(caught("all_to_all: the sender's place is taken for the receiver's"))
    assert token == "all_to_all,ranks=2,H=5,n=3,x:bf16,0"
    token, judged = next(caught("broadcast: the root is always rank 0"))
    assert token == "broadcast,ranks=3,H=5,T=4,root=1,0"
    assert judged.message == "rank 0: y[0, 0] is 0.0, expected 1048576.0: element 0 of rank 0 in place of element 0 of rank 1"


def test_the_plan_has_every_number_of_ranks_and_kind_of_split():
    planned = cases(collectives()["all_to_all_v"])
    assert {dict(case.dims)["ranks"] for case in planned} == {1, 2, 3, 4, 8}
    assert max(map(world, planned)) == 8
    sends = {case.recipe("send"): [given(case, r).operands["send"].tolist() for r in range(3)] for case in planned
             if dict(case.dims)["ranks"] == 3 and not case.fault}  # fmt: skip
    assert sends["zeros"] == [[0, 0, 0]] * 3
    assert sends["onto"] == [[0, 0, 7], [0, 0, 6], [0, 0, 0]]
    assert sends["shifted"] == [[0, 7, 0], [0, 0, 6], [0, 0, 0]]
    assert sends["silent"][2] == [0, 0, 0] and {row[2] for row in sends["silent"]} == {0}


def test_collectives_are_a_profile_of_their_own_and_change_no_other():
    assert members("distributed") == sorted(collectives())
    assert not set(members("inference")) & set(collectives()) and not set(contracts()) & set(collectives())


@pytest.mark.parametrize(
    ("token", "why"),
    [
        ("all_reduce,ranks=65,H=5,T=4,0", "it has 65 ranks, expected at most 64"),
        ("all_reduce,H=5,T=4,0", "it lacks ranks"),
        ("all_reduce,ranks=2,H=5,T=4,view=transposed,0", "transposed is not a view of such a call, expected columns or rows"),
        ("all_reduce,ranks=2,H=5,T=4,fault=kind,0", "'kind' is not a fault of ranks, expected one of dtype, shape, range"),
        ("all_reduce,ranks=1,H=5,T=4,fault=killed,0", "it has no fault killed"),
        ("all_reduce,ranks=2,H=5,T=4,seq=churn,0", "'churn' is not a program of several ranks, expected groups"),
        ("broadcast,ranks=2,H=5,T=4,root=2,0", "it requires root to be 0 to 1"),
    ],
)
def test_a_token_that_is_no_call_is_refused(token, why):
    with pytest.raises(UsageError) as refused:
        Case.from_token(token)
    assert why in str(refused.value)


def test_processes_that_die_and_stall_are_replayed_by_token():
    """Real processes, with cpu's shared memory: a plain call, and one in which a rank is killed."""
    for token in ("all_to_all_v,ranks=2,H=5,N=7,M=14,send~mirrored,0", "all_reduce,ranks=3,H=5,T=4,fault=killed,1"):
        assert not refusal(Case.from_token(token))
        result = replay(token, "cpu")
        assert (result.verdict, result.op) == ("PASS", token.partition(",")[0]), result.message


RANKED = """
    import os

    from porthal.backends.reference.backend import Reference
    from porthal.hal import NotClaimed, collectives

    class Chip(Reference):
        def __init__(self, device=""):
            super().__init__(device)
            self.rank = os.environ.get("RANK")

        def communicator(self, timeout=60.0):
            made = super().communicator(timeout)
            if made.size < 3:
                return made
            made.close()
            raise NotClaimed("3 ranks need a device each")

        def all_reduce(self, x, comm):
            assert self.rank == str(comm.rank), f"made as rank {self.rank}, called as {comm.rank}"
            return Reference.derive(self, collectives()["all_reduce"])(x, comm)
"""


def test_ranks_know_their_number_when_they_are_made_and_without_devices_are_unclaimed(tmp_path):
    """By it they take a device each. Two chips are asked cases of up to eight ranks; those of fewer go on afterwards."""
    install(tmp_path, "ranked", backend=RANKED)
    with installed(tmp_path), closing(Ranked(Setup("ranked", "bring-up", False, 3), Bounds())) as ranks:
        many, some = (ranks.one(Case.from_token(f"all_reduce,ranks={n},H=5,T=4,0")) for n in (3, 2))
    assert (many.verdict, many.message) == ("UNCLAIMED", "rank 0: 3 ranks need a device each")
    assert (some.verdict, some.message, some.status) == ("PASS", "", "own")
