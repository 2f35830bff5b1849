"""Whether CUDA is here is one sentence each time, without importing PyTorch."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from porthal.backends import cuda as package
from porthal.hal import Probe, Unavailable


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A driver that is loaded, and no interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27\n")
    monkeypatch.setattr(package, "DRIVER", file)
    monkeypatch.setattr(package.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    return file


def test_without_a_driver(driver, monkeypatch):
    driver.unlink()
    assert package.probe() == Probe("not here", f"there is no {driver}: NVIDIA's driver is not loaded")


def test_with_a_driver_and_before_pytorch_is_imported(driver):
    assert package.probe() == Probe("available")


@pytest.mark.parametrize(("layer", "chip"), [("torch_xmlir", "kunlunxin"), ("torch_musa", "moore_threads")])
def test_on_another_vendor_s_layer(driver, monkeypatch, layer, chip):
    monkeypatch.setattr(package.importlib.util, "find_spec", lambda name: object() if name == layer else None)
    answer = package.probe()
    assert answer.state == "not here" and layer in answer.why and answer.why.endswith(f"use backend {chip!r}")


@pytest.mark.parametrize(
    ("cuda", "here", "state", "said"),
    [
        (None, False, "broken", "PyTorch 2.13.0 is built without CUDA: install a build for CUDA"),
        ("13.0", False, "broken", "finds no GPU with driver 470.82.01: it needs one for CUDA 13.0"),
        ("13.0", True, "available", ""),
    ],
)
def test_what_pytorch_says(driver, monkeypatch, cuda, here, state, said):
    version, module = SimpleNamespace(cuda=cuda), SimpleNamespace(is_available=lambda: here)
    torch = SimpleNamespace(__version__="2.13.0", version=version, cuda=module)
    monkeypatch.setitem(sys.modules, "torch", torch)
    answer = package.probe()
    assert answer.state == state and said in answer.why


def test_a_cache_that_cannot_be_written_is_named(cuda, tmp_path, monkeypatch):
    from porthal.backends.cuda.own import closed_cache

    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "new" / "cache"))
    assert closed_cache() is None
    monkeypatch.setenv("TRITON_CACHE_DIR", str(file / "cache"))
    assert closed_cache() == file / "cache"


@pytest.fixture
def gpu(cuda, monkeypatch):
    """A class that takes a CPU for a GPU, and a function that says of what compute capability."""
    import torch

    from porthal.backends.cuda.own import Own
    from porthal.backends.torch.backend import Torch

    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(Torch, "__init__", lambda self, device: setattr(self, "device", device))

    def of(name, major, minor):
        found = SimpleNamespace(name=name, major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        return Own

    return of


def test_a_gpu_before_ampere_is_refused(gpu):
    with pytest.raises(Unavailable) as refused:
        gpu("Tesla V100", 7, 0)("1")
    assert str(refused.value) == (
        "Tesla V100 has compute capability 7.0: the kernels need 8.0 (A100) or later; use backend 'torch:cuda:1'"
    )


def test_a_gpu_without_a_cache_that_can_be_written_is_refused(gpu, tmp_path, monkeypatch):
    (file := tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(file))
    with pytest.raises(Unavailable) as refused:
        gpu("NVIDIA H200", 9, 0)()
    assert str(refused.value) == f"Triton cannot write its cache to {file}: set TRITON_CACHE_DIR to a folder of your own"
