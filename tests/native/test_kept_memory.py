"""What kernels of the cpu backend keep from one call to the next, and give back: no call sees what another one left."""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

try:
    from porthal.backends.cpu import _native as native
except ImportError as error:
    pytest.skip(f"the native module is not built ({error}); run `pip install .`", allow_module_level=True)

BF16 = np.dtype(ml_dtypes.bfloat16)


def packed(w, gated=False):
    made = native.Packed(*w.shape, w.dtype, gated)
    for e, matrix in enumerate(w):
        made.set(e, matrix)
    return made


def ones(*shape):
    return np.ones(shape, BF16)


@pytest.mark.parametrize("rows", [1, 7, 13, 30])
def test_rows_of_odd_depth_are_padded_with_zeros(isa, rows):
    """Pairs of bfloat16 are multiplied at once; a longer row of NaN lay before where the last pair of each row is made."""
    y = np.zeros((rows, 40), np.float32)
    native.linear(np.full((rows, 130), np.nan, BF16), packed(ones(1, 40, 130)), y)
    assert np.isnan(y).all()
    native.linear(ones(rows, 129), packed(ones(1, 40, 129)), y)
    assert (y == 129).all()


@pytest.mark.parametrize("rows", [1, 7, 30])
def test_experts_of_odd_width_are_padded_with_zeros(isa, rows):
    """The same of what is between the two products of an expert, and of the rows that go into it."""
    ids, mix = np.zeros((rows, 1), np.int32), np.ones((rows, 1), np.float32)
    silu = 4 / (1 + np.exp(-4.0))
    for hidden, inner, x in ((4, 20, np.nan), (4, 19, 1.0), (6, 20, np.nan), (5, 20, 1.0)):
        w13 = packed(np.repeat(np.float32([4 / hidden, 1 / hidden]), inner)[None, :, None].repeat(hidden, 2).astype(BF16), True)
        y = ones(rows, hidden)
        native.moe_experts(np.full((rows, hidden), x, BF16), ids, mix, w13, packed(ones(1, hidden, inner)), 0, False, y)
        np.testing.assert_allclose(y.astype(np.float64), np.full(y.shape, x * inner * silu), rtol=0.02)


def test_a_request_with_few_keys_gets_none_of_the_last_call(isa, threads):
    """With more than one thread, ranges of positions have candidates of their own, as many as the longest request needs."""
    threads(2)
    size, pages, k, width = 16384, 4, 8, 64

    def chosen(lengths, values):
        keys = np.repeat(np.float32(values), size)[:, None] * np.ones(width, np.float32)
        iq, w = np.ones((2, 1, width), np.float32), np.ones((2, 1), np.float32)
        table, indices = np.int32([[0, 1], [2, 3]]), np.full((2, k), 77, np.int32)
        native.indexer_topk(iq, w, keys, None, np.int32(lengths), np.int32([0, 1, 2]), table, size, 1.0, k, indices)
        return indices

    assert chosen([pages * size // 2] * 2, [1, 2, 3, 9]).tolist() == [list(range(size, size + k))] * 2
    assert chosen([pages * size // 2, 100], [1, 2, 3, 4]).tolist() == [list(range(size, size + k)), list(range(k))]


def test_weights_give_their_memory_back():
    def held():
        """Bytes of address space: those of weights that nobody has touched count as well."""
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")

    size = 2**28
    native.Packed(1, 64, 64, BF16)
    before = held()
    kept = native.Packed(1, 2**13, 2**14, BF16)
    assert kept.nbytes == size <= held() - before
    for _ in range(3):
        native.Packed(1, 2**13, 2**14, BF16)
    assert held() - before < 1.5 * size
    del kept
    assert held() - before < 0.5 * size
