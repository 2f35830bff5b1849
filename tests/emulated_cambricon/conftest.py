"""These tests need a process of their own, as torch takes one vendor device in a process."""

import pytest
import torch

from porthal.backends.cambricon import emulated
from porthal.backends.torch.emulation import device


@pytest.fixture(scope="session", autouse=True)
def torch_mlu_ops():
    return emulated.install()


@pytest.fixture(autouse=True)
def fresh_counts():
    device.copies.reset()
    emulated.calls.clear()
    torch.manual_seed(0)
