"""Each kernel is a graph of one operator, made once per attributes and dtype, with sizes that are free."""

from functools import cache

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from porthal.backends.reference.backend import Reference
from porthal.hal import Rows, Selection, SelectionSpec, at_most, limits, multiple_of, one_of, same_as

onnxruntime.set_default_logger_severity(3)
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64, "int32": TensorProto.INT32}
TAKEN = one_of("float32", "float16")
X = {"x": TAKEN}
NORM = {**X, "weight": same_as("x")}
MS, ONNX = "com.microsoft", ""


@cache
def session(op, domain, inputs, outputs, attributes=()):
    """A graph of one operator; inputs by name and type, "" for one that is left out; outputs the same."""
    values = {side: [helper.make_tensor_value_info(n, TYPES[t], None) for n, t in names if n]
              for side, names in (("in", inputs), ("out", outputs))}  # fmt: skip
    node = helper.make_node(op, [n for n, _ in inputs], [n for n, _ in outputs], domain=domain, **dict(attributes))
    graph = helper.make_graph([node], op, values["in"], values["out"])
    opsets = [helper.make_opsetid(ONNX, 23), helper.make_opsetid(MS, 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(op, domain, given, outputs, **attributes):
    """The outputs of one call on arrays by name; None is an input that is left out."""
    inputs = tuple((n if x is not None else "", str(x.dtype) if x is not None else "") for n, x in given.items())
    made = session(op, domain, inputs, tuple(outputs), tuple(attributes.items()))
    return made.run([n for n, _ in outputs if n], {n: x for n, x in given.items() if x is not None})


class Onnxruntime(Reference):
    @limits(provider="SimplifiedLayerNormalization", dtypes=NORM)
    def rms_norm(self, x, weight, *, eps=1e-5):
        return run("SimplifiedLayerNormalization", ONNX, {"x": x, "w": weight}, [("y", str(x.dtype))], epsilon=eps, axis=-1)[0]

    @limits(provider="SkipSimplifiedLayerNormalization", dtypes=NORM)
    def add_rms_norm(self, x, residual, weight, *, eps=1e-5):
        t = str(x.dtype)
        given = {"x": x, "skip": residual, "w": weight}
        outputs = [("y", t), ("", ""), ("", ""), ("r", t)]
        return tuple(run("SkipSimplifiedLayerNormalization", MS, given, outputs, epsilon=eps))

    @limits(provider="LayerNormalization", dtypes={**NORM, "bias": same_as("x")})
    def layer_norm(self, x, weight, bias, *, eps=1e-6):
        given = {"x": x, "w": weight, "b": bias}
        return run("LayerNormalization", ONNX, given, [("y", str(x.dtype))], epsilon=eps, axis=-1)[0]

    @limits(provider="QuickGelu (alpha 1)", dtypes=X)
    def silu_mul(self, x):
        gate, up = np.split(x, 2, axis=1)
        return run("QuickGelu", MS, {"x": np.ascontiguousarray(gate)}, [("y", str(x.dtype))], alpha=1.0)[0] * up

    @limits(provider="MatMul", dtypes=X, out=one_of("x"))
    def linear(self, x, w, *, out="x"):
        return run("MatMul", ONNX, {"x": x, "w": w.native.astype(x.dtype).T}, [("y", str(x.dtype))])[0]

    @limits(provider="LogSoftmax", dtypes={"logits": one_of("float32")})
    def log_softmax(self, logits):
        return run("LogSoftmax", ONNX, {"x": logits}, [("y", "float32")], axis=-1)[0]

    @limits(provider="TopK", tie="any")
    def topk(self, scores, batch, *, k):
        hidden = np.arange(scores.shape[1]) >= batch.visible[:, None]
        shown = np.where(hidden, np.float32(-np.inf), np.maximum(scores, np.finfo(np.float32).min))  # -inf means hidden
        n = np.array([min(k, shown.shape[1])])
        found = run("TopK", ONNX, {"x": shown, "k": n}, [("v", "float32"), ("i", "int64")], axis=-1)[1]
        length = np.minimum(batch.visible, k).astype(np.int32)
        indices = np.full((batch.T, k), -1, np.int32)
        indices[:, : n[0]] = found
        return Selection(SelectionSpec(batch.T, k), Rows(np.where(np.arange(k) < length[:, None], indices, -1), length))

    @limits(provider="MoE", dtypes={"x": one_of("float32")}, H=multiple_of(4), I=multiple_of(4), k=at_most(32))
    def moe_experts(self, x, w13, w2, ids, weights, *, first_expert=0):
        """The router's logits are the logarithms of the wanted weights, so that those below zero need a call of their own; it
        makes their sum 1, which is scaled back."""
        E, k = w13.spec.shape[0], ids.shape[1]
        mine = ids - first_expert
        here = (mine >= 0) & (mine < E)
        wanted = np.zeros((len(x), E), np.float32)
        t, j = np.nonzero(here)
        np.add.at(wanted, (t, mine[t, j]), weights[t, j])
        gate_up = np.stack(np.split(w13.native, 2, axis=1), 2).reshape(E, -1, x.shape[1]).astype(np.float32)  # interleaved
        down = w2.native.astype(np.float32)
        y = self.empty(x.shape, "float32")
        y[...] = 0
        for sign in (1, -1):
            share = np.maximum(sign * wanted, 0)
            rows = np.flatnonzero(share.sum(1) > 0)
            if len(rows):
                scale = share[rows].sum(1, keepdims=True)
                logits = np.log(np.maximum(share[rows] / scale, 1e-38)).astype(np.float32)
                given = {"x": x[rows], "p": logits, "w1": gate_up, "b1": None, "w2": down}
                found = run("MoE", MS, given, [("y", "float32")], k=min(k, E), activation_type="swiglu", swiglu_fusion=1,
                            activation_alpha=1.0, activation_beta=0.0, swiglu_limit=float("inf"),
                            normalize_routing_weights=1)  # fmt: skip
                y[rows] += sign * found[0] * scale
        return y
