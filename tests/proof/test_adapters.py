"""The adapters of chips other than Ascend: text of the demo checkpoint, and mistakes planted in them, all of which are noticed.

PyTorch takes one vendor's device per process, so that each vendor has processes of its own.
"""

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
ESCAPED = "from tests.planted_adapters import escaped; print(*escaped(sys.argv[1]), sep=chr(10), end='')"
TEXT = """
from importlib import import_module
emulated = import_module(f"porthal.backends.{sys.argv[1]}.emulated")
emulated.install()
from tests import demo
assert demo.text(sys.argv[1], "float32") == demo.text("reference", "float32")
assert demo.text(sys.argv[1], "float32", speculative=3) == demo.text("reference", "float32")
assert demo.explained(sys.argv[1], "bfloat16")
assert emulated.calls[sys.argv[2]] > 0
"""
ATTENTION = {
    "moore_threads": "flash_mla_sparse_fwd", "cambricon": "single_query_cached_kv_attn", "kunlunxin": "fwd_kvcache_mla"
}  # fmt: skip


def run(program, *arguments):
    """What a process of its own prints, and that it ended well."""
    command = [sys.executable, "-c", f"import sys\n{program}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("vendor", "attention"), ATTENTION.items())
def test_text_is_the_references_by_the_vendors_attention(vendor, attention):
    assert run(TEXT, vendor, attention) == ""


@pytest.mark.parametrize(("vendor", "least"), [("moore_threads", 20), ("cambricon", 25), ("kunlunxin", 18)])
def test_every_mistake_in_an_adapter_is_noticed(vendor, least):
    assert len(importlib.import_module(f"tests.planted.{vendor}").MISTAKES) >= least
    assert run(ESCAPED, vendor) == ""
