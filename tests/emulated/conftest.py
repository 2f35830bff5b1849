"""These tests need a process of their own (`pytest tests/emulated`): torch takes one vendor device per process."""

import pytest
import torch

from porthal.backends.ascend import emulated as ascend
from porthal.backends.torch.emulation import device


@pytest.fixture(scope="session", autouse=True)
def torch_npu():
    return ascend.install()


@pytest.fixture(autouse=True)
def fresh_counts(torch_npu):
    torch.npu.config.allow_internal_format = True
    device.copies.reset()
    ascend.calls.clear()
    torch.manual_seed(0)
