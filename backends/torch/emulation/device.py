"""A vendor's device on the CPU: plain `torch.Tensor`s that say `npu:0`, `musa:0` or `mlu:0`, with no compiler.

Device memory is host memory under another label: a DLPack capsule is relabelled between the host and torch's
out-of-tree device (PrivateUse1), so both labels share storage, strides and offsets. One boxed fallback runs every
aten operator that has no kernel of its own on host aliases. Devices never mix silently, and every copy between host
and device is counted. Arithmetic is the CPU's: this shows how a program uses a device, never how a chip computes.
"""

import ctypes
import functools
import sys
import types
from dataclasses import dataclass
from numbers import Number

import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from porthal.backends.torch.emulation.runtime import PLACE, Event, Memory, Ordinals, make_module

__all__ = ["PLACE", "check_same_device", "copies", "install", "on_device", "on_host"]
_HOST, _DEVICE = 1, 12  # DLPack's kDLCPU and kDLExtDev
_CPU_KEYS = DispatchKeySet(DispatchKey.CPU)
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


@dataclass
class Copies:
    """Transfers since the last `reset`; reading a value or a data-dependent shape on the host counts as one."""

    to_host: int = 0
    to_device: int = 0
    refused: str = ""  # why nothing may be transferred now

    def count(self, to_host: int, to_device: int) -> None:
        if self.refused and (to_host or to_device):
            raise RuntimeError(self.refused)
        self.to_host += to_host
        self.to_device += to_device

    def reset(self) -> None:
        self.to_host = self.to_device = 0


copies = Copies()
_vendor: types.ModuleType | None = None
_ordinals = Ordinals(0)
_memory = Memory()
_libraries: list[torch.library.Library] = []  # a collected Library unregisters its kernels


class _Capsule(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


def _relabel(tensor: torch.Tensor, kind: int, index: int) -> torch.Tensor:
    capsule = torch._C._to_dlpack(tensor.detach())
    head = _Capsule.from_address(_capsule_pointer(capsule, b"dltensor"))
    head.device_type, head.device_id = kind, index
    return torch._C._from_dlpack(capsule)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The host alias of a device tensor: same memory, no copy. For kernels of the emulated chip only."""
    return _relabel(tensor, _HOST, 0)


def on_device(tensor: torch.Tensor, index: int = 0) -> torch.Tensor:
    """The device alias of a host tensor that the emulated chip produced: same memory, no copy, counted as the chip's."""
    made = _relabel(tensor, _DEVICE, index)
    _memory.take(made.untyped_storage(), index)
    return made


def check_same_device(op: str, tensors: list[torch.Tensor]) -> torch.device:
    """The one device of `tensors`; host scalars (rank 0) pass, as on real devices."""
    found = next(t.device for t in tensors if not t.is_cpu)
    for tensor in tensors:
        if tensor.device != found and not (tensor.is_cpu and tensor.dim() == 0):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {op} got {found} and {tensor.device}."
            )
    return found


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    host = torch.empty(size, dtype=dtype, device="cpu", memory_format=memory_format or torch.contiguous_format)
    return on_device(host, _ordinals.index(device))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return on_device(torch.empty_strided(size, stride, dtype=dtype, device="cpu"), _ordinals.index(device))


def _copy_from(source, target, non_blocking=False):
    copies.count(to_host=target.is_cpu, to_device=source.is_cpu)
    host = source if source.is_cpu else on_host(source)
    if not source.is_cpu:  # DLPack drops the lazy conjugate and negative bits
        host = host.conj() if source.is_conj() else host
        host = host._neg_view() if source.is_neg() else host
    (target if target.is_cpu else on_host(target)).copy_(host)
    return target


def _resize_(self, size, *, memory_format=None):
    """Grow in place: relabelled storage has no allocator, so a larger tensor moves to a new storage."""
    stride = torch.empty(size, device="meta").stride()
    needed = self.storage_offset() + functools.reduce(lambda a, b: a * b, size, 1)
    storage = self.untyped_storage()
    if storage.nbytes() < needed * self.element_size():
        grown = _empty([needed], dtype=self.dtype, device=self.device)
        held = storage.nbytes() // self.element_size()
        flat = torch.ops.aten.as_strided.default.redispatch(_CPU_KEYS, self, [held], [1], 0)
        on_host(grown)[:held].copy_(on_host(flat))
        storage = grown.untyped_storage()
    setter = torch.ops.aten.set_.source_Storage_storage_offset
    setter.redispatch(_CPU_KEYS, self, storage, self.storage_offset(), list(size), list(stride))
    return self


@functools.cache
def _facts(op):
    """(is a view, per return the written argument it is or None, names of out= arguments, argument names, those of
    the arguments that must be tensors: boxing hands over a number for a wrapped one, which few operators take back)."""
    schema = op._schema
    names = [a.name for a in schema.arguments]
    strict = not torch._C._should_allow_numbers_as_tensors(schema.name.split("::")[1])
    tensors_only = {a.name for a in schema.arguments if strict and isinstance(a.type, torch.TensorType)}
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    returned = []
    for r in schema.returns:
        labels = set(r.alias_info.before_set) if r.alias_info is not None else set()
        returned.append(next((a.name for a in schema.arguments
                              if labels and a.alias_info is not None and labels & set(a.alias_info.before_set)), None))
    return is_view, returned, [a.name for a in schema.arguments if a.is_out], names, tensors_only


def _reads_back(op, tensors: list[torch.Tensor]) -> bool:
    """Whether a real device must hand a value or a shape to the host before the operator can return."""
    if torch.Tag.data_dependent_output in op.tags:
        return True
    masks = any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
    return torch.Tag.dynamic_output_shape in op.tags and (masks or "index" not in op.name())


def _fallback(op, *args, **kwargs):
    """Run `op` on host aliases of its device tensors; in-place results come back as the caller's own tensors."""
    is_view, returned, outs, names, tensors_only = _facts(op)
    if is_view:  # the CPU's view kernels keep the device's dispatch keys, so storage and autograd stay right
        return op.redispatch(_CPU_KEYS, *args, **kwargs)
    args = [torch.tensor(x) if n in tensors_only and isinstance(x, Number) else x for n, x in zip(names, args)]
    flat, spec = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    if any(not t.is_cpu for t in tensors):
        free = []  # advanced indexing takes host indices too, and moves them
        if "index" in op.name() and "indices" in names[: len(args)]:
            free = [id(x) for x in args[names.index("indices")]]
        where = check_same_device(op.name(), [t for t in tensors if id(t) not in free]).index
        copies.count(0, sum(t.is_cpu and t.dim() > 0 for t in tensors))
    else:
        where = _ordinals.index(next((x for x in flat if isinstance(x, torch.device) and x.type != "cpu"), None))
    copies.count(_reads_back(op, tensors), 0)
    host = [on_host(x) if isinstance(x, torch.Tensor) and not x.is_cpu
            else torch.device("cpu") if isinstance(x, torch.device) else x for x in flat]
    host_args, host_kwargs = tree_unflatten(host, spec)
    written = {n: kwargs[n] for n in outs if isinstance(kwargs.get(n), torch.Tensor)}
    for name, out in written.items():  # an alias cannot be resized, so out= gets fresh memory first
        host_kwargs[name] = torch.empty(0, dtype=out.dtype)
    result = op(*host_args, **host_kwargs)
    for name, out in written.items():
        if out.shape != host_kwargs[name].shape:
            _resize_(out, host_kwargs[name].shape)
        on_host(out).copy_(host_kwargs[name])
    given = {**dict(zip(names, args)), **kwargs}
    label = functools.partial(tree_map_only, torch.Tensor, lambda t: on_device(t, where))
    if isinstance(result, tuple):
        return tuple(given[n] if n else label(r) for r, n in zip(result, returned))
    return given[returned[0]] if returned and returned[0] else label(result)


def _convolution_backward(grad, x, weight, stride, padding, dilation, transposed, output_padding, groups, mask):
    bias = [weight.shape[1] * groups if transposed else weight.shape[0]]
    return _fallback(torch.ops.aten.convolution_backward.default, grad, x, weight, bias, stride, padding, dilation,
                     transposed, output_padding, groups, mask)


def _allocate_storage(vendor: str) -> None:
    """Let `torch.UntypedStorage(n, device=vendor)`, hence deepcopy, work: no allocator stands behind the device."""
    original = torch.UntypedStorage.__new__

    def new(cls, *args, device=None, **kwargs):
        if device is not None and torch.device(device).type == vendor and cls is torch.UntypedStorage:
            return _empty([args[0] if args else 0], dtype=torch.uint8, device=device).untyped_storage()
        return original(cls, *args, **kwargs) if device is None else original(cls, *args, device=device, **kwargs)

    torch.UntypedStorage.__new__ = new


def install(name: str, count: int = 1) -> types.ModuleType:
    """Make `torch.device(name)` an emulated device with `count` ordinals and return `torch.<name>`.

    Raises RuntimeError if this process already has another out-of-tree vendor: torch allows one per process.
    """
    global _vendor, _ordinals
    if _vendor is not None and (_vendor.__name__, _ordinals.count) == (f"torch.{name}", count):
        return _vendor
    taken = torch._C._get_privateuse1_backend_name()
    if taken != "privateuseone":
        raise RuntimeError(
            f"cannot emulate {count} device(s) of {name!r}: this process already has the vendor device {taken!r}, and "
            "torch allows one per process; start another process."
        )
    _ordinals = Ordinals(count)
    _vendor = make_module(name, _ordinals, _memory)
    _setup_privateuseone_for_python_backend(name, backend_module=_vendor)
    sys.modules[_vendor.__name__] = _vendor
    aten, every = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _libraries.extend((aten, every))
    every.fallback(_fallback, "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    kernels = {"empty.memory_format": _empty, "empty_strided": _empty_strided, "_copy_from": _copy_from,
               "resize_": _resize_, "record_stream": lambda tensor, stream: None,
               # torch's generic form would move host indices a second time
               "index.Tensor": functools.partial(_fallback, torch.ops.aten.index.Tensor),
               "convolution_overrideable": functools.partial(_fallback, torch.ops.aten.convolution.default),
               "convolution_backward_overrideable": _convolution_backward}
    for view in ("as_strided", "view", "_reshape_alias", "set_", "set_.source_Tensor", "set_.source_Storage",
                 "set_.source_Storage_storage_offset"):
        packet, _, overload = view.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        kernels[view] = functools.partial(op.redispatch, _CPU_KEYS)
    for operator, kernel in kernels.items():
        aten.impl(operator, kernel, "PrivateUse1")
    for key in ("Conjugate", "Negative"):  # materialising a lazy bit here would copy, which materialises it again
        aten.impl("_copy_from", torch.library.fallthrough_kernel, key)
    _allocate_storage(name)
    torch.Event = Event
    torch.accelerator.synchronize = _vendor.synchronize
    torch.accelerator.set_device_index = _vendor.set_device
    torch.accelerator.current_device_index = _vendor.current_device
    return _vendor
