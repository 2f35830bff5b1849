"""Why a vendor's device is not here, in one sentence each, without its package."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types

import pytest

from porthal.backends.torch import probing

VENDORS = {
    "moore_threads": ("torch_musa", "mtgpu.0", "MUSA_VISIBLE_DEVICES"),
    "cambricon": ("torch_mlu", "cambricon_dev0", "MLU_VISIBLE_DEVICES"),
    "kunlunxin": ("torch_xmlir", "xpu0", "XPU_VISIBLE_DEVICES"),
}


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    monkeypatch.setattr(probing, "DEVICES", tmp_path)
    for _, _, variable in VENDORS.values():
        monkeypatch.delenv(variable, raising=False)


def ask(vendor):
    return importlib.import_module(f"porthal.backends.{vendor}").probe()


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_driver_that_is_not_there(vendor, tmp_path):
    found = ask(vendor)
    assert found.state == "not here"
    assert found.why.startswith(f"there is no {tmp_path}/") and found.why.endswith("the container was not given a device")


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_device_file_is_enough_where_the_package_is_not_loaded(vendor, tmp_path):
    (tmp_path / VENDORS[vendor][1]).touch()
    assert ask(vendor).state == "available"


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("hidden", ["", "-1"])
def test_devices_that_a_variable_hides(vendor, hidden, tmp_path, monkeypatch):
    (tmp_path / VENDORS[vendor][1]).touch()
    monkeypatch.setenv(VENDORS[vendor][2], hidden)
    assert ask(vendor) == probing.Probe("not here", f"{VENDORS[vendor][2]}={hidden!r} hides every device")


@pytest.mark.parametrize("vendor", ["moore_threads", "cambricon"])
def test_two_vendors_of_whom_pytorch_takes_one(vendor, tmp_path, monkeypatch):
    (tmp_path / VENDORS[vendor][1]).touch()
    monkeypatch.setattr(probing.importlib.util, "find_spec", lambda name: object() if name == "torch_npu" else None)
    found = ask(vendor)
    assert found.state == "broken"
    assert found.why == "torch_npu is installed as well, and PyTorch takes one vendor's device per process: remove one"


@pytest.mark.parametrize(("count", "state"), [(0, "not here"), (2, "available")])
def test_a_loaded_package_is_asked(count, state, monkeypatch):
    xpu = types.SimpleNamespace(device_count=lambda: count)
    monkeypatch.setitem(sys.modules, "torch_xmlir", types.SimpleNamespace(xpu=xpu))
    assert ask("kunlunxin").state == state


def test_listing_backends_imports_no_vendors_package():
    vendors = ["torch", "torch_npu", "torch_musa", "torch_mlu", "torch_xmlir", "mate", "torch_mlu_ops", "kunlun_ops"]
    program = f"import sys, porthal.hal as hal; hal.probes(); print(sorted(set({vendors}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
