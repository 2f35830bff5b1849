"""Honest kernels in plain float32, which the judge must accept at the strict level."""

import numpy as np

from porthal.backends.reference.backend import Reference
from porthal.conformance.cases.plan import cases
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.report.results import Result
from porthal.conformance.runner.check import check
from porthal.hal import contracts, narrow, widen

f32 = np.float32


def single(x):
    return widen(x).astype(f32) if x.dtype.itemsize < 4 else x.astype(f32)


def rounded(self, value, like):
    """A float32 or float64 value in the dtype of `like`, in memory from the backend."""
    out = self.empty(value.shape, str(like.dtype))
    out[...] = narrow(value.astype(np.float64), str(like.dtype))
    return out


def backend(**kernels):
    return type("Planted", (Reference,), {"name": "planted", **kernels})()


def rms_norm(self, x, weight, *, eps=1e-5, early=False):
    wide = single(x)
    normed = wide * (1 / np.sqrt((wide * wide).mean(-1, keepdims=True, dtype=f32) + f32(eps)))
    if early:
        normed = single(rounded(self, normed, x))
    return rounded(self, normed * single(weight), x)


def rms_norm_rounding_early(self, x, weight, *, eps=1e-5):
    return rms_norm(self, x, weight, eps=eps, early=True)


def layer_norm(self, x, weight, bias, *, eps=1e-6):
    wide = single(x)
    centred = wide - wide.mean(-1, keepdims=True, dtype=f32)
    variance = (centred * centred).mean(-1, keepdims=True, dtype=f32)
    return rounded(self, centred / np.sqrt(variance + f32(eps)) * single(weight) + single(bias), x)


def product(self, x, w, out, columns=slice(None)):
    y = single(x)[:, columns] @ w.native.astype(f32)[:, columns].T
    like = x if out == "x" else narrow(np.zeros(0), out)
    return y, like


def linear(self, x, w, *, out="x"):
    return rounded(self, *product(self, x, w, out))


def linear_split(self, x, w, *, out="x"):
    half = x.shape[1] // 2
    y, like = product(self, x, w, out, slice(None, half))
    return rounded(self, y + product(self, x, w, out, slice(half, None))[0], like)


def silu_mul(self, x):
    gate, up = np.split(single(x), 2, axis=-1)
    with np.errstate(over="ignore"):
        return rounded(self, gate / (1 + np.exp(-gate)) * up, x)


def log_softmax(self, logits):
    wide = single(logits)
    shifted = wide - wide.max(-1, keepdims=True, initial=-np.inf)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=f32))


def moe_route(self, logits, bias, *, k, scale, n_group=1, topk_group=1):
    with np.errstate(over="ignore"):
        s = 1 / (1 + np.exp(-logits))
    biased = np.where(np.isnan(s + bias), -np.inf, s + bias)
    if n_group > 1:
        groups = biased.reshape(len(s), n_group, biased.shape[1] // n_group)
        best = np.sort(groups, -1)[..., -2:].sum(-1)
        kept = np.argsort(-best, -1, kind="stable")[:, :topk_group]
        open_ = np.zeros(best.shape, bool)
        np.put_along_axis(open_, kept, True, 1)
        biased = np.where(open_[..., None], groups, -np.inf).reshape(s.shape)
    ids = np.argsort(-biased, -1, kind="stable")[:, :k]
    w = np.take_along_axis(s, ids, 1)
    return ids.astype(np.int32), (f32(scale) * w / (w.sum(-1, keepdims=True) + f32(1e-20))).astype(f32)


def sparse_mla(self, q_latent, q_rope, kv, sel, batch, *, scale):
    o = np.zeros(q_latent.shape, f32)
    indices, length = sel.native
    c, kp = (a.astype(f32) for a in (kv["c"], kv["kp"]))
    for t in range(batch.T):
        slots = batch.slots_of(batch.row_request[t])[indices[t, : length[t]]]
        if len(slots):
            logits = (single(q_latent)[t] @ c[slots].T + single(q_rope)[t] @ kp[slots].T) * f32(scale)
            p = np.exp(logits - logits.max(-1, keepdims=True))
            o[t] = p @ c[slots] / p.sum(-1, keepdims=True)
    return rounded(self, o, q_latent)


def rope(self, x, batch, *, theta, layout, start, width):
    half = width // 2
    frequency = (f32(theta) ** (-np.arange(half, dtype=f32) / f32(half))).astype(f32)
    angle = batch.positions.astype(f32)[:, None, None] * frequency
    y = single(x).copy()
    pairs = slice(start, start + width, 2), slice(start + 1, start + width, 2)
    if layout == "half":
        pairs = slice(start, start + half), slice(start + half, start + width)
    a, b = (single(x)[..., p] for p in pairs)
    y[..., pairs[0]], y[..., pairs[1]] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return rounded(self, y, x)


HONEST = {
    "rms_norm": rms_norm,
    "rms_norm, rounding before the weight": rms_norm_rounding_early,
    "layer_norm": layer_norm,
    "linear": linear,
    "linear, in two halves of K": linear_split,
    "silu_mul": silu_mul,
    "log_softmax": log_softmax,
    "moe_route": moe_route,
    "sparse_mla": sparse_mla,
    "rope": rope,
}


def strictly_judged(name: str) -> list[Result]:
    """The bring-up cases of an honest kernel at the strict level; none of these kernels takes a scheme."""
    op = name.partition(",")[0]
    bench = Bindings(backend(**{op: HONEST[name]}))
    return [check(case, bench, "strict") for case in cases(contracts()[op]) if not case.schemes]
