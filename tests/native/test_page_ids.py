"""Ids of pages at the very end of what the cpu backend's kernels take."""

from __future__ import annotations

import numpy as np
import pytest

try:
    from porthal.backends.cpu import _native as native
except ImportError as error:
    pytest.skip(f"the native module is not built ({error}); run `pip install .`", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("isa")


def test_a_page_behind_the_last_is_refused():
    """Its memory is there, and no page of this cache."""
    rows, size, width = 2, 4, 8
    held = np.ones((3 * size, width), np.float32)
    keys, table, cu_q, ones = held[: 2 * size], np.int32([[0, 1]]), np.int32([0, rows]), np.ones((rows, 1, width), np.float32)
    visible, weights, y = np.int32([7, 8]), np.ones((rows, 1), np.float32), np.zeros((rows, 2 * size), np.float32)
    best = np.zeros((rows, 3), np.int32)  # fewer than there are, which would be chosen without a look at them
    picks = np.tile(np.arange(8, dtype=np.int32), (rows, 1))
    for call in (
        lambda: native.indexer_scores(ones, weights, keys, None, visible, cu_q, table, size, 1.0, y),
        lambda: native.indexer_topk(ones, weights, keys, None, visible, cu_q, table, size, 1.0, 3, best),
        lambda: native.sparse_mla(ones, ones, keys, None, 0, keys, picks, visible, cu_q, table, size, 1.0, ones.copy()),
    ):
        call()
        table[0, 1] = 2
        with pytest.raises(ValueError, match=r"^block_table has page 2 at \[0, 1\], expected 0 to 1\.$"):
            call()
        table[0, 1] = 1
