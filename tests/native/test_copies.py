"""What moves rows on the cpu backend: planned batches, pages, and indices that are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

try:
    from porthal.backends.cpu import _native as native
except ImportError as error:
    pytest.skip(f"the native module is not built ({error}); run `pip install .`", allow_module_level=True)

from porthal.hal import Batch, PagesSpec, contracts, create

CPU = create("cpu")


@settings(max_examples=100, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40), st.booleans()), max_size=6),
    block_size=st.integers(1, 17),
)
def test_a_planned_batch_says_what_it_would_find_itself(requests, block_size):
    q_lens = [q for q, _, _ in requests]
    kv_lens = [0 if padded else q + before for q, before, padded in requests]
    tables = [range(7 * r, 7 * r - (-n // block_size)) for r, n in enumerate(kv_lens)]
    alone, planned = (Batch.build(q_lens, kv_lens, tables, block_size) for _ in range(2))
    planned = CPU.plan(planned)
    for name in ("positions", "visible", "slots"):
        mine, its = vars(planned)[name], getattr(alone, name)
        assert mine.dtype == its.dtype and np.array_equal(mine, its), name


@settings(max_examples=50, deadline=None)
@given(data=st.data(), block_size=st.integers(1, 5), pages=st.integers(1, 8), joint=st.booleans())
def test_pages_are_copied_as_they_were_before_the_call(data, block_size, pages, joint):
    targets = data.draw(st.lists(st.integers(0, pages - 1), unique=True))
    sources = data.draw(st.lists(st.integers(0, pages - 1), min_size=len(targets), max_size=len(targets)))
    held = np.random.default_rng(1).standard_normal((pages * block_size, 7)).astype(np.float32)
    field = held[:, 2:5] if joint else held  # of a cache whose fields share a row
    expected = field.reshape(pages, block_size, -1).copy()
    expected[targets] = expected[sources]
    beside = held[:, :2].copy()
    native.page_copy(field, np.int32(sources), np.int32(targets), block_size)
    assert np.array_equal(field.reshape(expected.shape), expected)
    assert np.array_equal(held[:, :2], beside if joint else field[:, :2])


def test_indices_out_of_range_are_refused_and_nothing_is_written():
    x, y = np.ones((3, 4), np.float32), np.full((2, 4), 7, np.float32)
    pages = CPU.alloc_pages(PagesSpec((("c", 4),), "float32", 2, 2))
    field, rows = pages["c"], np.ones((2, 4), np.float32)
    for call, words in [
        (lambda: native.take_rows(x, np.int32([0, 3]), y), r"rows\[1\] is 3, expected -1 to 2\."),
        (lambda: native.take_rows(x, np.int32([-2, 0]), y), r"rows\[0\] is -2, expected -1 to 2\."),
        (lambda: native.embedding(np.int32([0, -1]), x, y), r"ids\[1\] is -1, expected 0 to 2\."),
        (lambda: native.kv_write(field, np.int64([0, 4]), rows), r"slots\[1\] is 4, expected -1 to 3\."),
        (lambda: native.kv_write(field, np.int64([-2, 0]), rows), r"slots\[0\] is -2, expected -1 to 3\."),
        (lambda: native.page_copy(field, np.int32([2]), np.int32([0]), 2), r"source\[0\] is 2, expected 0 to 1\."),
        (lambda: native.page_copy(field, np.int32([0]), np.int32([-1]), 2), r"target\[0\] is -1, expected 0 to 1\."),
        (lambda: native.page_copy(field, np.int32([0]), np.int32([1]), 3), r"block_size is 3, expected a divisor of 4 slots\."),
        (lambda: native.moe_unpermute(y, np.int32([0, 2]), np.ones((1, 2), np.float32), y[:1]),
         r"source\[1\] is 2, expected -1 to 1\."),
        (lambda: native.moe_route(x, x[0], 5, 1.0, 1, 1, np.zeros((3, 5), np.int32), np.zeros((3, 5), np.float32)),
         "k is 5, expected 1 to 4"),
        (lambda: native.rope(x[None], np.int32([0]), 1e4, True, 2, 4, x[None].copy()),
         "start and width are 2 and 4, expected an even slice of 4"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
    assert (y == 7).all() and not field.any()


def test_rotation_at_far_positions_is_that_of_the_contract():
    rng = np.random.default_rng(3)
    for position in (0, 1, 200_000, 2**31 - 1):
        batch = Batch(np.int32([0, 1]), np.int32([1]), np.zeros((1, 1), np.int32), 1)
        vars(batch).update(positions=np.int32([position]), visible=np.int32([1]), slots=np.int64([0]))
        x, attrs = rng.standard_normal((1, 3, 32)), {"theta": 1e6, "start": 6, "width": 22}
        for layout in ("interleaved", "half"):
            exact = contracts()["rope"].reference(x.astype(np.float32).astype(np.float64), batch, layout=layout, **attrs)
            found = CPU.rope(x.astype(np.float32), batch, layout=layout, **attrs)
            np.testing.assert_allclose(found, exact, atol=2e-6)
