"""Emulated devices of every other vendor that may be named: several ordinals, no mixing."""

import pytest

from tests.vendors import two_devices

PROVES = ("backends/torch/emulation", "tests/vendors.py")


@pytest.mark.parametrize("vendor", ["musa", "mlu"])
def test_a_vendor_has_several_ordinals(vendor):
    assert two_devices(vendor) == ("refused\n", "")
