"""Every mistake planted in an adapter is noticed by a case of its op, at bring-up, and the adapter as it is passes them."""

import importlib
import subprocess
import sys

import pytest

PROVES = (
    "backends/moore_threads",
    "backends/cambricon",
    "backends/kunlunxin",
    "backends/torch/interfaces",
    "backends/torch/vendor.py",
    "tests/planted",
    "tests/planted_adapters.py",
)
PROGRAM = "import sys; from tests.planted_adapters import escaped; print(*escaped(sys.argv[1]), sep=chr(10), end='')"


@pytest.mark.parametrize(("vendor", "least"), [("moore_threads", 20), ("cambricon", 25), ("kunlunxin", 18)])
def test_every_mistake_in_an_adapter_is_noticed(vendor, least):
    assert len(importlib.import_module(f"tests.planted.{vendor}").MISTAKES) >= least
    done = subprocess.run([sys.executable, "-c", PROGRAM, vendor], capture_output=True, text=True, timeout=1800)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
