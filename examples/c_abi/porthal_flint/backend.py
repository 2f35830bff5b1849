"""Flint's arrays and kernels: calls of libflint.so with device addresses, sizes and a number for the dtype."""

import ctypes
import weakref
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from math import prod

import numpy as np

from porthal.backends.reference.backend import Reference
from porthal.hal import PorthalError, UsageError, limits, numpy_dtype, one_of
from porthal_flint import LIBRARY

KIND = {"float32": 0, "bfloat16": 1}  # as device.c numbers them
FLOAT = one_of(*KIND)
STEPS = POINTER(c_int64)
SIGNATURES = {
    "flint_malloc": (c_int64, POINTER(c_void_p)),
    "flint_free": (c_void_p,),
    "flint_upload": (c_void_p, c_void_p, c_int64),
    "flint_download": (c_void_p, c_void_p, c_int64),
    "flint_copy": (c_void_p, STEPS, c_void_p, STEPS, STEPS, c_int, c_int64),
    "flint_add": (c_void_p, c_void_p, c_void_p, c_int64, c_int),
    "flint_rms_norm": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int, c_int, c_float),
    "flint_silu_mul": (c_void_p, c_void_p, c_int64, c_int64, c_int),
    "flint_linear": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int, c_int),
    "flint_argmax": (c_void_p, c_void_p, c_int64, c_int64, c_int),
}


class DeviceError(PorthalError, RuntimeError):
    """What the device refused, in its own sentence."""


def _succeeded(code, function, args):
    if code:
        raise DeviceError(device.flint_last_error().decode())


device = ctypes.CDLL(str(LIBRARY))
device.flint_last_error.restype = ctypes.c_char_p
for name, types in SIGNATURES.items():
    getattr(device, name).argtypes = types
    getattr(device, name).errcheck = _succeeded


class Array:
    """An address on the device with a shape, a dtype and a step in bytes per axis. Slices are views."""

    def __init__(self, address, shape, steps, dtype, owner):
        self.address, self.shape, self.steps, self.dtype = address, tuple(shape), tuple(steps), dtype
        self.owner = owner  # of the memory, which lives as long as the last view
        self._as_parameter_ = c_void_p(address)  # what ctypes passes, while it keeps the array alive

    @classmethod
    def new(cls, shape, dtype):
        address, owner = c_void_p(), Memory()
        device.flint_malloc(prod(shape) * numpy_dtype(dtype).itemsize, byref(address))
        weakref.finalize(owner, device.flint_free, address.value)
        return cls(address.value, shape, dense_steps(shape, dtype), dtype, owner)

    def __getitem__(self, key):
        keys = key if isinstance(key, tuple) else (key,)
        address, shape, steps = self.address, [], []
        if len(keys) > len(self.shape):
            raise UsageError(f"{len(keys)} indices are too many for an array of shape {list(self.shape)}")
        every = (*keys, *[slice(None)] * (len(self.shape) - len(keys)))
        for size, step, k in zip(self.shape, self.steps, every):
            at = range(size)[k]
            if isinstance(k, slice):
                address += at.start * step
                shape.append(len(at))
                steps.append(at.step * step)
            else:
                address += at * step
        return Array(address, shape, steps, self.dtype, self.owner)

    def swapaxes(self, a, b):
        order = list(range(len(self.shape)))
        order[a], order[b] = order[b], order[a]
        shape, steps = ([each[i] for i in order] for each in (self.shape, self.steps))
        return Array(self.address, shape, steps, self.dtype, self.owner)

    def reshape(self, *shape):
        if prod(shape) != prod(self.shape) or min(shape, default=0) < 0:
            raise UsageError(f"cannot reshape {list(self.shape)} to {list(shape)}: give sizes of the same product")
        x = self.dense()
        return Array(x.address, shape, dense_steps(shape, x.dtype), x.dtype, x.owner)

    def dense(self):
        """Itself if its elements lie one behind the other, else a copy where they do: what kernels are given."""
        return self if self.steps == dense_steps(self.shape, self.dtype) else copied(Array.new(self.shape, self.dtype), self)


class Memory:
    """An allocation of the device, freed with the last array that refers to this."""


def dense_steps(shape, dtype):
    return tuple(prod(shape[i + 1 :]) * numpy_dtype(dtype).itemsize for i in range(len(shape)))


def copied(into, value):
    """Every element of one array in another of its shape and dtype, on the device."""
    if (into.shape, into.dtype) != (value.shape, value.dtype):
        raise UsageError(f"cannot copy {value.dtype}{list(value.shape)} into {into.dtype}{list(into.shape)}")
    ints = c_int64 * len(into.shape)
    item = numpy_dtype(into.dtype).itemsize
    device.flint_copy(into, ints(*into.steps), value, ints(*value.steps), ints(*into.shape), len(into.shape), item)
    return into


class Flint(Reference):
    """Ops without a method here run on the reference: porthal carries their operands to the host and back."""

    place = "emulated device"  # device.c plays it

    def from_numpy(self, x):
        x = np.asarray(x, order="C")
        y = self.empty(x.shape, x.dtype.name)
        device.flint_upload(y, x.ctypes.data, x.nbytes)
        return y

    def to_numpy(self, x):
        self.host_copies += 1
        y = np.empty(x.shape, numpy_dtype(x.dtype))
        device.flint_download(y.ctypes.data, x.dense(), y.nbytes)
        return y

    def empty(self, shape, dtype):
        return Array.new(shape, dtype)

    def write(self, into, value):
        return copied(into, value)

    def expand(self, x, shape):
        return Array(x.address, shape, (0, *x.steps[1:]), x.dtype, x.owner)

    def refuses_array(self, x):
        return None if isinstance(x, Array) else f"{type(x).__name__}, expected an array of flint"

    @limits(provider="flint_add", dtypes={"a": FLOAT})
    def add(self, a, b):
        y = self.empty(a.shape, a.dtype)
        device.flint_add(a.dense(), b.dense(), y, prod(a.shape), KIND[a.dtype])
        return y

    @limits(provider="flint_rms_norm", dtypes={"x": FLOAT, "weight": FLOAT})
    def rms_norm(self, x, weight, *, eps=1e-5):
        y = self.empty(x.shape, x.dtype)
        device.flint_rms_norm(x.dense(), weight.dense(), y, *x.shape, KIND[x.dtype], KIND[weight.dtype], eps)
        return y

    @limits(provider="flint_silu_mul", dtypes={"x": FLOAT})
    def silu_mul(self, x):
        y = self.empty((x.shape[0], x.shape[1] // 2), x.dtype)
        device.flint_silu_mul(x.dense(), y, *y.shape, KIND[x.dtype])
        return y

    @limits(provider="flint_linear", dtypes={"x": FLOAT}, out=one_of("x", *KIND))
    def linear(self, x, w, *, out="x"):
        y = self.empty((x.shape[0], w.native.shape[0]), x.dtype if out == "x" else out)
        device.flint_linear(x.dense(), w.native, y, *x.shape, y.shape[1], KIND[x.dtype], KIND[y.dtype])
        return y

    @limits(provider="flint_copy")
    def kv_write(self, pages, batch, first, second=None):
        for (name, _), rows in zip(pages.spec.fields, (first, second)):
            for t in np.flatnonzero(batch.slots >= 0):
                copied(pages[name][batch.slots[t]], rows[t])
        return pages

    @limits(provider="flint_argmax", dtypes={"logits": FLOAT})
    def argmax(self, logits):
        ids = self.empty(logits.shape[:1], "int32")
        device.flint_argmax(logits.dense(), ids, *logits.shape, KIND[logits.dtype])
        return ids
