"""These tests need a process of their own: they put modules of Kunlunxin's names where imports find them."""

import pytest
import torch

from porthal.backends.kunlunxin import emulated


@pytest.fixture(scope="session", autouse=True)
def kunlun_ops():
    return emulated.install()


@pytest.fixture(scope="session")
def xspeedgate_ops(kunlun_ops):
    return torch.ops.xspeedgate_ops


@pytest.fixture(autouse=True)
def fresh_counts():
    emulated.calls.clear()
    torch.manual_seed(0)
