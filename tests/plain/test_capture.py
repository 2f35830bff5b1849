"""What `into` keeps and refuses, and what a backend without graphs says; captured calls themselves are in tests/torch."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porthal.backends.reference.backend import Reference
from porthal.hal import Batch, NotClaimed, Pages, PagesSpec, Unavailable, UsageError, WeightSpec, bind

SIZE = 4  # slots per page


def batch(q_lens, kv_lens, extra=0):
    """Requests on pages of their own, in tables that are wider than needed."""
    pages = iter(range(10**6))
    tables = [[next(pages) for _ in range(-(-n // SIZE) + extra)] for n in kv_lens]
    return Batch.build(q_lens, kv_lens, tables, SIZE)


requests = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), max_size=5)


@given(requests, requests, st.integers(0, 2))
def test_a_padded_batch_is_the_same_batch_and_requests_without_keys(first, second, extra):
    mine, room = (batch([q for q, _ in r], [max(q, n) if n else 0 for q, n in r], e) for r, e in ((first, 0), (second, extra)))
    fits = all(a <= b for a, b in zip(shape(mine), shape(room))) and (mine.T == room.T or mine.R < room.R)
    if not fits:
        with pytest.raises(UsageError, match=r"^the batch has \d+ .*"):
            mine.within(room)
        return
    padded = mine.within(room)
    assert (padded.T, padded.R, padded.block_table.shape) == (room.T, room.R, room.block_table.shape)
    for name in ("slots", "positions", "visible", "row_request"):
        np.testing.assert_array_equal(getattr(padded, name)[: mine.T], getattr(mine, name))
    assert not padded.visible[mine.T :].any() and (padded.slots[mine.T :] == -1).all()
    assert np.ptp(padded.q_len[mine.R :]) <= 1 if mine.R < room.R else True  # shared evenly


def shape(b):
    return b.T, b.R, b.block_table.shape[1], b.max_kv


@pytest.mark.parametrize(
    ("q_lens", "kv_lens", "extra", "sentence"),
    [
        ([1, 1, 2], [5, 3, 4], 0, r"^the batch has 4 query rows, expected at most 3: plan one with room for more$"),
        ([1, 0, 1, 1], [5, 3, 4, 1], 0, r"^the batch has 4 requests, expected at most 3: "),
        ([1, 1, 1], [5, 3, 4], 1, r"^the batch has 3 table columns, expected at most 2: "),
        ([1, 1, 1], [8, 3, 4], 0, r"^the batch has 8 keys of a request, expected at most 7: "),
        ([1, 0, 1], [5, 3, 4], 0, r"^the batch has 2 query rows and no room for a request that pads them to 3$"),
    ],
)
def test_more_than_was_planned_is_refused_in_one_sentence(q_lens, kv_lens, extra, sentence):
    ops = bind(backend=Reference())
    planned = ops.plan(batch([1, 1, 1], [7, 3, 4]))
    with pytest.raises(UsageError, match=sentence):
        ops.plan(batch(q_lens, kv_lens, extra), into=planned)


def test_other_pages_are_refused():
    with pytest.raises(UsageError, match=r"^the batch has block_size 8, expected 4 as it was planned$"):
        Batch.build([1], [1], [[0]], 8).within(batch([1], [1]))


def test_new_values_lie_in_the_memory_that_is_given_and_fit_it():
    ops = bind(backend=Reference())
    x = ops.from_numpy(np.zeros((2, 3), np.float32))
    assert ops.from_numpy(np.ones((2, 3), np.float32), into=x) is x and x.all()
    for other in (np.ones((1, 3), np.float32), np.ones((2, 3), np.float64), np.ones(3, np.float32)):
        with pytest.raises(UsageError, match=r"^reference cannot write .* into the memory of \(\(2, 3\), 'float32'\): "):
            ops.from_numpy(other, into=x)
    spec = PagesSpec((("a", 2),), "float32", 2, SIZE)
    pages = ops.alloc_pages(spec)
    field = pages["a"]
    assert ops.from_logical(spec, {"a": np.ones((8, 2), np.float32)}, into=pages)["a"] is field and field.all()
    with pytest.raises(UsageError, match="into the memory of PagesSpec"):
        ops.from_logical(PagesSpec((("a", 2),), "float32", 3, SIZE), {"a": np.ones((12, 2), np.float32)}, into=pages)
    weight = ops.prepare(WeightSpec("linear", "w", (2, 3), "float32"), np.ones((2, 3), np.float32).__getitem__)
    with pytest.raises(UsageError, match="into the memory of WeightSpec"):
        ops.prepare(WeightSpec("linear", "w", (1, 3), "float32"), np.ones((1, 3), np.float32).__getitem__, into=weight)
    assert isinstance(pages, Pages)


def test_a_backend_without_graphs_says_so():
    assert not Reference().captures
    with pytest.raises(NotClaimed, match=r"^reference captures no graphs: call what was to be captured each time$"):
        bind(backend=Reference()).capture(lambda: None)


class Graphs(Reference):
    """Captures by remembering the callable; what it holds of its own is kept."""

    def capture(self, run):
        run()
        return run


def test_nothing_crosses_while_a_graph_is_captured_and_all_does_afterwards():
    backend = Graphs()
    ops, x = bind(backend=backend), np.zeros((1, 2), np.float32)
    own = backend.to_numpy = lambda x: np.asarray(x) + 1
    for name, service in {"to_numpy": ops.to_numpy, "from_numpy": ops.from_numpy}.items():
        with pytest.raises(UsageError, match=rf"^reference captures a graph, in which {name} cannot be repeated: copy"):
            ops.capture(partial(service, x))
    assert backend.to_numpy is own and "from_numpy" not in vars(backend)
    assert ops.capture(lambda: ops.add(x, x + 1))().tolist() == [[1, 1]]


def test_a_capture_that_gives_nothing_is_refused():
    class Nothing(Graphs):
        def capture(self, run):
            run()

    with pytest.raises(Unavailable, match=r"^reference: capture returned None$"):
        bind(backend=Nothing()).capture(lambda: None)
