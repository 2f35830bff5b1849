"""What the references say about a group of ranks, against a formula that is written in another way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from porthal.hal import Communicator, PeerLost, UsageError, bind, collectives, create, simulated

OPS = bind(backend=create("reference"), overrides={}, check=False)
RANKS = (1, 2, 3, 4, 8)


def tagged(rank: int, rows: int, width: int = 3) -> Any:
    """int32 [rows, width] of which every number says where it comes from: rank * 10000 + row * 10 + column."""
    return np.add.outer(np.arange(rows, dtype=np.int32) * 10, np.arange(width, dtype=np.int32)) + rank * 10000


def on_all(size: int, call: Any) -> list[Any]:
    found = simulated(size, lambda wire: call(Communicator.over(wire)))
    for each in found:
        if isinstance(each, Exception):
            raise each
    return found


def test_every_collective_belongs_to_one_profile():
    assert {op: tuple(c.profiles) for op, c in collectives().items()} == dict.fromkeys(collectives(), ("distributed",))
    assert len(collectives()) == 10


@pytest.mark.parametrize("size", RANKS)
def test_blocks_go_where_they_belong(size):
    got = on_all(size, lambda comm: OPS.all_to_all(tagged(comm.rank, 2 * size), comm))
    for r in range(size):
        for s in range(size):
            np.testing.assert_array_equal(got[r][2 * s : 2 * s + 2], tagged(s, 2 * size)[2 * r : 2 * r + 2])
    gathered = on_all(size, lambda comm: OPS.all_gather(tagged(comm.rank, 2), comm))
    for each in gathered:
        assert each.tolist() == [row for s in range(size) for row in tagged(s, 2).tolist()]
    for each in on_all(size, lambda comm: OPS.broadcast(tagged(comm.rank, 2), comm, root=size - 1)):
        np.testing.assert_array_equal(each, tagged(size - 1, 2))
    assert [each.tolist() for each in on_all(size, lambda comm: OPS.barrier(comm))] == [[1] * size] * size


@pytest.mark.parametrize("size", RANKS)
def test_uneven_rows_arrive_in_the_order_of_ranks(size):
    def counts(r: int) -> Any:
        return np.array([(r * 3 + s) % 4 if r != 1 else 0 for s in range(size)], np.int32)

    def call(comm: Communicator) -> Any:
        send = counts(comm.rank)
        return OPS.all_to_all_v(tagged(comm.rank, int(send.sum()) + comm.rank), send, comm, M=40)

    for r, (y, receive) in enumerate(on_all(size, call)):
        expected = []
        for s in range(size):
            first = int(counts(s)[:r].sum())
            expected += tagged(s, 100)[first : first + counts(s)[r]].tolist()
        assert receive.tolist() == [int(counts(s)[r]) for s in range(size)]
        assert y[: len(expected)].tolist() == expected
    for y, receive in on_all(size, lambda comm: OPS.all_gather_v(tagged(comm.rank, comm.rank % 3), comm, M=20)):
        assert receive.tolist() == [s % 3 for s in range(size)]
        assert y[: receive.sum()].tolist() == [row for s in range(size) for row in tagged(s, s % 3).tolist()]


@pytest.mark.parametrize("size", RANKS)
def test_sums_are_the_same_on_every_rank(size):
    values = [np.random.default_rng(r).standard_normal((2 * size, 5)).astype(np.float32) for r in range(size)]
    exact = np.sum([v.astype(np.float64) for v in values], axis=0)
    summed = on_all(size, lambda comm: OPS.all_reduce(values[comm.rank], comm))
    scattered = on_all(size, lambda comm: OPS.reduce_scatter(values[comm.rank], comm))
    for r in range(size):
        np.testing.assert_array_equal(summed[r], summed[0])
        np.testing.assert_allclose(summed[r], exact, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(scattered[r], summed[0][2 * r : 2 * r + 2])


@pytest.mark.parametrize("size", RANKS)
def test_dispatch_and_combine_are_the_sum_over_experts_for_any_number_of_ranks(size):
    """Every expert multiplies by a power of two of its own, so that a row that went astray changes the result."""
    E, k, tokens, H = 5, 2, 12, 3
    rng = np.random.default_rng(7)
    x = rng.standard_normal((tokens, H)).astype(np.float32)
    ids = np.array([rng.permutation(E)[:k] for _ in range(tokens)], np.int32)
    ids[3, 1] = -1
    weights = rng.uniform(0.1, 1, (tokens, k)).astype(np.float32)
    expected = np.zeros((tokens, H))
    for j in range(k):
        expected += np.where(ids[:, j : j + 1] >= 0, weights[:, j : j + 1].astype(np.float64) * x * 2.0 ** ids[:, j : j + 1], 0)

    def call(comm: Communicator) -> Any:
        mine = slice(comm.rank * tokens // size, (comm.rank + 1) * tokens // size)
        rows, expert = OPS.ep_dispatch(x[mine], ids[mine], comm, E=E, M=tokens * k)
        here = expert[expert[:, 0] >= 0, 0]
        assert all(comm.rank * E // size <= e < (comm.rank + 1) * E // size for e in here)
        rows[: len(here)] *= np.float32(2) ** here[:, None]
        return OPS.ep_combine(rows, ids[mine], weights[mine], comm, E=E)

    np.testing.assert_array_equal(np.concatenate(on_all(size, call)), expected.astype(np.float32))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda comm: OPS.all_to_all_v(tagged(0, 4), np.array([1, -1 if comm.rank else 1], np.int32), comm, M=9),
            "all_to_all_v: send[1] is -1, expected 0 to 4 (on rank 1; nothing was sent on any)",
        ),
        (
            lambda comm: OPS.all_to_all_v(tagged(0, 4), np.array([3, 2 * comm.rank], np.int32), comm, M=9),
            "all_to_all_v: rank 1 sends 5 rows of x, which has 4 there (nothing was sent on any rank)",
        ),
        (
            lambda comm: OPS.all_to_all_v(tagged(0, 4), np.array([0, 4], np.int32), comm, M=7),
            "all_to_all_v: rank 1 is sent 8 rows, expected at most M = 7 (nothing was sent on any rank)",
        ),
        (
            lambda comm: OPS.all_to_all_v(tagged(0, 4), np.array([2], np.int32), comm, M=7),
            "all_to_all_v: comm has ranks = 2, but ranks=1 elsewhere in the call (on rank 0; nothing was sent on any)",
        ),
        (
            lambda comm: OPS.all_gather_v(tagged(0, 4), comm, M=7),
            "all_gather_v: the ranks have 8 rows, expected at most M = 7 (nothing was sent on any rank)",
        ),
        (
            lambda comm: OPS.all_reduce(np.zeros((2 + comm.rank, 3), np.float32), comm),
            "all_reduce: rank 1 calls all_reduce,T=3,H=3,ranks=2,x:float32 and rank 0 all_reduce,T=2,H=3,ranks=2,x:float32, "
            "expected the same on all",
        ),
        (
            lambda comm: (OPS.all_gather if comm.rank else OPS.broadcast)(tagged(0, 4), comm),
            "broadcast: rank 1 calls all_gather,T=4,H=3,ranks=2,x:int32 and rank 0 broadcast,T=4,H=3,ranks=2,root=0,x:int32, "
            "expected the same on all",
        ),
        (
            lambda comm: OPS.all_to_all(tagged(0, 5), comm),
            "all_to_all: x has ranks*n = 5, but ranks=2 elsewhere in the call (on rank 0; nothing was sent on any)",
        ),
        (
            lambda comm: OPS.broadcast(tagged(0, 4), comm, root=2),
            "broadcast requires root to be 0 to 1, got root=2 (on rank 0; nothing was sent on any)",
        ),
        (
            lambda comm: OPS.ep_dispatch(np.zeros((4, 2), np.float32), np.zeros((4, 1), np.int32), comm, E=2, M=7),
            "ep_dispatch: rank 0 is sent 8 rows, expected at most M = 7 (nothing was sent on any rank)",
        ),
    ],
)
def test_a_wrong_call_is_the_same_sentence_on_every_rank(call, sentence):
    found = simulated(2, lambda wire: call(Communicator.over(wire)))
    for each in found:
        assert isinstance(each, UsageError)
        assert str(each).replace("all_gather: rank", "broadcast: rank") == sentence


def test_a_group_has_ranks_and_errors_of_its_own():
    def call(comm: Communicator) -> Any:
        part = comm.group([0, 2])
        if part is None:
            return None
        if comm.rank == 2:
            return OPS.all_gather(tagged(comm.rank, 1), part)[:, 0].tolist()
        OPS.all_gather(tagged(comm.rank, 1), part)
        return part.gather("more", b"")

    first, none, last = simulated(3, lambda wire: call(Communicator.over(wire)), timeout=0.5)
    assert isinstance(first, PeerLost) and str(first).startswith("more on rank 0: rank 2 did not answer within 0.5 s")
    assert (none, last) == (None, [0, 20000])
    wrong = simulated(2, lambda wire: Communicator.over(wire).group([0, 2]))
    assert {str(each) for each in wrong} == {"a group has ranks [0, 2]: expected some of 0 to 1, in ascending order"}
