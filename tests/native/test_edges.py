"""Values and indices at the very edge of what the cpu backend's kernels take."""

from __future__ import annotations

import numpy as np
import pytest

try:
    from porthal.backends.cpu import _native as native
except ImportError as error:
    pytest.skip(f"the native module is not built ({error}); run `pip install .`", allow_module_level=True)

from tests.native.test_native_kernels import topk, topk_exact

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("k", [1, 8, 300])
def test_topk_of_rows_in_which_nan_and_the_threshold_meet(dtype, k):
    """In a long row, the threshold is guessed from 64 runs of 16 scores. It is -inf where these are, which NaN counts as; and
    too high where all that is great lies in these runs: NaN must not count among what reaches it."""
    n, at = 20000, np.arange(20000)
    runs = at % ((n - 16) // 63) < 16
    for row in (
        np.where(at < n // 2, np.nan, -np.inf),
        np.where(at % 2, -np.inf, np.nan),
        np.where(at % 3, np.nan, -1.0),
        np.where(runs & (at % 16 < 12), 9.0, np.where(at % 2, at / n, np.nan)),
        np.where(runs & (at < 4 * k), 9.0, np.where(at % 2, np.nan, -at / n)),
    ):
        scores = row[None].astype(dtype)
        assert np.array_equal(topk(scores, [n], k), topk_exact(scores, [n], k))


def test_a_page_behind_the_last_is_refused():
    """Its memory is there, and no page of this cache."""
    rows, size, width = 2, 4, 8
    held = np.ones((3 * size, width), np.float32)
    keys, table, cu_q, ones = held[: 2 * size], np.int32([[0, 1]]), np.int32([0, rows]), np.ones((rows, 1, width), np.float32)
    visible, weights, y = np.int32([7, 8]), np.ones((rows, 1), np.float32), np.zeros((rows, 2 * size), np.float32)
    best = np.zeros((rows, 3), np.int32)  # fewer than there are, which would be chosen without a look at them
    picks = np.tile(np.arange(8, dtype=np.int32), (rows, 1))
    calls = {
        "indexer_scores": lambda: native.indexer_scores(ones, weights, keys, visible, cu_q, table, size, 1.0, y),
        "indexer_topk": lambda: native.indexer_topk(ones, weights, keys, visible, cu_q, table, size, 1.0, 3, best),
        "sparse_mla": lambda: native.sparse_mla(ones, ones, keys, keys, picks, visible, cu_q, table, size, 1.0, ones.copy()),
    }
    for call in calls.values():
        call()
        table[0, 1] = 2
        with pytest.raises(ValueError, match=r"^block_table has page 2 at \[0, 1\], expected 0 to 1\.$"):
            call()
        table[0, 1] = 1
