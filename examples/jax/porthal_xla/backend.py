"""XLA's arrays and kernels: plain, immutable jax.Array throughout. What is not here runs on the reference, bridged."""

import jax
import jax.numpy as jnp
import numpy as np

from porthal.backends.reference.backend import Reference
from porthal.hal import Rows, Selection, SelectionSpec, Traits, Unavailable, UsageError, limits
from porthal_xla import kernels

own = limits(provider="jax")  # every dtype and size


def arrays_alone(kernel):
    """The method for a kernel that takes arrays and attributes and no other operand."""

    @own
    def method(self, *arrays, **attributes):
        return kernel(*arrays, **attributes)

    return method


class Xla(Reference):
    traits = Traits(mutable=False, views_alias=False, strides=False, flushes_denormals=True, static_shapes=True)

    def __init__(self, device=""):
        super().__init__(device)
        devices = {str(i): found for i, found in enumerate(jax.devices())}
        if (device or "0") not in devices:
            raise Unavailable(f"JAX has no device {device!r} here: expected one of {', '.join(devices)}")
        self._chip = devices[device or "0"]

    def describe(self):
        return super().describe() if self._chip.platform == "cpu" else self._chip.device_kind

    # -- arrays

    def from_numpy(self, x):
        array = jnp.array(x, device=self._chip)  # a copy, as NumPy's memory can change
        if array.dtype != x.dtype:
            raise UsageError(f"JAX makes {array.dtype} of {x.dtype} unless jax_enable_x64 is set: give at most 32 bits")
        return array

    def to_numpy(self, x):
        self.host_copies += 1
        return np.array(x)

    def empty(self, shape, dtype):
        return jnp.empty(shape, dtype, device=self._chip)

    def refuses_array(self, x):
        return None if isinstance(x, jax.Array) else f"{type(x).__name__}, expected a jax.Array"

    # -- operands

    def plan(self, batch):
        """What kernels read of a batch, on the chip. Tables grow in powers of two, so that decoding seldom recompiles."""
        width = batch.block_table.shape[1]
        table = np.zeros((batch.R, 1 << max(width - 1, 0).bit_length()), np.int32)
        table[:, :width] = np.maximum(batch.block_table, 0)
        host = {
            "table": table,
            "request": batch.row_request,
            "visible": batch.visible,
            "positions": batch.positions,
            "slots": batch.slots.astype(np.int32),
        }
        return batch.with_native({name: self.from_numpy(value) for name, value in host.items()})

    # -- kernels

    rms_norm = arrays_alone(kernels.rms_norm)
    add_rms_norm = arrays_alone(kernels.add_rms_norm)
    layer_norm = arrays_alone(kernels.layer_norm)
    silu_mul = arrays_alone(kernels.silu_mul)
    add = arrays_alone(kernels.add)
    concat = arrays_alone(kernels.concat)
    take_rows = arrays_alone(kernels.take_rows)
    moe_route = arrays_alone(kernels.moe_route)
    argmax = arrays_alone(kernels.argmax)
    check_finite = arrays_alone(kernels.check_finite)
    sample = arrays_alone(kernels.sample)
    speculative_verify = arrays_alone(kernels.speculative_verify)

    @own
    def rope(self, x, batch, *, theta, layout, start, width):
        return kernels.rope(x, batch.native["positions"], theta=theta, layout=layout, start=start, width=width)

    @own
    def embedding(self, ids, table):
        return kernels.embedding(ids, table.native)

    @own
    def linear(self, x, w, *, out="x"):
        return kernels.linear(x, w.native, out=x.dtype if out == "x" else out)

    @own
    def head_linear(self, x, w):
        return kernels.head_linear(x, w.native)

    @own
    def moe_experts(self, x, w13, w2, ids, weights, *, first_expert=0):
        return kernels.moe_experts(x, w13.native, w2.native, ids, weights, first_expert=first_expert)

    @own
    def kv_write(self, pages, batch, first, second=None):
        for (name, _), rows in zip(pages.spec.fields, (first, second)):
            pages.native[name] = kernels.write(pages[name], batch.native["slots"], rows)
        return pages

    @own
    def indexer_scores(self, iq, w, keys, batch, *, scale):
        return self._scores(iq, w, keys, batch, scale, batch.max_kv)

    @own
    def topk(self, scores, batch, *, k):
        rows = kernels.topk(scores, batch.native["visible"], k=k)
        return Selection(SelectionSpec(batch.T, k), Rows(*rows))

    @own
    def indexer_topk(self, iq, w, keys, batch, *, k, scale):
        room = batch.native["table"].shape[1] * batch.block_size  # for these positions, however many are visible
        return self.topk(self._scores(iq, w, keys, batch, scale, room), batch, k=k)

    def _scores(self, iq, w, keys, batch, scale, S):
        return kernels.indexer_scores(iq, w, keys["k"], batch.native, S=S, scale=scale, block_size=batch.block_size)

    @own
    def sparse_mla(self, q_latent, q_rope, kv, sel, batch, *, scale):
        operands = (q_latent, q_rope, *kv.leaves(), *sel.native, batch.native)
        return kernels.sparse_mla(*operands, scale=scale, block_size=batch.block_size)

    @own
    def select_rows(self, sel, rows):
        chosen = kernels.select_rows(*sel.native, rows)
        return Selection(SelectionSpec(len(rows), sel.spec.k), Rows(*chosen))
