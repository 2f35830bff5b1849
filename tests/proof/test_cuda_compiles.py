"""Every kernel of CUDA compiles for four chips that are not here, in each configuration, and takes what these have at most.

Without Triton nothing is collected, so that an earlier result stays what it is.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

PROVES = ("backends/cuda",)
KERNELS = Path(__file__).resolve().parents[2] / "backends" / "cuda" / "kernels"

if find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install --no-deps triton==3.7.1", allow_module_level=True)


CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def compilers():
    """One process per chip, side by side."""
    command = [sys.executable, "-m", "porthal.backends.cuda.aot"]
    return {chip: Popen([*command, chip], stdout=PIPE, stderr=PIPE, text=True) for chip in CHIPS}


@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_compiles_and_fits(compilers, chip):
    printed, errors = compilers[chip].communicate()
    assert compilers[chip].returncode == 0, errors[-3000:]
    rows = [json.loads(line) for line in printed.splitlines()]
    assert not [row for row in rows if row["breach"]]
    written = {name for file in KERNELS.glob("*.py") for name in re.findall(r"launch\(\s*(_\w+)", file.read_text())}
    assert len(written) > 15 and {row["kernel"] for row in rows} == written
    assert max(row["registers"] for row in rows) > 128 and max(row["shared"] for row in rows) > 32 << 10
