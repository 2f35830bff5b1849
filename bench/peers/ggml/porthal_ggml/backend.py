"""Each kernel is a graph of ggml's operators, which compute in float32. ggml counts axes from the innermost one."""

import ctypes
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from porthal.backends.reference.backend import Reference
from porthal.hal import Rows, Selection, SelectionSpec, at_least, limits, one_of

HOME = Path(find_spec("libggml").submodule_search_locations[0]) / "lib64"
BASE, CPU = (ctypes.CDLL(str(HOME / f"lib{n}.so"), ctypes.RTLD_GLOBAL) for n in ("ggml-base", "ggml-cpu"))
TYPES = {"float32": 0, "float16": 1, "int32": 26}
SPARE = 2**20  # bytes for what ggml keeps beside the numbers
FP32 = {"x": one_of("float32"), "weight": one_of("float32")}


class Parameters(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("without_data", ctypes.c_bool)]


BASE.ggml_init.argtypes = [Parameters]
for name in ("init", "new_tensor", "get_data", "new_graph", "rms_norm", "norm", "mul", "add", "swiglu", "mul_mat", "mul_mat_id",
             "argmax", "top_k", "lightning_indexer"):  # fmt: skip
    getattr(BASE, f"ggml_{name}").restype = ctypes.c_void_p


class Graph:
    """One call: `given` puts an array in, `call` adds an operator, `result` computes."""

    def __init__(self, numbers):
        self.context = ctypes.c_void_p(BASE.ggml_init(Parameters(4 * numbers + SPARE, None, False)))

    def given(self, x):
        sizes = (ctypes.c_int64 * x.ndim)(*reversed(x.shape))
        made = ctypes.c_void_p(BASE.ggml_new_tensor(self.context, TYPES[str(x.dtype)], x.ndim, sizes))
        x = np.ascontiguousarray(x)
        ctypes.memmove(ctypes.c_void_p(BASE.ggml_get_data(made)), x.ctypes.data, x.nbytes)
        return made

    def call(self, op, *operands):
        return ctypes.c_void_p(getattr(BASE, f"ggml_{op}")(self.context, *operands))

    def result(self, tensor, shape, dtype="float32"):
        graph = ctypes.c_void_p(BASE.ggml_new_graph(self.context))
        BASE.ggml_build_forward_expand(graph, tensor)
        CPU.ggml_graph_compute_with_ctx(self.context, graph, 1)
        y = np.empty(shape, dtype)
        ctypes.memmove(y.ctypes.data, ctypes.c_void_p(BASE.ggml_get_data(tensor)), y.nbytes)
        return y


@contextmanager
def graph(*arrays):
    """With room for some results of the size of its operands."""
    made = Graph(8 * sum(a if isinstance(a, int) else a.size for a in arrays))
    try:
        yield made
    finally:
        BASE.ggml_free(made.context)


class Ggml(Reference):
    @limits(provider="ggml_rms_norm", dtypes=FP32, T=at_least(1))
    def rms_norm(self, x, weight, *, eps=1e-5):
        with graph(x, weight) as g:
            return g.result(g.call("mul", g.call("rms_norm", g.given(x), ctypes.c_float(eps)), g.given(weight)), x.shape)

    @limits(provider="ggml_norm", dtypes={**FP32, "bias": one_of("float32")}, T=at_least(1))
    def layer_norm(self, x, weight, bias, *, eps=1e-6):
        with graph(x, weight, bias) as g:
            normed = g.call("mul", g.call("norm", g.given(x), ctypes.c_float(eps)), g.given(weight))
            return g.result(g.call("add", normed, g.given(bias)), x.shape)

    @limits(provider="ggml_swiglu", dtypes={"x": one_of("float32")}, T=at_least(1))
    def silu_mul(self, x):
        with graph(x) as g:
            return g.result(g.call("swiglu", g.given(x)), (x.shape[0], x.shape[1] // 2))

    @limits(provider="ggml_mul_mat", dtypes={"x": one_of("float32")}, out=one_of("x", "float32"), T=at_least(1))
    def linear(self, x, w, *, out="x"):
        y = self.empty((x.shape[0], w.spec.shape[0]), "float32")
        with graph(x, w.native, y) as g:
            y[...] = g.result(g.call("mul_mat", g.given(w.native.astype(np.float32)), g.given(x)), y.shape)
        return y

    @limits(provider="ggml_argmax", dtypes={"logits": one_of("float32")}, T=at_least(1))
    def argmax(self, logits):
        with graph(logits) as g:
            return g.result(g.call("argmax", g.given(logits)), logits.shape[:1], "int32")

    @limits(provider="ggml_top_k", tie="any", T=at_least(1), S=at_least(1))
    def topk(self, scores, batch, *, k):
        shown = np.maximum(scores, np.finfo(np.float32).min)  # so that -inf means hidden
        shown[np.arange(scores.shape[1]) >= batch.visible[:, None]] = -np.inf
        n, length = min(k, scores.shape[1]), np.minimum(batch.visible, k).astype(np.int32)
        with graph(shown) as g:
            found = g.result(g.call("top_k", g.given(shown), n), (len(shown), n), "int32")
        order = np.argsort(-np.take_along_axis(shown, found, 1), axis=1, kind="stable")  # it gives them in any order
        indices = np.full((batch.T, k), -1, np.int32)
        indices[:, :n] = np.take_along_axis(found, order, 1)
        return Selection(SelectionSpec(batch.T, k), Rows(np.where(np.arange(k) < length[:, None], indices, -1), length))

    @limits(provider="ggml_mul_mat_id", dtypes={"x": one_of("float32")}, T=at_least(1))
    def moe_experts(self, x, w13, w2, ids, weights, *, first_expert=0):
        mine = ids - first_expert
        here = (mine >= 0) & (mine < len(w13.native))
        y, (T, k), inner = self.empty(x.shape, "float32"), ids.shape, w2.spec.shape[2]
        with graph(x, w13.native, w2.native, T * k * (3 * inner + x.shape[1] + len(w13.native) // 4 + 1)) as g:
            chosen = g.given(np.where(here, mine, 0).astype(np.int32))
            up = g.call("mul_mat_id", g.given(w13.native.astype(np.float32)), g.given(x[:, None]), chosen)
            down = g.call("mul_mat_id", g.given(w2.native.astype(np.float32)), g.call("swiglu", up), chosen)
            parts = g.result(down, (T, k, x.shape[1]))
        y[...] = np.where(here[..., None], parts * weights[..., None], 0).sum(1)
        return y

    @limits(provider="ggml_lightning_indexer", dtypes={"iq": one_of("float32"), "w": one_of("float32")}, D=one_of(128))
    def indexer_scores(self, iq, w, keys, batch, *, scale):
        scores = self.empty((batch.T, batch.max_kv), "float32")
        scores[...] = -np.inf
        for r in range(batch.R):
            rows, k = slice(batch.cu_q[r], batch.cu_q[r + 1]), keys["k"][batch.slots_of(r)].astype(np.float32)
            if len(k) and rows.stop > rows.start:
                hidden = np.arange(len(k)) >= batch.visible[rows, None]
                mask = np.where(hidden, -np.inf, 0).astype(np.float16)
                with graph(iq[rows], k, mask) as g:
                    head = [g.given(a) for a in (iq[rows], k[:, None], (w[rows] * np.float32(scale))[None], mask[None])]
                    scores[rows, : len(k)] = g.result(g.call("lightning_indexer", *head), mask.shape)
        return scores
