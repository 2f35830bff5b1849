"""kunlun_ops: sparse attention over a latent cache of slots, for prefill and for decode."""

import math
from itertools import pairwise

import torch

from porthal.backends.kunlunxin.emulated.vectors import HALVES
from porthal.backends.torch.emulation.stand_in import (
    lengths,
    need,
    need_absent,
    need_dense,
    need_dtype,
    need_rank,
    need_shape,
)

LATENT, WIDTH = 512, 576


def both(op, name, on_cpu, on_xpu, count):
    """Numbers given twice, on the host and on the device."""
    need(on_cpu is not None and on_xpu is not None, op, name, None, "the host's copy and the device's")
    numbers = lengths(op, f"{name}, the device's", on_xpu)
    need(lengths(op, f"{name}, the host's", on_cpu) == numbers, op, f"{name}, the host's", on_cpu.tolist(), str(numbers))
    need(len(numbers) == count, op, f"{name}, length", len(numbers), str(count))
    return numbers


def _inputs(op, q, cache_name, cache, indices, out, floats, dtypes):
    need_dtype(op, "q", q, *dtypes)
    need_dtype(op, cache_name, cache, q.dtype)
    need_dtype(op, "indices", indices, torch.int32)
    need_dtype(op, "out", out, q.dtype)
    need_dense(op, q=q, indices=indices, out=out, **{cache_name: cache}, **floats)
    need_rank(op, cache_name, cache, 2)
    need(q.shape[-1] == WIDTH, op, "q.shape[-1]", q.shape[-1], f"{WIDTH}, {LATENT} and the rotated part")
    need_shape(op, cache_name, cache, [len(cache), WIDTH])
    need_shape(op, "out", out, [*q.shape[:-1], LATENT])
    for name, tensor in floats.items():
        need_dtype(op, name, tensor, torch.float32)
        need_shape(op, name, tensor, q.shape[:-1])


def _attend(q, rows, scale):
    """One row's heads [heads, 576] over [keys, 576]: output, largest score, sum of exponents over it."""
    if not len(rows):
        nothing = torch.full(q.shape[:1], -1e12)
        return torch.full((len(q), LATENT), math.nan), nothing, torch.zeros(len(q))
    scores = q.float() @ rows.float().T * scale
    top = scores.amax(-1)
    p = (scores - top[:, None]).exp()
    return p @ rows[:, :LATENT].float() / p.sum(-1, keepdim=True), top, p.sum(-1)


def sparse_prefill_fwd_opt(*, q, kv, indices, out, max_logits, lse, sm_scale, qlod_cpu=None, qlod_xpu=None, kvlod_cpu=None,
                           kvlod_xpu=None, d_v=-1, is_causal=True, use_xfa_boost=False):
    """q [tokens, heads, 576] over slots of kv named by indices [tokens, 1, k], the named ones first and the rest -1.

    Whether rows end at -1 or are counted from the lods is not published, so here both must agree: a row of a request has
    as many indices as it sees keys, up to k. Rows of a request without keys become NaN.
    """
    op = "sparse_prefill_fwd_opt"
    need_rank(op, "q", q, 3)
    _inputs(op, q, "kv", kv, indices, out, {"max_logits": max_logits, "lse": lse}, HALVES)
    need_shape(op, "indices", indices, [len(q), 1, indices.shape[-1]])
    need(d_v in (-1, LATENT), op, "d_v", d_v, f"{LATENT} or -1")
    need(is_causal is True and use_xfa_boost is False, op, "is_causal, use_xfa_boost", (is_causal, use_xfa_boost),
         "(True, False): no other is published")
    need(qlod_cpu is not None, op, "qlod_cpu", None, "a tensor")
    q_ends = both(op, "qlod", qlod_cpu, qlod_xpu, len(qlod_cpu))
    kv_ends = both(op, "kvlod", kvlod_cpu, kvlod_xpu, len(q_ends))
    for name, ends in (("qlod", q_ends), ("kvlod", kv_ends)):
        need(bool(ends) and ends[0] == 0 and ends == sorted(ends), op, name, ends, "ascending numbers from 0")
    need(q_ends[-1] == len(q), op, "qlod[-1]", q_ends[-1], str(len(q)))
    for (start, end), (first, last) in zip(pairwise(q_ends), pairwise(kv_ends)):
        before = last - first - (end - start)
        need(before >= 0 or first == last, op, "kvlod", kv_ends, "no keys, or at least as many as rows, in each request")
        for row in range(start, end):
            seen = 0 if first == last else before + row - start + 1
            used = _named(op, indices[row, 0], min(seen, indices.shape[-1]), len(kv))
            o, top, total = _attend(q[row], kv[used], sm_scale)
            out[row], max_logits[row], lse[row] = o, top, top + total.log()


def _named(op, row, count, most):
    """The first `count` indices, which must name slots, before nothing but -1."""
    used = row[:count].long()
    need(bool(((used >= 0) & (used < most)).all()), op, "indices", used.tolist(),
         f"slots 0 to {most - 1} in the {count} places that the lengths give")
    need(bool((row[count:] == -1).all()), op, "indices", row[count:].tolist(),
         f"-1 behind the {count} places that the lengths give")
    return used


def fwd_kvcache_mla(*, q_c, kv_cache, indices, kv_lod_cpu, out, max_logits, p_sums, softmax_scale, max_seq_kv, q_r=None,
                    pe_cache=None, use_xfa_boost=False, kv_lod_xpu=None):
    """q_c [requests, 1 or 2 rows, heads, 576]; kv_lod_* are lengths, not sums: how many of a row's indices are read.

    A row of length 0 becomes NaN, its largest score -1e12 and its sum 0. With two rows the first sees one key less; what
    is read behind its keys is not published, so -1 must stand there.
    """
    op = "fwd_kvcache_mla"
    need_rank(op, "q_c", q_c, 4)
    _inputs(op, q_c, "kv_cache", kv_cache, indices, out, {"max_logits": max_logits, "p_sums": p_sums}, (torch.bfloat16,))
    requests, rows, _, _ = q_c.shape
    need(rows in (1, 2), op, "q_c.shape[1]", rows, "1 or 2")
    need_shape(op, "indices", indices, [requests, rows, indices.shape[-1]])
    need_absent(op, "not in this stand-in", q_r=q_r, pe_cache=pe_cache)
    need(use_xfa_boost is False, op, "use_xfa_boost", use_xfa_boost, "False: no other is published")
    counts = both(op, "kv_lod", kv_lod_cpu, kv_lod_xpu, requests)
    need(max_seq_kv >= max(counts, default=0), op, "max_seq_kv", max_seq_kv, f"at least {max(counts, default=0)}")
    for request, length in enumerate(counts):
        need(length >= 0, op, "kv_lod", counts, "lengths from 0")
        for row in range(rows):
            given = indices[request, row]
            seen = min(max(length - rows + 1 + row, 0), len(given))
            if row == rows - 1:
                given = given[:seen]
            used = _named(op, given, seen, len(kv_cache))
            at = request, row
            out[at], max_logits[at], p_sums[at] = _attend(q_c[at], kv_cache[used], softmax_scale)
