"""The threads of the cpu backend's kernels: what one of them raises, how many there are, and in a forked child."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

try:
    from porthal.backends.cpu import _native as native
except ImportError as error:
    pytest.skip(f"the native module is not built ({error}); run `pip install .`", allow_module_level=True)

ROWS, WIDTH = 64, 64
SIZE = 1024  # keys of a page


def score(pages):
    """Scores of more than one thread's work, whose requests have one page each."""
    keys, iq = np.ones((SIZE * ROWS, WIDTH), np.float32), np.ones((ROWS, 1, WIDTH), np.float32)
    y = np.zeros((ROWS, SIZE), np.float32)
    visible, cu_q = np.full(ROWS, SIZE, np.int32), np.arange(ROWS + 1, dtype=np.int32)
    native.indexer_scores(iq, np.ones((ROWS, 1), np.float32), keys, None, visible, cu_q, np.int32(pages)[:, None], SIZE, 1.0, y)
    return y


def running():
    """Threads of this process."""
    return len(list(Path("/proc/self/task").iterdir()))


def test_what_a_thread_raises_comes_to_the_caller(threads):
    pages = np.arange(ROWS)
    for count in (2, 3):
        threads(count)
        assert (score(pages) == WIDTH).all()
        with pytest.raises(ValueError, match=r"block_table has page 99 at \[50, 0\], expected 0 to 63"):
            score(np.where(pages == 50, 99, pages))
    assert (score(pages) == WIDTH).all()


def test_there_are_as_many_threads_as_were_asked_for(threads):
    threads(2)
    score(range(ROWS))
    before = running()
    for count in (5, 3, 2):
        threads(count)
        score(range(ROWS))
        for _ in range(3000):  # the kernel takes a thread that has ended out of its list a little later
            if running() == before + count - 2:
                break
            time.sleep(0.001)
        assert running() == before + count - 2


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_as_many_threads_as_its_parent(threads):
    count = len(os.sched_getaffinity(0)) + 2  # which is not what a process begins with
    threads(count)
    score(range(ROWS))
    child = os.fork()
    if child == 0:
        right = native.num_threads() == count and (score(range(ROWS)) == WIDTH).all() and running() == count
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
