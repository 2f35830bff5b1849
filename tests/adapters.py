"""What every vendor's adapter owes, whatever its chip."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import types

import pytest

from porthal.backends.torch import collectives
from porthal.backends.torch.emulation import device
from porthal.backends.torch.interfaces.library import Library
from porthal.hal import Backend, NotClaimed, PagesSpec, Unavailable, contracts, create
from porthal.hal.discovery import running

# Calls of a captured step, one of each kind of kernel.
CAPTURED = (
    "kv_write,T=5,A=512,B=64,pages:bf16,batch=1/70+1/9+1/131+2/150,block_size=64,capture,0",
    "indexer_topk,T=5,G=8,D=128,k=16,scale=0.0156,iq:bf16,batch=1/200+1/9+3/70,block_size=64,capture,0",
    "sparse_mla,T=5,N=8,C=512,R=64,k=16,scale=0.0625,q_latent:bf16,batch=1/70+1/9+1/131+2/150,block_size=64,capture,0",
    "moe_experts,T=5,H=96,I=96,E=8,k=8,x:bf16,capture,0",
)


def unlike_contracts(cls: type[Backend]) -> list[str]:
    """The kernels of a class and its mixins whose names, order, kinds or defaults of arguments are not their contracts'."""
    wrong = []
    for owner in cls.__mro__[: cls.__mro__.index(Backend)]:
        for op in contracts().keys() & vars(owner).keys():
            if (kernel := vars(owner)[op]) is None:
                continue
            given = list(inspect.signature(kernel).parameters.values())[1:]
            wanted = list(inspect.signature(contracts()[op].reference).parameters.values())
            if [(p.name, p.kind, p.default) for p in given] != [(p.name, p.kind, p.default) for p in wanted]:
                wrong.append(f"{owner.__name__}.{op}")
    return wrong


def missing(*modules: str) -> dict[str, str]:
    """What this installation lacks of the calls that kernels make, by function."""
    libraries = [Library.known[module] for module in modules]
    return {name: why for library in libraries for name in library.calls if (why := library.lacks(name))}


def engine_asked_for(chip: Backend, monkeypatch: pytest.MonkeyPatch) -> str:
    """The engine of torch.distributed by which ranks on this chip would move tensors."""

    class Asked(Exception):
        pass

    def asked(engine: str, **_: object) -> None:
        raise Asked(engine)

    monkeypatch.setattr(type(chip), "place", "hardware")  # what is emulated meets by gloo
    with pytest.raises(NotClaimed, match="from the vendor's package alone"):
        chip.communicator()
    alone = types.SimpleNamespace(rank=0, size=1, gather=lambda what, message: [message])
    monkeypatch.setattr(collectives, "joined", lambda timeout, backend: alone)
    monkeypatch.setattr(collectives.dist, "is_backend_available", lambda engine: True)
    monkeypatch.setattr(collectives.dist, "init_process_group", asked)
    with pytest.raises(Asked) as found:
        chip.communicator()
    return str(found.value)


BROKEN = """
import sys
from pathlib import Path
from porthal.backends import ascend
from porthal.backends.torch import probing
from porthal.hal import create
probing.DEVICES = ascend.DEVICES = Path(sys.argv[2])
try:
    create(sys.argv[1])
except Exception as error:
    print(type(error).__name__, error)
"""
LOADED = """
import sys, types
sys.modules[sys.argv[2]] = types.ModuleType(sys.argv[2])
from porthal.hal import create
try:
    create(sys.argv[1], emulated=True)
except Exception as error:
    print(type(error).__name__, error)
"""


class BadInput:
    """A machine that is not as it should be costs one sentence. A subclass names the backend, the package of its device and the
    device's file, a call of a library with the op that it serves, and how many pages are more than there is memory for."""

    backend: str
    package: str
    file: str
    call: tuple[Library, str, str]
    pages = 1024

    def test_a_device_that_is_not_there(self, monkeypatch):
        sees = f"{self.package} sees 1, numbered from 0"
        for number in ("1", "-1", "cpu"):
            with pytest.raises(Unavailable, match=f"^{self.backend} has no device {number!r}: {sees}$"):
                create(f"{self.backend}:{number}")
        variable = type(create(self.backend)).visible
        monkeypatch.setenv(variable, "4")
        with pytest.raises(Unavailable, match=f"numbered from 0, which {variable}=4 shows$"):
            create(f"{self.backend}:1")

    def test_a_package_whose_runtime_is_not_there(self, tmp_path):
        (tmp_path / self.file).touch()
        for name in (self.package, "libascendcl.so"):
            (tmp_path / name).touch() if name.endswith(".so") else (tmp_path / name).mkdir()
        missing = "libruntime.so.4: cannot open shared object file: No such file or directory"
        (tmp_path / self.package / "__init__.py").write_text(f"raise ImportError({missing!r})", encoding="utf-8")
        told = self._told(BROKEN, str(tmp_path), PYTHONPATH=str(tmp_path), LD_LIBRARY_PATH=str(tmp_path))
        start = f"Unavailable backend {self.backend!r} is broken: porthal.backends.{self.backend}: ImportError: {missing}"
        assert told.startswith(start) and told.count("\n") == 1

    def test_an_emulated_one_beside_the_vendors_own(self):
        start = f"Unavailable backend {self.backend!r} cannot be emulated: porthal.backends.{self.backend}.emulated: "
        told = self._told(LOADED, self.package)
        assert told.startswith(f"{start}RuntimeError: {self.package} is already imported; emulate it in a process"), told
        assert told.count("\n") == 1

    def test_a_library_too_old_for_a_call(self, monkeypatch):
        library, name, op = self.call
        monkeypatch.delattr(sys.modules[library.module], name)
        vars(library).pop(name, None)
        [kernel, *_] = [k for k in create(self.backend).candidates(contracts()[op]) if name in k.provider]
        why = create(self.backend).refuses(op, kernel, None)
        assert re.match(rf"^this {library.module}( \S+)? has no {name}", why)

    def test_memory_that_is_used_up(self):
        """Of the emulated device, of which little is left."""
        chip = create(self.backend)
        told = rf"^running on {chip} of porthal\.backends\.{self.backend} failed: .*(out of memory|Unable to allocate)"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(device._memory, "fraction", 1e-9)
            with pytest.raises(Unavailable, match=told), running(chip):
                chip.alloc_pages(PagesSpec((("c", 512),), "bfloat16", self.pages, 64))

    def _told(self, script: str, *given: str, **variables: str) -> str:
        command = [sys.executable, "-c", script, self.backend, *given]
        environment = {**os.environ, **variables}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment).stdout
