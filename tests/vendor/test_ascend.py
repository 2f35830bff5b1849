"""The vendor's own torch_npu on stubs and the emulated device: the same schemas, results of the same form, the same errors.

Run by `make vendor-ascend`, which needs PyPI and gcc.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from porthal.backends.ascend import emulated
from tests.vendor import ascend_calls, ascend_stub

pytestmark = pytest.mark.skipif(
    not (ascend_stub.MADE / "libopapi.so").exists(),
    reason="the vendor's torch_npu was not run: `make vendor-ascend` installs it into build/vendor, and needs PyPI and gcc",
)


@cache
def ran(where: str) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, ascend_calls.__file__, where]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_no_report_takes_the_stubs_for_hardware():
    assert ran("vendor")["place"] == "vendor package on a stub runtime"
    assert ran("emulated")["place"] == "emulated device"


def test_the_stand_in_has_the_vendors_schemas():
    theirs = ran("vendor")["schemas"]
    assert len(emulated.SCHEMAS) >= 20
    for schema in emulated.SCHEMAS:
        assert "npu::" + schema in theirs, schema


@pytest.mark.parametrize("token", ascend_calls.TOKENS)
def test_results_of_a_kernel_and_of_its_calls_have_the_vendors_form(token):
    theirs, ours = (ran(where)["contracts"][token] for where in ("vendor", "emulated"))
    assert theirs["own"] and ours["own"]
    assert ours == theirs


def test_wrong_calls_raise_what_the_vendor_raises():
    theirs = ran("vendor")["errors"]
    assert "no error" not in theirs.values()
    assert ran("emulated")["errors"] == theirs


def test_matrices_lie_in_tiles_where_the_fused_calls_ask_for_them():
    formats = {"q_a of mla_prolog, none": "FRACTAL_NZ", "w_uk of mla_prolog, none": "ND", "w13 of moe_experts, none": "ND"}
    assert ran("vendor")["formats"] == formats | {"w13 of moe_experts, int8_channel": "FRACTAL_NZ"}
