"""At a context of 16,384 tokens of GLM-5's size the torch backend's attention takes no more memory than at 4,096."""

import pytest

from tests.memory import attention_over

PROVES = ("backends/torch/backend.py", "backends/torch/ranking.py", "ops/sparse_mla.py", "ops/topk.py", "tests/memory.py")


def test_attention_at_full_size_stays_within_the_stated_memory(capsys: pytest.CaptureFixture[str]) -> None:
    for found in attention_over(16384):
        with capsys.disabled():
            print(f"\n{found}")
        assert found.within
