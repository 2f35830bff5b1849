"""Mistakes in Ascend's adapter, each planted alone, against the cases of its op on the emulated device.

`python -m tests.planted_ascend` prints a line for each that no case caught, in a process of its own.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from porthal.backends import ascend
from porthal.backends.ascend import emulated
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.legal import elements
from porthal.conformance.cases.plan import captured, cases
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.level import STANDARD
from porthal.conformance.selftest.run import first_failing
from porthal.hal import Backend, contracts
from tests.planted_adapters import remade

# each imports from its left alone
MODULES = "calls", "plan", "rows", "attention", "experts", "prolog", "int8", "int8_caches", "backend"
LARGE = 2**20  # elements of a case that is left out
# Under schemes every planned choice is of a local expert, every row has keys, and no cache is as wide as a packed row.
INT8 = {
    "linear": ("linear,T=7,K=96,N=256,out=float16,x:bf16,w%int8_channel,0",),
    "moe_experts": (
        "moe_experts,T=7,H=96,I=96,E=8,k=8,first_expert=3,x:bf16,ids~away,w13%int8_channel,w2%int8_channel,0",
        "moe_experts,T=7,H=96,I=96,E=8,k=2,x:bf16,ids~holes,w13%int8_channel,w2%int8_channel,0",
    ),
    "kv_write": ("kv_write,T=5,A=512,B=64,pages:bf16,pages%int8_tile_latents,batch=1/5+3/130+1/0,block_size=64,0",),
    "indexer_topk": (
        "indexer_topk,T=5,G=32,D=128,k=16,scale=0.015625,iq:bf16,keys%int8_half_keys,batch=1/5+3/130+1/0,block_size=64,0",
    ),
    "sparse_mla": (
        "sparse_mla,T=5,N=8,C=512,R=64,k=16,scale=0.0625,q_latent:bf16,kv%int8_tile_latents,batch=1/5+3/130+1/0,block_size=64,0",
    ),
}
# Planned cases are smaller than what the fused prolog takes.
PROLOG = tuple(
    f"mla_prolog,T={T},H=1024,Q=1536,N={N},D=128,C=512,R=64,theta=10000.0,eps=1e-05,h:bf16,batch={batch},block_size=64,0"
    for T, N, batch in ((3, 2, "1/5+2/130"), (5, 2, "1/5+3/130+1/0"), (16, 128, "16*1/1024"))
)


class Defect(NamedTuple):
    module: str
    op: str
    name: str
    old: str
    new: str
    capture: bool = False


DEFECTS = [
    Defect("rows", "rms_norm", "a keyword of another release", "epsilon=eps)[0]", "eps=eps)[0]"),
    Defect("rows", "rms_norm", "epsilon left to its default", "gamma=weight, epsilon=eps)[0]", "gamma=weight)[0]"),
    Defect("rows", "rms_norm", "the second result", "epsilon=eps)[0]", "epsilon=eps)[1]"),
    Defect("rows", "add_rms_norm", "the residual is the reciprocal root", "y, _, r = NPU", "y, r, _ = NPU"),
    Defect("rows", "add_rms_norm", "the residual is the input", "        return y, r\n", "        return y, x\n"),
    Defect("rows", "silu_mul", "the second half is activated", "input=x.contiguous()", "input=x.roll(x.shape[1] // 2, 1)"),
    Defect("rows", "silu_mul", "views as they are", "input=x.contiguous()", "input=x"),
    Defect("rows", "rope", "always halves", "rotary_mode=MODES[layout]", "rotary_mode='half'"),
    Defect("rows", "rope", "sine before cosine", "r1=cos, r2=sin", "r1=sin, r2=cos"),
    Defect("rows", "rope", "turned the other way", "r2=sin", "r2=-sin"),
    Defect("rows", "rope", "tables in the dtype of x", "r2=sin", "r2=sin.to(x.dtype).float()"),
    Defect("rows", "rope", "first elements before second ones", "[layout]),",
           "[layout]).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2),"),
    Defect("rows", "rope", "the slice at the front", "x[..., start : start + width].float()", "x[..., :width].float()"),
    Defect("plan", "rope", "rows counted for positions", "angles(plan.positions,",
           "angles(torch.arange(len(plan.positions), device=plan.positions.device),"),
    Defect("rows", "kv_write", "padding goes to slot 0", "input=memory(pages, name), indices=batch.native.rows",
           "input=pages[name], indices=batch.native.slots[:, None].clamp(min=0)"),
    Defect("rows", "kv_write", "slots of the field in its memory", "indices=batch.native.rows",
           "indices=batch.native.slots[:, None].clamp(min=0)"),
    Defect("rows", "kv_write", "an index of -1", "input=memory(pages, name), indices=batch.native.rows",
           "input=pages[name], indices=batch.native.slots[:, None]"),
    Defect("rows", "kv_write", "the first field alone", "zip(pages.spec.fields, (first, second))",
           "zip(pages.spec.fields, (first,))"),
    Defect("backend", "kv_write", "no page in front", "        page = spec.block_size\n", "        page = 0\n"),
    Defect("backend", "kv_write", "one row too far", "[:, None] + batch.block_size\n", "[:, None] + batch.block_size + 1\n"),
    Defect("attention", "indexer_topk", "row counts for their sums",
           "_query=plan.cu_q[1:],\n            actual_seq_lengths_key",
           "_query=plan.cu_q.diff(),\n            actual_seq_lengths_key"),
    Defect("attention", "indexer_topk", "key lengths summed",
           "lengths_key=plan.kv_len", "lengths_key=plan.kv_len.cumsum(0).int()"),
    Defect("attention", "indexer_topk", "rows see what comes after them", "sparse_count=k,\n            sparse_mode=3",
           "sparse_count=k,\n            sparse_mode=0"),
    Defect("attention", "indexer_topk", "rows without keys as they are",
           "found[:, 0].masked_fill_((visible == 0)[:, None], -1)", "found[:, 0]"),
    Defect("attention", "indexer_topk", "k for the length", "Rows(indices, visible.clamp(max=k))",
           "Rows(indices, visible.clamp(min=k, max=k))"),
    Defect("attention", "indexer_topk", "layout left to its default", '            layout_key="PA_BSND",\n', ""),
    Defect("attention", "indexer_topk", "one weight for all heads", "weights=w.contiguous()",
           "weights=w[:, :1].expand_as(w).contiguous()"),
    Defect("attention", "sparse_mla", "mode left to its default", "            attention_mode=2,\n", ""),
    Defect("attention", "sparse_mla", "rows without keys as they are",
           "o.masked_fill_((rows.length == 0)[:, None, None], 0)", "o"),
    Defect("attention", "sparse_mla", "slots for positions", "sparse_indices=rows.indices[:, None].contiguous()",
           "sparse_indices=(rows.indices + plan.block_table[plan.row_request, :1] * kv.spec.block_size)[:, None].contiguous()"),
    Defect("attention", "sparse_mla", "unscaled", "scale_value=scale", "scale_value=1.0"),
    Defect("attention", "sparse_mla", "key lengths summed", "lengths_kv=plan.kv_len", "lengths_kv=plan.kv_len.cumsum(0).int()"),
    Defect("attention", "sparse_mla", "no rotary part", "query_rope=q_rope.contiguous()", "query_rope=q_rope * 0"),
    Defect("attention", "sparse_mla", "the other field's keys",
           "key_rope=paged(kv, 1)", "key_rope=latents[..., :64].contiguous()"),
    Defect("experts", "moe_route", "a softmax", "norm_type=1", "norm_type=0"),
    Defect("experts", "moe_route", "no bias", "bias=bias", "bias=bias * 0"),
    Defect("experts", "moe_route", "unscaled weights", "routed_scaling_factor=scale", "routed_scaling_factor=1.0"),
    Defect("experts", "moe_route", "weights before ids", "return ids, weights", "return weights, ids"),
    Defect("experts", "moe_permute", "sums for counts", "SOURCES, COUNTS)", "SOURCES, ENDS)"),
    Defect("experts", "moe_permute", "places for sources", "SOURCES, COUNTS)", "PLACES, COUNTS)"),
    Defect("experts", "moe_permute", "what is behind as it is",
           "rows.masked_fill_(nobodys[:, None], 0), counts", "rows, counts"),
    Defect("experts", "moe_permute", "sources behind as they are", "source.masked_fill_(nobodys, -1)", "source"),
    Defect("experts", "moe_permute", "experts counted from 0", "(ids - (first_expert - 1))", "(ids + 1)"),
    Defect("experts", "moe_permute", "one expert too few", "[1, E + 1]", "[1, E]"),
    Defect("experts", "moe_permute", "all experts are active", "[1, E + 1]", "[0, E + 2]"),
    Defect("experts", "grouped_gemm", "counts for their sums", "counts.cumsum(0)", "counts.long()"),
    Defect("experts", "grouped_gemm", "[E, N, K] for [E, K, N]", "w.native.transpose(1, 2)]", "w.native]"),
    Defect("experts", "grouped_gemm", "sums said to be counts", "group_list_type=ENDS", "group_list_type=COUNTS"),
    Defect("experts", "grouped_gemm", "int32 sums", "counts.cumsum(0)", "counts.cumsum(0).int()"),
    Defect("experts", "grouped_gemm", "a result for each group", "split_item=2", "split_item=0"),
    Defect("experts", "moe_experts", "what is behind as it is",
           "w2, groups).masked_fill_(nobodys[:, None], 0)", "w2, groups)"),
    Defect("experts", "moe_experts", "choices that went nowhere at row 1", "places % M,", "places.abs(),"),
    Defect("experts", "moe_experts", "without weights", "weights)  # -1", "weights * 0 + 1)  # -1"),
    Defect("experts", "moe_experts", "weights rounded to the dtype of rows", "return y.add_(rest)", "return y"),
    Defect("experts", "moe_experts", "sources for places", "first_expert, PLACES, ENDS)", "first_expert, SOURCES, ENDS)"),
    Defect("experts", "moe_experts", "the second half is activated", "npu_swiglu(input=_grouped(rows, w13, groups)",
           "npu_swiglu(input=_grouped(rows, w13, groups).roll(w2.spec.shape[2], 1)"),
    Defect("prolog", "mla_prolog", "the cache's keys as they are", "updates=turned[:, -1].contiguous()",
           "updates=halves[:, -1].to(h.dtype)"),
    Defect("prolog", "mla_prolog", "turned halves as they are", "turned = _in_pairs(", "turned = ("),
    Defect("prolog", "mla_prolog", "tables of pairs", 'kp.shape[1], "half"', 'kp.shape[1], "interleaved"'),
    Defect("prolog", "mla_prolog", "turned twice", "plan.table(still, ", "plan.table(turn, "),
    Defect("prolog", "mla_prolog", "turned by bfloat16", "*facts, torch.float32)", "*facts, h.dtype)"),
    Defect("prolog", "mla_prolog", "a head's query for the key", "turned[:, -1].contiguous()", "turned[:, 0].contiguous()"),
    Defect("prolog", "mla_prolog", "sine before cosine", "rope_sin=sin[:, 0],\n            rope_cos=cos[:, 0]",
           "rope_sin=cos[:, 0],\n            rope_cos=sin[:, 0]"),
    Defect("prolog", "mla_prolog", "no query norm", "query_norm_flag=True", "query_norm_flag=False"),
    Defect("prolog", "mla_prolog", "matrices in rows", "in_tiles(rows)\n", "rows\n"),
    Defect("prolog", "mla_prolog", "epsilons left to their defaults", "rmsnorm_epsilon_cq=eps", "rmsnorm_epsilon_cq=1.0"),
    Defect("prolog", "mla_prolog", "slots of the fields in their memory", "cache_index=plan.rows[:, 0]",
           "cache_index=plan.slots.clamp(min=0)"),
    Defect("backend", "rope", "turns of the captured step", "        made.take_over(into)\n",
           "        made.tables = into.native.tables if into else {}\n", True),
    Defect("backend", "kv_write", "rows of the captured step",
           "rows = self.write(held.rows, made.rows)", "rows = held.rows", True),
    Defect("int8", "quantize", "the scale's reciprocal", '"scale": scale[:, None]}', '"scale": 1 / scale[:, None]}'),
    Defect("int8", "linear", "without the rows' scales", "pertoken_scale=scale,", "pertoken_scale=None,"),
    Defect("int8", "linear", "the first output's scale for all", '"scale"][:, 0],', '"scale"][:1, 0],'),
    Defect("int8", "linear", "a result of int8", 'output_dtype=x.dtype if out == "x" else getattr(torch, out)',
           "output_dtype=None"),
    Defect("int8", "linear", "always the dtype of rows", 'output_dtype=x.dtype if out == "x" else getattr(torch, out)',
           "output_dtype=x.dtype"),
    Defect("int8", "linear", "[N, K] for [K, N]", 'x2=w.native["codes"].transpose(0, 1)', 'x2=w.native["codes"]'),
    Defect("int8", "head_linear", "rows by token", "quantised(x.transpose(0, 1).flatten(0, 1))", "quantised(x.flatten(0, 1))"),
    Defect("int8", "head_linear", "heads begin one too late", "torch.arange(T, (heads + 1) * T, T",
           "torch.arange(0, heads * T, T"),
    Defect("int8", "head_linear", "results by token", ".unflatten(0, (heads, T)).transpose(0, 1)", ".unflatten(0, (T, heads))"),
    Defect("int8", "head_linear", "scales in bfloat16", "(scale / largest).clamp(max=1.0)",
           "(scale / largest).bfloat16().float()"),
    Defect("int8", "grouped_gemm", "without a column's largest", '.mul_(w.native["largest"])', ""),
    Defect("int8", "grouped_gemm", "without the room for sums", ".mul_(codes.shape[1] / 2)", ""),
    Defect("int8", "grouped_gemm", "without the rows' scales", ".mul_(scale[:, None])", ""),
    Defect("int8", "grouped_gemm", "counts for their sums", "groups_of(counts.cumsum(0), len(x))",
           "groups_of(counts.long(), len(x))"),
    Defect("int8", "grouped_gemm", "scales of another expert",
           'scale=[w.native["part"] if', 'scale=[w.native["part"].roll(1, 0) if'),
    Defect("int8", "moe_experts", "the dtype left to its default", "dequant_dtype=0,", "dequant_dtype=6,"),
    Defect("int8", "moe_experts", "matrices in rows", "in_tiles(lying)", "lying"),
    Defect("int8", "moe_experts", "scales of another expert", 'weight_scale=[w13.native["scale"][..., 0]]',
           'weight_scale=[w13.native["scale"][..., 0].roll(1, 0)]'),
    Defect("int8", "moe_experts", "the second half is activated", "in_tiles(lying)",
           "in_tiles(lying.roll(lying.shape[-1] // 2, -1))"),
    Defect("int8", "moe_experts", "what is behind as it is", "groups, x.dtype).masked_fill_(nobodys[:, None], 0)",
           "groups, x.dtype)"),
    Defect("int8", "moe_experts", "choices that went nowhere at row 1", "places % M,", "places.abs(),"),
    Defect("int8", "moe_experts", "the rows' scales for the activations'", "_grouped(h, each, w2", "_grouped(h, scale, w2"),
    Defect("int8_caches", "kv_write", "codes by the op's scale", "codes, scale = schemes.quantised(scheme, first).values()",
           "codes, scale = coded(first)\n            scale = scale[:, None].half()"),
    Defect("int8_caches", "kv_write", "scales before rotated keys", "    parts[pages.spec.fields[1][0]] = second\n",
           '    parts |= {f"{name}_scale": scale, pages.spec.fields[1][0]: second}\n'),
    Defect("int8_caches", "kv_write", "one scale for a row", "tile = scheme.block[1] or width", "tile = width"),
    Defect("int8_caches", "kv_write", "slots of the fields in their memory", "indices=batch.native.rows",
           "indices=batch.native.slots[:, None].clamp(min=0)"),
    Defect("int8_caches", "indexer_topk", "without the queries' scales", "w.float() * each", "w.float()"),
    Defect("int8_caches", "indexer_topk", "queries' scales twice", "torch.ones_like(weights)", "each.half()"),
    Defect("int8_caches", "indexer_topk", "weights too small for float16", "2.0**15 /", "2.0**-20 /"),
    Defect("int8_caches", "indexer_topk", "weights beyond float16", "2.0**15 /", "2.0**17 /"),
    Defect("int8_caches", "indexer_topk", "the keys' scales in float32", "keys.spec.block_size, 1),",
           "keys.spec.block_size, 1).float(),"),
    Defect("int8_caches", "indexer_topk", "scales by slot, then page", ".view(keys.spec.n_blocks, keys.spec.block_size, 1),",
           ".view(keys.spec.block_size, keys.spec.n_blocks, 1).transpose(0, 1).contiguous(),"),
    Defect("int8_caches", "indexer_topk", "key lengths summed", "lengths_key=plan.kv_len",
           "lengths_key=plan.kv_len.cumsum(0).int()"),
    Defect("int8_caches", "indexer_topk", "rows see what comes after them", "sparse_count=k,\n            sparse_mode=3",
           "sparse_count=k,\n            sparse_mode=0"),
    Defect("int8_caches", "sparse_mla", "rotated before latent", "torch.cat([q_latent, q_rope]",
           "torch.cat([q_rope, q_latent]"),
    Defect("int8_caches", "sparse_mla", "scales before rotated keys",
           "codes, rotated, scales = rows.split([width, 128, 16], dim=1)",
           "codes, scales, rotated = rows.split([width, 16, 128], dim=1)"),
    Defect("int8_caches", "sparse_mla", "unscaled", "scale_value=scale", "scale_value=1.0"),
    Defect("int8_caches", "sparse_mla", "mode left to its default", "            attention_mode=2,\n", ""),
    Defect("int8_caches", "sparse_mla", "key lengths summed", "lengths_kv=plan.kv_len",
           "lengths_kv=plan.kv_len.cumsum(0).int()"),
    Defect("int8_caches", "sparse_mla", "rows without keys as they are", "return only_of_rows_with_keys(o, rows)", "return o"),
    Defect("int8_caches", "sparse_mla", "slots for positions", "sparse_indices=rows.indices[:, None].contiguous()",
           "sparse_indices=(rows.indices + plan.block_table[plan.row_request, :1] * kv.spec.block_size)[:, None].contiguous()"),
]  # fmt: skip


def planted(defect: Defect) -> Backend:
    """The backend that the edited source makes, with the other modules made anew around it."""
    names = [f"{ascend.__name__}.{module}" for module in MODULES]
    edited = f"{ascend.__name__}.{defect.module}"
    made: Backend = remade(names, edited, defect.name, defect.old, defect.new).Ascend()
    return made


def chosen(defect: Defect) -> list[Case]:
    """In bfloat16, the cheapest first."""
    if defect.op == "mla_prolog":
        return [Case.from_token(token) for token in PROLOG]
    plan = captured if defect.capture else cases
    found = [c for c in plan(contracts()[defect.op], STANDARD.name, ["bfloat16"]) if not c.fault and elements(c) <= LARGE]
    if defect.module.startswith("int8"):
        found = [c for c in found if "int8" in c.token] + [Case.from_token(token) for token in INT8.get(defect.op, ())]
    return sorted(found, key=elements)


def missed(defects: list[Defect]) -> list[str]:
    """Those that no case caught, in words."""
    emulated.install()
    found = []
    for defect in defects:
        result, tried = first_failing(chosen(defect), Bindings(planted(defect)), STANDARD.name)
        if result is None:
            found.append(f"{defect.op}: {defect.name}, in {tried} cases")
    return found


if __name__ == "__main__":
    wanted = sys.argv[1:]
    print(*missed([d for d in DEFECTS if not wanted or {d.op, d.module} & {*wanted}]), sep="\n")
