"""docs/onnx.md: `python -m porthal.backends.onnxruntime.page > docs/onnx.md`."""

from __future__ import annotations

from porthal.backends.onnxruntime.functions import DOMAIN, IR, OPSET, SCHEMES, function, nodes, variants
from porthal.hal import contracts

HEAD = """# Operators in ONNX

Every operator is a function of ONNX in the domain `{domain}`, whose body has standard operators alone: opset {opset},
IR {ir}. Its name, its attributes and its meaning are those of the contract; its text is a file of
`backends/onnxruntime/functions`. A compiler that knows the name may put a kernel of its own in the place of the body;
one that does not runs the body.

```
PORTHAL_BACKEND=onnxruntime porthal generate "text"    runs them on the CPU; onnxruntime:NAME on another provider
porthal conform --backend onnxruntime:NAME             judges a provider, call by call
porthal export --out model.onnx                        a model as graphs, to run without porthal: examples/onnx
```

`PORTHAL_ORT_PROVIDERS=NAME,NAME` names providers where no device is given. Arithmetic is float32 between one cast at
the start and one at the end, so float32, float16 and bfloat16 need no other kernels: the CPU provider has none for
most operators on bfloat16, and computes chains of float16 in float32 without rounding between.

Some bodies work around what onnxruntime 1.31.1 does:

- Its Sigmoid is wrong below -8: it is spelled with Exp.
- Its reductions of no rows keep the axis that they should drop: a call whose results have no element runs no graph.
- Its ReduceMax drops a NaN: NaN is looked for apart.
- Its LayerNormalization loses a small deviation beside a large mean: the mean is subtracted before.
- It fuses Transpose and MatMul into a product that divides by the number of rows, which may be 0: a Max of one operand stands
  between the two, so that they are not fused.
- In a loop it moves DequantizeLinear past a Reshape, and then makes no session: there codes are converted by Cast.

An index of -1 is the last row: zeros are put there, for rows that stand for none. Loops are over rows of attention and over the
experts that have rows, so that memory does not grow with both.

A weight under one of {schemes} is codes and scales, NAME_codes and
NAME_scale, in a function of the scheme's name. In it stand DequantizeLinear before a product, by rows or by blocks, and
where the scheme quantises the other side too, QuantizeLinear and DequantizeLinear there, by scales of the step. In an
exported model codes are tensors of int8, int4 or float8e4m3fn; those of experts are bytes, as ONNX gathers neither float8
nor less than bytes. Under other schemes a model is not exported: of e2m1 this opset has no codes.

| operator | operands | attributes | nodes when inlined | the runtime has one kernel |
|---|---|---|---|---|
"""
TAIL = """
Composites ({composites}) are called as the operators that they are made of. Of
quantised caches those of int8 have functions, which take a field's codes and NAME_scale. Where another scheme is called the
reference's kernels run. On 28 November 2026 the CPU provider of onnxruntime 1.31.1 passed the standard level, 3545 of 3545
cases, in head_linear, indexer_scores, kv_write, sparse_mla, quantize, dequantize, mla_output, mtp_input, index_prolog and
moe_layer.

The last column names operators of onnxruntime's CPU provider that do the same; what of them holds is on
[peers.md](peers.md). None of a domain of its own is called: a graph of standard operators is what every runtime takes.
It makes SimplifiedLayerNormalization of the body of rms_norm by itself. com.microsoft.MoE gave the same numbers to 1e-6 in
half the time for one row, as it gathers no weights, and is not called: it takes logits of a router for weights, so that a
weight below 0, an expert twice in a row and a place without one cannot be said. Attention selects keys by a mask over all.

## Casts in other runtimes

A function of 16 bits ends with a cast, and codes are casts too. What becomes of them on a CPU, seen on 28 November 2026 by
scripts of [findings](../findings/README.md), of IREE, TVM and tinygrad in code of theirs, not in a model of ONNX:

| runtime | float16 and back | bfloat16 | float8e4m3fn |
|---|---|---|---|
| onnxruntime 1.31.1 | rounded | rounded | rounded |
| OpenVINO 2026.4.1 | not rounded | in fixed shapes rounded, else a quarter lies too near to zero | rounded twice, 0.4 % wrong |
| IREE 3.13.0, llvm-cpu | rounded | there and back in one loop: not rounded | what should be rounded up to 2^-6 becomes 0 |
| TVM 0.27.0.post1, llvm | rounded | rounded | 0 is read as 2^-7, below 2^-6 all is wrong |
| tinygrad 0.14.0, interpreted | not rounded unless it is stored | rounded | rounded |

Sizes are free in every model that is exported, so under OpenVINO rms_norm and silu_mul of bfloat16 have 24 % of results too
near to zero, and none once the sizes are fixed: export float32 for it.

## The exported model

| input | shape | |
|---|---|---|
| ids | rows; at least one where activations are quantised | token ids of the step, int32 |
| positions, visible | rows | a row's place in its text, and how many keys it may see: one more; int32 |
| slots | rows | where its key is written in the cache, -1: nowhere; int64 |
| row_request | rows | which request it belongs to; int32 |
| kv_len, block_table | requests (, columns) | keys of a request after this step, and its pages in order; int32 |
| last_rows | requests | rows whose logits are wanted; int32 |
| hidden | rows, H | of the draft: what the step, or the draft before, gives as hidden or hidden_after |
| cache_N_FIELD | slots, width | the cache, a page being 64 slots; of each comes back cache_N_FIELD_after |

logits [requests, vocabulary] are float32; hidden and the cache are in the dtype of `--dtype`. With `--cache-scheme` of int8 a
field is int8, and a row's scales are beside it as cache_N_FIELD_scale. The draft of a model with an
MTP layer takes the ids of the tokens after each row, and has fields of the cache of its own. Weights stand in
FILE.onnx.data, which both graphs read. Bound to the memory of cache_N_FIELD, cache_N_FIELD_after is written in place."""
KERNELS = {
    "add_rms_norm": "SkipSimplifiedLayerNormalization",
    "layer_norm": "LayerNormalization",
    "linear": "MatMul, Gemm",
    "log_softmax": "LogSoftmax",
    "moe_experts": "com.microsoft.MoE",
    "rms_norm": "SimplifiedLayerNormalization",
    "rope": "RotaryEmbedding",
    "topk": "TopK",
}


def page() -> str:
    rows = []
    for op in contracts():
        for variant in variants(op):
            f = function(op, variant)
            name = ", ".join([op, *variant.split(".")]) if variant else op
            inputs = ", ".join(f.input)
            rows.append(f"| {name} | {inputs} | {', '.join(f.attribute)} | {count(op, variant)} | {KERNELS.get(op, '')} |\n")
    composites = ", ".join(op for op in contracts() if not variants(op))
    head = HEAD.format(domain=DOMAIN, opset=OPSET, ir=IR, schemes=", ".join(SCHEMES))
    return head + "".join(rows) + TAIL.format(composites=composites)


def count(op: str, variant: str) -> int:
    """Standard operators of a function, those inside its calls and its loops among them."""
    return sum(count(n.op_type, n.overload) if n.domain == DOMAIN else 1 for n in nodes(function(op, variant)))


if __name__ == "__main__":
    print(page(), end="")
