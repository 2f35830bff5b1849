"""What the ranks of one machine share is used again when nobody looks at it, and gone when the last of them is."""

from __future__ import annotations

from tests.ranks import ran

PROGRAM = """
import os, sys, time
import numpy as np
from porthal.hal import bind, create, numpy_dtype

backend = create("cpu")
before = set(os.listdir("/dev/shm"))
with backend.communicator(20) as comm:
    wire, ops = comm.native, bind(backend=backend)
    first = wire.empty((3, 5), "float32")
    second = wire.empty((7,), "int32")
    kept = first[1:, 2]
    kept[...], second[...] = 1, 2
    assert not np.shares_memory(first, second)
    del first
    third = wire.empty((3, 5), "float32")
    third[...] = 3
    assert kept.tolist() == [1, 1] and second.tolist() == [2] * 7
    address = third.__array_interface__["data"][0]
    del kept, second, third
    assert len(wire.free) == 1
    assert wire.empty((1,), "int32").__array_interface__["data"][0] <= address
    long = b"x" * (40000 * (comm.rank + 1))
    assert [len(each) for each in comm.gather("long", long)] == [40000, 80000, 120000]
    for size in (0, 1, wire.room - 1, wire.room, wire.room + 8, wire.room + 9, 3 * wire.room):  # in one piece, and in more
        heard = comm.gather("sizes", bytes([comm.rank]) * (size + comm.rank))
        assert heard == [bytes([rank]) * (size + rank) for rank in range(3)], size
    for rows in (0, 1, wire.room // 8, wire.room // 8 + 1, 70000):  # in the message, and where they lie
        given = comm.rank * 100000 + np.arange(rows)[:, None]
        starts, ends = [0, rows // 3, rows // 2], [rows // 3, rows // 2, rows]
        y = np.full((rows, 1), -1)
        wire.pull("rows", given, starts, [end - start for start, end in zip(starts, ends)], y)
        expected = [rank * 100000 + np.arange(start, end) for rank, (start, end) in enumerate(zip(starts, ends))]
        assert (y[:, 0] == np.concatenate(expected)).all(), rows
        y[...] = -1  # rows that are chosen
        chosen = np.concatenate([np.arange(rows)[start:end][::-1] for start, end in zip(starts, ends)]).astype(np.int32)
        wire.pull("chosen", given, starts, [end - start for start, end in zip(starts, ends)], y, chosen)
        expected = [rank * 100000 + np.arange(start, end)[::-1] for rank, (start, end) in enumerate(zip(starts, ends))]
        assert (y[:, 0] == np.concatenate(expected)).all(), rows
    for lender in range(3):  # whose rows alone are too many for a message
        counts = [70000 if rank == lender else 5 for rank in range(3)]
        given = wire.empty((counts[comm.rank], 1), "int64")
        given[:, 0] = comm.rank * 100000 + np.arange(len(given))
        y = np.full((sum(counts), 1), -1)
        wire.pull("uneven", given, [0, 0, 0], counts, y)
        given[...] = -2
        expected = [rank * 100000 + np.arange(count) for rank, count in enumerate(counts)]
        assert (y[:, 0] == np.concatenate(expected)).all(), lender
    for width in (1, 100001):  # in the order of ranks: what the second rounds away is not there for the third
        made = np.full((1, width), [1, 1e8, -1e8][comm.rank], np.float32)
        assert not ops.all_reduce(made, comm).any(), width
    for kind in ("float32", "bfloat16", "float16"):  # small and large, in the segment and not, dense and not
        for width in (1, 40000, 100001):
            for made in (wire.empty((3, width), kind), np.zeros((3, 2 * width), numpy_dtype(kind))[:, ::2]):
                made[...] = np.arange(width) % 32 + comm.rank
                whole = 3 * (np.arange(width) % 32) + 3
                assert (ops.all_reduce(made, comm).astype(int) == whole).all(), (kind, width)
                assert (ops.reduce_scatter(made, comm).astype(int) == whole).all(), (kind, width)
    wide = wire.empty((4, 6), "int32")
    wide[...] = np.arange(24).reshape(4, 6)
    y = np.empty((4, 3), np.int32)
    wire.pull("strided", wide[:, ::2], [0, 0, 0], [4, 0, 0], y)
    assert (y == wide[:, ::2]).all()
    x = wire.empty((3, 2), "float32")
    x[...] = comm.rank
    assert ops.all_to_all(x, comm)[:, 0].tolist() == [0, 1, 2]
    assert set(os.listdir("/dev/shm")) == before
    assert all(wire.empty((n,), "int8").__array_interface__["data"][0] % 64 == 0 for n in (1, 65))
    large = wire.empty((1 << 22, 2), "float32")  # who is done may write again, while another has not read
    large[...] = comm.rank
    ops.barrier(comm)
    y, counts = np.empty((1 << 22, 2), np.float32), [0, 0, 0] if comm.rank == 0 else [1 << 22, 0, 0]
    wire.pull("pull", large, [0, 0, 0], counts, y)
    large[...] = 9
    assert comm.rank == 0 or not y.any()
    ops.barrier(comm)
    large[...] = comm.rank
    time.sleep(comm.rank * 0.2)  # each reads later than the one before
    total = ops.all_reduce(large, comm)
    large[...] = 9
    assert total[0, 0] == total[-1, -1] == 3
    total[...] = 9
    time.sleep((2 - comm.rank) * 0.2)
    large[...] = comm.rank
    total = ops.all_reduce(large, comm)
    kept = total.copy()
    total[...] = 9
    assert kept.min() == kept.max() == 3
    del total, kept
    assert wire.empty((1,), "int8") is not None
    part = comm.group([0, 2])
    if part:
        assert ops.all_reduce(np.full((1, 1), 1.0 + comm.rank, np.float32), part).tolist() == [[4.0]]
print("done", len(os.listdir("/proc/self/fd")))
"""


def test_memory_is_lent_used_again_and_has_no_name():
    found = ran(3, ["-c", PROGRAM])
    assert [(code, out[:4], err) for code, out, err in found] == [(0, "done", "")] * 3
