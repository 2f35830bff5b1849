"""What every vendor's adapter owes, whatever its chip."""

from __future__ import annotations

import inspect
import types

import pytest

from porthal.backends.torch import collectives
from porthal.backends.torch.interfaces.library import Library
from porthal.hal import Backend, NotClaimed, contracts

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
