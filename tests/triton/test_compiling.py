"""A kernel is compiled for chips that are not here, and what it takes too much of is told. All of them: tests/proof."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

SCRIPT = """
import json
from dataclasses import asdict
from porthal.backends.cuda import aot
aot.calls = lambda b: iter([b.silu_mul(b.empty((8, 4096), "bfloat16"))])
print(json.dumps([asdict(kernel) for chip in aot.CHIPS for kernel in aot.compiled(chip)]))
"""


def test_a_kernel_compiles_for_every_chip():
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=compiling, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert [kernel["chip"] for kernel in found] == ["sm_80", "sm_90", "sm_100", "gfx942"]
    assert all(kernel["kernel"] == "_silu_mul" and 8 <= kernel["registers"] <= 64 for kernel in found)


def test_what_a_kernel_takes_too_much_of_is_told(cuda):
    from porthal.backends.cuda.aot import Compiled

    good = Compiled("gfx942", "_kernel", "", shared=65536, registers=512, spilled=32)
    assert good.breach() is None
    assert replace(good, shared=65537).breach() == "65537 bytes of shared memory, expected at most 65536"
    assert replace(good, chip="sm_90").breach() == "512 registers, expected at most 255"
    assert replace(good, spilled=33).breach() == "33 bytes of spilled registers, expected at most 32"
