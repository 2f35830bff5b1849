"""Why Ascend is not here, or cannot be used: one reason each, without importing torch_npu."""

import importlib.metadata
import sys

import pytest

from porthal.backends import ascend
from porthal.backends.torch import probing
from porthal.hal import Probe


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """One with two NPUs and all that torch_npu needs; tests take something away."""
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    for name in ("davinci0", "davinci1", "davinci_manager", ascend.RUNTIME):
        (tmp_path / name).touch()
    monkeypatch.setattr(ascend, "DEVICES", tmp_path)
    monkeypatch.setattr(ascend, "LIBRARIES", tmp_path / "ld.so.cache")
    monkeypatch.setenv("LD_LIBRARY_PATH", f":{tmp_path}")
    monkeypatch.delenv(ascend.VISIBLE, raising=False)
    versions = {"torch": "2.9.0+cpu", "torch_npu": "2.9.0.post2"}
    monkeypatch.setattr(ascend, "version", versions.__getitem__)
    monkeypatch.setattr(probing, "OUT_OF_TREE", ("torch_npu",))
    return tmp_path, versions


def test_all_is_there(machine):
    assert ascend.probe() == Probe("available")


def test_no_device_files(machine):
    folder, _ = machine
    (folder / "davinci0").unlink()
    (folder / "davinci1").unlink()
    assert ascend.probe() == Probe("not here", f"there is no {folder}/davinci0")
    (folder / "vdavinci100").touch()
    assert ascend.probe().state == "available"


@pytest.mark.parametrize("shown", ["", "none"])
def test_devices_are_hidden(machine, monkeypatch, shown):
    monkeypatch.setenv(ascend.VISIBLE, shown)
    why = f"ASCEND_RT_VISIBLE_DEVICES is {shown!r}, which shows no device: unset it, or name some as 0,1"
    assert ascend.probe() == Probe("not here", why)
    monkeypatch.setenv(ascend.VISIBLE, "1")
    assert ascend.probe().state == "available"


def test_the_runtime_is_missing(machine):
    folder, _ = machine
    (folder / ascend.RUNTIME).unlink()
    why = "the loader finds no libascendcl.so: source set_env.sh of CANN's toolkit first"
    assert ascend.probe() == Probe("broken", why)
    ascend.LIBRARIES.write_bytes(b"\0libascendcl.so\0/usr/lib/libascendcl.so\0")
    assert ascend.probe().state == "available"


def test_another_torch(machine, monkeypatch):
    _, versions = machine
    versions["torch"] = "2.13.0+cpu"
    assert ascend.probe() == Probe("broken", "torch_npu 2.9.0.post2 is for torch 2.9, this is 2.13.0+cpu")

    def unknown(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(ascend, "version", unknown)  # built by hand, without metadata
    assert ascend.probe().state == "available"


def test_two_vendors(machine, monkeypatch):
    monkeypatch.setattr(probing, "OUT_OF_TREE", ("torch_npu", "torch_musa", "json"))
    why = "json is installed as well, and PyTorch takes one vendor's device per process: remove one"
    assert ascend.probe() == Probe("broken", why)
