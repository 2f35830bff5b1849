"""What the stand-ins of all vendors need: refusals, garbage, and modules whose functions run on an emulated device.

A stand-in computes on host aliases of its arguments: the same memory, so what it writes is seen on the device.
"""

import functools
import importlib.machinery
import math
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from porthal.backends.torch.emulation import device
from porthal.backends.torch.emulation.graphs import recorded

calls: Counter[str] = Counter()
_published: dict[str, types.ModuleType] = {}
_libraries: list[torch.library.Library] = []  # a collected Library unregisters its kernels


def need(ok: bool, op: str, argument: str, value: object, expected: str) -> None:
    """Refuse a call as the vendor does: by a RuntimeError, in one sentence."""
    if not ok:
        raise RuntimeError(f"{op}: {argument} is {value}; expected {expected}.")


def need_given(op: str, **arguments: torch.Tensor | None) -> None:
    for name, tensor in arguments.items():
        need(tensor is not None, op, name, None, "a tensor")


def need_absent(op: str, reason: str, **arguments: object) -> None:
    """None of these, where `reason` says who has no such thing: the product, or the stand-in."""
    for name, value in arguments.items():
        need(value is None, op, name, "given", f"None: {reason}")


def need_dense(op: str, **arguments: torch.Tensor | None) -> None:
    for name, tensor in arguments.items():
        if tensor is not None:
            need(tensor.is_contiguous(), op, f"{name}.stride()", tensor.stride(), "that of a contiguous tensor")


def need_shape(op: str, name: str, tensor: torch.Tensor, shape: Iterable[int]) -> None:
    need(list(tensor.shape) == list(shape), op, f"{name}.shape", list(tensor.shape), str(list(shape)))


def need_rank(op: str, name: str, tensor: torch.Tensor, *ranks: int) -> None:
    need(tensor.dim() in ranks, op, f"{name}.dim()", tensor.dim(), " or ".join(map(str, ranks)))


def need_dtype(op: str, name: str, tensor: torch.Tensor, *dtypes: torch.dtype) -> None:
    need(tensor.dtype in dtypes, op, f"{name}.dtype", tensor.dtype, " or ".join(map(str, dtypes)))


def need_one_of(op: str, name: str, value: object, *allowed: object) -> None:
    need(value in allowed, op, name, repr(value), " or ".join(map(repr, allowed)))


def lengths(op: str, name: str, tensor: torch.Tensor, dtype: torch.dtype = torch.int32) -> list[int]:
    """The numbers of a list on the device, which kernels read there."""
    need_dtype(op, name, tensor, dtype)
    need_rank(op, name, tensor, 1)
    return tensor.tolist()


def garbage(shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
    """What uninitialised memory may hold: NaN, or integers that point nowhere."""
    shape = list(shape)
    if dtype.is_floating_point:
        return torch.full(shape, math.nan, dtype=dtype)
    return torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def highest(values: torch.Tensor, k: int) -> torch.Tensor:
    """Places of the k largest on the last axis, as no vendor promises more: ties from the last place, in no order."""
    best = values.shape[-1] - 1 - values.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :k]
    return best.gather(-1, (best * 40503 % 65521).argsort(dim=-1))


def on_device(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Run a kernel written for host aliases on device tensors, and count the call.

    Tensors elsewhere are refused, nothing is copied; an argument that the kernel returns comes back as itself. What the
    vendor's tensors have beside their numbers, such as a storage format, are attributes of the tensors.
    """

    @functools.wraps(kernel)
    @recorded
    def run(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if all(x.is_cpu for x in given):
            raise RuntimeError(f"{name}: every tensor is on the host; expected tensors on the device.")
        where = device.check_same_device(name, given).index
        own: dict[int, torch.Tensor] = {}

        def alias(x: torch.Tensor) -> torch.Tensor:
            host = x if x.is_cpu else device.on_host(x)
            vars(host).update(vars(x))
            own[id(host)] = x
            return host

        def label(x: torch.Tensor) -> torch.Tensor:
            if id(x) in own:
                return own[id(x)]
            made = device.on_device(x, where)
            vars(made).update(vars(x))
            return made

        args, kwargs = tree_map_only(torch.Tensor, alias, (args, kwargs))
        return tree_map_only(torch.Tensor, label, kernel(*args, **kwargs))

    return run


def counted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Count the call alone: for a vendor whose modules are emulated and whose device is not, so tensors stay on the CPU."""

    @functools.wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return kernel(*args, **kwargs)

    return run


def define(namespace: str, schemas: Iterable[str], kernels: Mapping[str, Callable[..., Any]],
           key: str = "PrivateUse1") -> dict[str, Any]:
    """The operators of `torch.ops.NAMESPACE` by name: one for each schema, run by the kernel of that name on `key`."""
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    wrap = on_device if key == "PrivateUse1" else counted
    made = {}
    for schema in schemas:
        name = library.define(schema)
        library.impl(name, wrap(name, kernels[name]), key)
        made[name] = getattr(getattr(torch.ops, namespace), name)
    return made


def publish(name: str, doc: str | None, members: Mapping[str, Any]) -> types.ModuleType:
    """Put a module where `import name` finds it; RuntimeError if the vendor's own is loaded. A parent goes first."""
    if name not in _published:
        if name in sys.modules:
            raise RuntimeError(f"{name} is already imported; emulate it in a process that has not loaded it.")
        module = types.ModuleType(name, doc)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        module.__dict__.update(members)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(_published[parent], last, module)
        sys.modules[name] = _published[name] = module
    return _published[name]
