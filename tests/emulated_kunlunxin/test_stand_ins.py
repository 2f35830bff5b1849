"""Kunlunxin's stand-ins compute what the call sites say, refuse what no call shows, and promise no more."""

import inspect
import math

import pytest
import torch

from porthal.backends.kunlunxin import emulated
from tests.emulated_kunlunxin.given import BF16, I8, I32, close, codes, ints, refused

# Names, order and defaults, as calls of baidu/vLLM-Kunlun f3afc19 have them; * where arguments are only passed by name.
SIGNATURES = {
    "rmsnorm": "(x, weight, output, eps)",
    "add_rmsnorm": "(x, y, *, residual_output, weight, eps, output)",
    "swiglu": "(*, x, y)",
    "silu_and_mul": "(x, *, axis, turn, out)",
    "rotary_embedding": "(*, positions, query, key, head_size, cos_sin_cache, is_neox)",
    "quant2d": "(x, y, max, force_sdnn=False)",
    "matmul": "(*, x, w, out, x_trans, w_trans, alpha, beta, bias=None, x_max=None, w_max=None, x_pc_max=None, "
              "w_pc_max=None)",
    "concat_and_cache_mla": "(kv_c, k_pe, slot_mapping, kv_cache)",
    "sparse_prefill_fwd_opt": "(*, q, kv, indices, out, max_logits, lse, sm_scale, qlod_cpu=None, qlod_xpu=None, "
                              "kvlod_cpu=None, kvlod_xpu=None, d_v=-1, is_causal=True, use_xfa_boost=False)",
    "fwd_kvcache_mla": "(*, q_c, kv_cache, indices, kv_lod_cpu, out, max_logits, p_sums, softmax_scale, max_seq_kv, "
                       "q_r=None, pe_cache=None, use_xfa_boost=False, kv_lod_xpu=None)",
    "I8_mqa_logits": "(*, q, fused_kv_cache, weights, context_q_lens, context_k_lens, logits, clean_logits, max_seq_q=0, "
                     "max_seq_k=0, is_causal=False, use_xfa_boost=False)",
    "I8_paged_mqa_logits": "(*, q, fused_kv_cache, weights, context_lens, block_table, max_context_len, clean_logits, out, "
                           "use_xfa_boost=False)",
    "fast_topkv2": "(*, score, lengths, topk)",
    "moe_sigmoid_group_topk_norm": "(*, x, norm_score, topk_index, block_static, bias, n_group, topk_group, scale)",
    "gen_block_statistic": "(topk_ids, block_statistic)",
    "moe_pre_sorted": "(x, topk_index, block_statistic, moe_expand, moe_index, expert_m, sorted_tokens_num_lod, "
                      "index_have_neg=False)",
    "moe_fc": "(*, x, weight, sorted_tokens_num_lod, sorted_tokens_idx, moe_topk, y, act=None, x_perchannel_max=None, "
              "w_perchannel_max=None, topk_ids=None, topk_w=None, bias=None, tgemm_type=None, tweight_type=None, scale_n=0, "
              "scale_k=0, use_pack_int4=False, sort_mode=True)",
    "moe_post": "(x, moe_index, normed_scale, dequant_scale, y)",
}
XSPEEDGATE = {"moe_pre_small", "mask_for_I8_mqa_logits", "topk_per_row", "convert_req_index_to_global_index",
              "indexer_k_quant_and_cache", "cp_gather_indexer_k_quant_cache", "flashinfer_rotary_embedding"}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(kunlun_ops, name):
    assert str(inspect.signature(getattr(kunlun_ops, name))) == SIGNATURES[name]


def test_every_function_says_how_well_it_is_known(xspeedgate_ops):
    assert set(emulated.KUNLUN_OPS) == set(SIGNATURES)
    assert set(emulated.CONFIDENCE) == {*(f"kunlun_ops.{name}" for name in SIGNATURES),
                                        *(f"xspeedgate_ops.{name}" for name in XSPEEDGATE)}
    assert {schema.partition("(")[0] for schema in emulated.SCHEMAS} == XSPEEDGATE
    assert all(hasattr(xspeedgate_ops, name) for name in XSPEEDGATE)


def test_modules_say_that_they_are_emulated(kunlun_ops):
    import torch_xmlir
    import xspeedgate_ops

    assert torch_xmlir.xpu.device_count() == 1
    assert not hasattr(torch_xmlir.xpu, "memory_allocated")
    assert all("emulated_modules" in m.__version__ and "`cpu`" in m.__doc__ for m in (kunlun_ops, torch_xmlir, xspeedgate_ops))
    assert emulated.install() is kunlun_ops


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_norms(kunlun_ops, dtype, weight_dtype):
    x, y, weight = torch.randn(5, 96).to(dtype), torch.randn(5, 96).to(dtype), torch.randn(96).to(weight_dtype or dtype)
    out = torch.empty_like(x)
    assert kunlun_ops.rmsnorm(x, weight, out, 1e-5) is None
    d = x.double()
    close(out, d / (d.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double())
    d = d + y.double()
    kunlun_ops.add_rmsnorm(x, y, residual_output=y, weight=weight, eps=1e-5, output=x)  # both in place, as vLLM-Kunlun does
    close(y, d)
    close(x, d / (d.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double(), 2**-6)
    assert emulated.calls == {"rmsnorm": 1, "add_rmsnorm": 1}


def test_norms_refuse(kunlun_ops):
    x, weight, out = torch.randn(4, 8).to(BF16), torch.ones(8), torch.empty(4, 8, dtype=BF16)
    with pytest.raises(TypeError):
        kunlun_ops.rmsnorm(x, weight, 1e-5, out=out)  # as a function of vLLM-Kunlun has it that nothing calls
    refused("contiguous", kunlun_ops.rmsnorm, x=x.t(), weight=torch.ones(4), output=out.t(), eps=1e-5)
    refused("weight.dtype", kunlun_ops.rmsnorm, x=x, weight=weight.half(), output=out, eps=1e-5)
    refused("output.dtype", kunlun_ops.rmsnorm, x=x, weight=weight, output=out.float(), eps=1e-5)


def test_swiglu(kunlun_ops):
    x = torch.randn(2, 3, 16).to(BF16)
    want = torch.nn.functional.silu(x[..., :8].double()) * x[..., 8:].double()
    out, other = torch.empty(2, 3, 8, dtype=BF16), torch.empty(2, 3, 8, dtype=BF16)
    kunlun_ops.swiglu(x=x, y=out)
    kunlun_ops.silu_and_mul(x, axis=-1, turn=True, out=other)
    close(out, want)
    assert torch.equal(out, other)
    refused("turn is False", kunlun_ops.silu_and_mul, x=x, axis=-1, turn=False, out=out)
    refused("y.shape", kunlun_ops.swiglu, x=x, y=x)


def turned(x, angle, neox):
    n = angle.shape[-1]
    u, v = (x[..., :n], x[..., n : 2 * n]) if neox else (x[..., 0 : 2 * n : 2], x[..., 1 : 2 * n : 2])
    a = angle.double()[:, None]
    u, v = u.double() * a.cos() - v.double() * a.sin(), v.double() * a.cos() + u.double() * a.sin()
    head = torch.cat([u, v], -1) if neox else torch.stack([u, v], -1).flatten(-2)
    return torch.cat([head, x[..., 2 * n :].double()], -1)


@pytest.mark.parametrize("neox", [True, False])
def test_rotary(kunlun_ops, xspeedgate_ops, neox):
    angle, places = torch.rand(20, 4), ints(3, 19, 0, dtype=torch.int64)
    table = torch.cat([angle.cos(), angle.sin()], 1)
    q, k = torch.randn(3, 2, 12), torch.randn(3, 1, 12)
    wants = [turned(x, angle[places], neox) for x in (q, k)]
    given = {"positions": places, "head_size": 12, "cos_sin_cache": table}
    flat = q.reshape(3, 24).clone()
    heads = k.clone()
    kunlun_ops.rotary_embedding(**given, query=flat, key=heads, is_neox=neox)
    close(flat.view(3, 2, 12), wants[0], 1e-5)
    close(heads, wants[1], 1e-5)
    refused("cos_sin_cache.dtype", kunlun_ops.rotary_embedding, **given, query=flat.to(BF16), key=heads, is_neox=neox)
    refused("positions", kunlun_ops.rotary_embedding, **{**given, "positions": places + 1}, query=flat, key=heads,
            is_neox=neox)
    refused("contiguous", kunlun_ops.rotary_embedding, **given, query=torch.randn(3, 36)[:, :24], key=heads, is_neox=neox)
    fused = {**given, "rotary_dim": 8, "is_neox_style": neox, "offsets": None}
    got = xspeedgate_ops.flashinfer_rotary_embedding(**fused, query=q, key=k)
    for x, want in zip(got, wants):
        close(x, want, 1e-5)
    assert q.isnan().all() and k.isnan().all()
    refused("offsets", xspeedgate_ops.flashinfer_rotary_embedding, **{**fused, "offsets": places}, query=q, key=k)
    refused("rotary_dim", xspeedgate_ops.flashinfer_rotary_embedding, **{**fused, "rotary_dim": 4}, query=q, key=k)


def test_quant2d_gives_the_maximum_not_a_scale(kunlun_ops):
    x = torch.randn(6, 32).to(BF16)
    y, top = torch.empty(6, 32, dtype=I8), torch.empty(6, 1)
    kunlun_ops.quant2d(x, y, top)
    close(top[:, 0], x.double().abs().amax(1), 0, 0)
    close(y.double() * top.double() / 127, x, 0, float(top.max()) / 254 * 1.01)
    assert (y.abs().amax(1) == 127).all()
    zero = torch.zeros(1, 32, dtype=BF16)
    kunlun_ops.quant2d(x=zero, y=y[:1], max=top[:1], force_sdnn=True)
    assert not y[0].any() and not top[0].any()
    refused("max.shape", kunlun_ops.quant2d, x=x, y=y, max=top[:3])
    refused("y.dtype", kunlun_ops.quant2d, x=x, y=y.int(), max=top)


def test_matmul(kunlun_ops):
    a, b, bias = torch.randn(5, 32).to(BF16), torch.randn(7, 32).to(BF16), torch.randn(7)
    out = torch.empty(5, 7, dtype=BF16)
    given = {"x_trans": False, "w_trans": True, "alpha": 1.0, "beta": 0.0, "out": out}
    kunlun_ops.matmul(x=a, w=b, bias=bias, **given)
    close(out, a.double() @ b.double().T + bias.double(), 2**-7, 2e-2)
    x, w, x_top, w_top = codes(5, 32), codes(7, 32), torch.rand(5, 1), torch.rand(7, 1)
    kunlun_ops.matmul(x=x, w=w, x_pc_max=x_top, w_pc_max=w_top, **given)
    close(out, (x.double() * x_top.double() / 127) @ (w.double() * w_top.double() / 127).T, 2**-7, 1e-3)
    refused("x's maxima is None", kunlun_ops.matmul, x=x, w=w, **given)
    refused("x_trans", kunlun_ops.matmul, x=a, w=b, **{**given, "w_trans": False})
    refused("alpha", kunlun_ops.matmul, x=a, w=b, **{**given, "beta": 1.0})


def test_concat_and_cache_mla(kunlun_ops):
    kv_c, k_pe = torch.randn(3, 512).to(BF16), torch.randn(3, 64).to(BF16)
    cache = torch.zeros(2, 4, 576, dtype=BF16)
    slots = ints(6, 0, 3, dtype=torch.int64)
    kunlun_ops.concat_and_cache_mla(kv_c, k_pe, slots, cache)
    assert torch.equal(cache.view(8, 576)[slots], torch.cat([kv_c, k_pe], 1))
    assert not cache.view(8, 576)[[1, 2, 4, 5, 7]].any()
    given = {"kv_c": kv_c, "k_pe": k_pe, "kv_cache": cache}
    refused("slot_mapping", kunlun_ops.concat_and_cache_mla, **given, slot_mapping=slots - 1)
    refused("slot_mapping", kunlun_ops.concat_and_cache_mla, **given, slot_mapping=slots + 2)
    refused("slot_mapping.dtype", kunlun_ops.concat_and_cache_mla, **given, slot_mapping=slots.int())
    refused("contiguous", kunlun_ops.concat_and_cache_mla, kv_c=kv_c, k_pe=torch.randn(3, 99).to(BF16)[:, :64],
            kv_cache=cache, slot_mapping=slots)


def test_slots_of_positions(xspeedgate_ops):
    table = ints([7, 2, -1], [0, 5, 1])
    found = xspeedgate_ops.convert_req_index_to_global_index(
        req_id=ints(1, 0), block_table=table, token_indices=ints([8, 3, -1, -1], [4, 0, 1, -1]), block_size=4,
        num_topk_tokens=4)
    assert found.dtype == I32
    assert found.tolist() == [[4, 3, -1, -1], [8, 28, 29, -1]]
    call = xspeedgate_ops.convert_req_index_to_global_index
    given = {"block_table": table, "block_size": 4, "num_topk_tokens": 1}
    refused("block_table is below 0", call, req_id=ints(0), token_indices=ints([9]), **given)
    refused("token_indices is 12", call, req_id=ints(0), token_indices=ints([12]), **given)
    refused("req_id", call, req_id=ints(2), token_indices=ints([0]), **given)


def test_codes_of_keys_into_pages_and_out_of_them(xspeedgate_ops):
    k = torch.randn(6, 128).to(BF16)
    cache = torch.zeros(4, 4, 132, dtype=torch.uint8)
    slots = ints(12, 13, 14, 15, 0, 5, dtype=torch.int64)
    xspeedgate_ops.indexer_k_quant_and_cache(k, cache, slots, 128, "ue8m0")
    page = cache[3].view(-1)  # all codes of a page, then all of its scales
    scale = page[512:].view(torch.float32)
    close(scale, k[:4].double().abs().amax(1) / 127, 1e-6)
    close(page[:512].view(I8).view(4, 128).double() * scale.double()[:, None], k[:4], 0, float(scale.max()) * 0.51)
    dst_k, dst_scale = torch.empty(5, 128, dtype=I8), torch.empty(5, 4, dtype=torch.uint8)
    given = {"kv_cache": cache, "dst_k": dst_k, "dst_scale": dst_scale}
    xspeedgate_ops.cp_gather_indexer_k_quant_cache(**given, block_table=ints([3, -1], [0, -1]), cu_seq_lens=ints(0, 4, 5))
    close(dst_k.double() * dst_scale.view(torch.float32).double(), k[:5], 0, float(scale.max()) * 0.6)
    refused("block_table", xspeedgate_ops.cp_gather_indexer_k_quant_cache, **given, block_table=ints([3, -1], [4, 1]),
            cu_seq_lens=ints(0, 4, 5))
    refused("cu_seq_lens", xspeedgate_ops.cp_gather_indexer_k_quant_cache, **given, block_table=ints([3, -1], [0, 1]),
            cu_seq_lens=ints(0, 4, 6))
    with pytest.raises(RuntimeError, match="slot_mapping"):
        xspeedgate_ops.indexer_k_quant_and_cache(k, cache, slots - 1, 128, "ue8m0")
    with pytest.raises(RuntimeError, match="quant_block_size"):
        xspeedgate_ops.indexer_k_quant_and_cache(k, cache, slots, 64, "ue8m0")


def attended(q, rows, scale):
    """Output, largest score and sum of exponents of [heads, 576] over [keys, 576]."""
    scores = q.double() @ rows.double().T * scale
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    return p @ rows.double()[:, :512] / p.sum(-1, keepdim=True), scores.amax(-1), p.sum(-1)


def prefill(**changed):
    """Two requests of 3 and 1 rows over 5 and 4 keys, 4 indices a row."""
    torch.manual_seed(1)
    made = {"q": torch.randn(4, 2, 576).to(BF16), "kv": torch.randn(40, 576).to(BF16),
            "indices": ints([[9, 31, 2, -1]], [[30, 2, 9, 31]], [[9, 4, 2, 31]], [[0, 39, 20, 11]]),
            "out": torch.empty(4, 2, 512, dtype=BF16), "max_logits": torch.empty(4, 2), "lse": torch.empty(4, 2),
            "sm_scale": 0.04, "d_v": 512}
    q_ends, kv_ends = changed.pop("qlod", (0, 3, 4)), changed.pop("kvlod", (0, 5, 9))
    lods = {"qlod_cpu": ints(*q_ends), "qlod_xpu": ints(*q_ends), "kvlod_cpu": ints(*kv_ends), "kvlod_xpu": ints(*kv_ends)}
    return {**made, **lods, **changed}


def test_sparse_prefill(kunlun_ops):
    given = prefill()
    assert kunlun_ops.sparse_prefill_fwd_opt(**given) is None
    for row, names in enumerate(given["indices"][:, 0].tolist()):
        o, top, total = attended(given["q"][row], given["kv"][[n for n in names if n >= 0]], 0.04)
        close(given["out"][row], o, 2**-7, 1e-3)
        close(given["max_logits"][row], top, 1e-4)
        close(given["lse"][row], top + total.log(), 1e-4)
    empty = prefill(kvlod=(0, 5, 5))
    empty["indices"][3] = -1
    kunlun_ops.sparse_prefill_fwd_opt(**empty)
    assert empty["out"][3].isnan().all() and torch.equal(empty["out"][:3], given["out"][:3])


@pytest.mark.parametrize(("sentence", "changed"), [
    ("in the 4 places", {"kvlod": (0, 6, 10)}),  # one key more than its first row names
    ("-1 behind the 2", {"kvlod": (0, 4, 8)}),
    ("kvlod", {"kvlod": (0, 2, 6)}),
    (r"qlod\[-1\]", {"qlod": (0, 3, 3)}),
    ("kvlod, the host's", {"kvlod_cpu": ints(0, 5, 8)}),
    ("qlod_cpu", {"qlod_cpu": None}),
    ("kv.dim", {"kv": torch.zeros(40, 1, 576, dtype=BF16)}),
    ("kv.dtype", {"kv": torch.zeros(40, 576)}),
    ("q.shape", {"q": torch.zeros(4, 2, 512, dtype=BF16)}),
    ("d_v", {"d_v": 256}),
    ("is_causal", {"is_causal": False}),
    ("contiguous", {"kv": torch.zeros(40, 600, dtype=BF16)[:, :576]}),
    ("slots 0 to 30", {"kv": torch.zeros(31, 576, dtype=BF16)}),
])
def test_sparse_prefill_refuses(kunlun_ops, sentence, changed):
    refused(sentence, kunlun_ops.sparse_prefill_fwd_opt, **prefill(**changed))


def decode(lens, rows=1, **changed):
    torch.manual_seed(2)
    indices = torch.stack([torch.randperm(40)[:6] for _ in range(len(lens) * rows)]).int().view(len(lens), rows, 6)
    shape = (len(lens), rows, 2)
    return {"q_c": torch.randn(*shape, 576).to(BF16), "kv_cache": torch.randn(40, 576).to(BF16), "indices": indices,
            "kv_lod_cpu": ints(*lens), "kv_lod_xpu": ints(*lens), "out": torch.empty(*shape, 512, dtype=BF16),
            "max_logits": torch.empty(shape), "p_sums": torch.empty(shape), "softmax_scale": 0.04,
            "max_seq_kv": max(lens), **changed}


@pytest.mark.parametrize("rows", [1, 2])
def test_sparse_decode(kunlun_ops, rows):
    given = decode([9, 3, 2], rows)
    if rows == 2:
        given["indices"][1, 0, 2:] = given["indices"][2, 0, 1:] = -1
    kunlun_ops.fwd_kvcache_mla(**given)
    for request, length in enumerate([9, 3, 2]):
        for row in range(rows):
            count = min(length - rows + 1 + row, 6)
            names = given["indices"][request, row, :count].tolist()
            o, top, total = attended(given["q_c"][request, row], given["kv_cache"][names], 0.04)
            close(given["out"][request, row], o, 2**-7, 1e-3)
            close(given["max_logits"][request, row], top, 1e-4)
            close(given["p_sums"][request, row], total, 1e-4)


def test_sparse_decode_of_no_keys_and_refusals(kunlun_ops):
    given = decode([4, 0])
    kunlun_ops.fwd_kvcache_mla(**given)
    assert given["out"][1].isnan().all() and (given["max_logits"][1] == -1e12).all() and not given["p_sums"][1].any()
    assert not given["out"][0].isnan().any()
    call = kunlun_ops.fwd_kvcache_mla
    early = decode([4, 4])
    early["indices"][1, 0, 2:] = -1
    refused("in the 4 places", call, **early)  # -1 does not end a row, its length does
    refused("-1 behind the 3", call, **decode([4], 2))
    refused("q_c.shape", call, **decode([9, 9], 3))
    refused("kv_lod, the host's", call, **decode([4, 4], kv_lod_cpu=ints(4, 3)))
    refused("kv_lod is None", call, **decode([4, 4], kv_lod_xpu=None))
    refused("max_seq_kv", call, **decode([4, 4], max_seq_kv=3))
    refused("q_r", call, **decode([4, 4], q_r=torch.zeros(1)))
    refused("kv_cache.dtype", call, **decode([4], kv_cache=torch.zeros(40, 576, dtype=torch.uint8)))


def scores(rows=5, keys=20, heads=4, size=16, **changed):
    lods = ints(0, rows), ints(0, keys)
    return {"q": codes(rows, heads, size), "fused_kv_cache": (codes(keys, size), torch.rand(keys, 1)),
            "weights": torch.randn(rows, heads), "context_q_lens": (lods[0], lods[0].clone()),
            "context_k_lens": (lods[1], lods[1].clone()), "logits": torch.empty(rows, keys), "clean_logits": True, **changed}


def test_scores(kunlun_ops, xspeedgate_ops):
    given = scores()
    kunlun_ops.I8_mqa_logits(**given)
    k, scale = given["fused_kv_cache"]
    products = torch.einsum("mhd,nd->mhn", given["q"].double(), k.double()).relu()
    want = torch.einsum("mh,mhn->mn", given["weights"].double(), products) * scale.double()[:, 0]
    close(given["logits"], want, 1e-4, 1e-2)
    starts, ends = ints(0, 0, 3, 3, 19), ints(1, 2, 9, 20, 20)
    xspeedgate_ops.mask_for_I8_mqa_logits(seq_len_kv=20, cu_seqlen_ks=starts, cu_seqlen_ke=ends, logits=given["logits"])
    at = torch.arange(20)
    seen = (at >= starts[:, None]) & (at < ends[:, None])
    close(given["logits"][seen], want[seen], 1e-4, 1e-2)
    assert (given["logits"][~seen] == -math.inf).all()
    for bad in ((starts, starts), (starts, ends + 1), (ends, starts)):  # each traps a P800
        refused("0 <= ks < ke <= 20", xspeedgate_ops.mask_for_I8_mqa_logits, seq_len_kv=20, cu_seqlen_ks=bad[0],
                cu_seqlen_ke=bad[1], logits=given["logits"])


@pytest.mark.parametrize(("sentence", "changed"), [
    ("context_q_lens", {"context_q_lens": (ints(0, 2, 5), ints(0, 2, 5))}),
    ("context_k_lens, the host's", {"context_k_lens": (ints(0, 20), ints(0, 19))}),
    ("q.dtype", {"q": torch.zeros(5, 4, 16)}),
    ("weights.dtype", {"weights": torch.zeros(5, 4, dtype=BF16)}),
    ("is_causal", {"is_causal": True}),
])
def test_scores_refuse(kunlun_ops, sentence, changed):
    refused(sentence, kunlun_ops.I8_mqa_logits, **scores(**changed))


@pytest.mark.parametrize("rows", [1, 2])
def test_paged_scores(kunlun_ops, rows):
    pages = codes(6, 32 * 16 + 64).as_strided((6, 32, 1, 16), (32 * 16 + 64, 16, 16, 1))
    counts, table, scale = [70, 5], ints([5, 0, 3, -1], [2, -1, -1, -1]), torch.rand(2, 128)
    given = {"q": codes(2, rows, 4, 16), "fused_kv_cache": [pages, scale], "weights": torch.randn(2, rows, 4),
             "context_lens": [ints(*counts), ints(*counts)], "block_table": table, "max_context_len": 128,
             "clean_logits": True, "out": torch.zeros(2, rows, 128)}
    kunlun_ops.I8_paged_mqa_logits(**given)
    for request, count in enumerate(counts):
        keys = torch.cat([pages[b, :, 0] for b in table[request].tolist() if b >= 0])
        for row in range(rows):
            seen = count - rows + row + 1
            products = (given["q"][request, row].double() @ keys[:seen].double().T).relu()
            want = given["weights"][request, row].double() @ products * scale[request, :seen].double()
            close(given["out"][request, row, :seen], want, 1e-4, 1e-2)
            assert given["out"][request, row, seen:].isnan().all()
    refused("block_table", kunlun_ops.I8_paged_mqa_logits, **{**given, "context_lens": [ints(97, 5), ints(97, 5)]})
    refused("max_context_len", kunlun_ops.I8_paged_mqa_logits, **{**given, "max_context_len": 100})
    refused("context_lens, the host's", kunlun_ops.I8_paged_mqa_logits, **{**given, "context_lens": [ints(1, 1), ints(1, 2)]})
    refused("k_scale.shape", kunlun_ops.I8_paged_mqa_logits, **{**given, "fused_kv_cache": [pages, scale[:1]]})


def per_row(logits, found, **how):
    given = {"rowStarts": None, "rowEnds": None, "seqLens": None, "next_n": None, **how}
    return {"logits": logits, "srcIndices": found, "numRows": len(logits), "stride0": logits.stride(0),
            "stride1": logits.stride(1), "topK": 2048, **given}


def test_topk_per_row(kunlun_ops, xspeedgate_ops):
    logits = torch.randn(4, 2100)
    logits[0, :2100] = 1.0  # all alike: the last 2048 are as good as any
    starts, ends = ints(0, 10, 0, 7), ints(2100, 2100, 5, 7)
    found = torch.full((4, 2048), -1, dtype=I32)
    xspeedgate_ops.topk_per_row(**per_row(logits, found, rowStarts=starts, rowEnds=ends))
    assert sorted(found[0].tolist()) == list(range(52, 2100))
    assert set(found[1].tolist()) == set(logits[1, 10:].topk(2048).indices.tolist())
    assert set(found[2, :5].tolist()) == set(range(5)) and (found[2, 5:] == -1).all() and (found[3] == -1).all()
    for rows in (1, 2):
        again = torch.full((4, 2048), 77, dtype=I32)
        lens = ints(*[9] * (4 // rows))
        xspeedgate_ops.topk_per_row(**per_row(logits, again, seqLens=lens, next_n=rows))
        for row in range(4):
            seen = 9 - rows + row % rows + 1
            assert sorted(again[row, :seen].tolist()) == list(range(seen))
            assert (again[row, seen:] == 77).all()
    fast = kunlun_ops.fast_topkv2(score=logits, lengths=ints(2100, 2090, 5, 0), topk=2048)
    assert fast.dtype == I32 and sorted(fast[0].tolist()) == list(range(52, 2100))
    assert set(fast[1].tolist()) == set(logits[1, :2090].topk(2048).indices.tolist())
    assert set(fast[2, :5].tolist()) == set(range(5)) and (fast[2, 5:].long().abs() > 2100).all()


def test_topk_refuses(kunlun_ops, xspeedgate_ops):
    logits, found = torch.randn(2, 30), torch.full((2, 2048), -1, dtype=I32)
    good = per_row(logits, found, rowStarts=ints(0, 0), rowEnds=ints(30, 3))
    refused("topK is 512", xspeedgate_ops.topk_per_row, **{**good, "topK": 512})
    refused("srcIndices.shape", xspeedgate_ops.topk_per_row, **{**good, "srcIndices": found[:, :512]})
    refused("stride0", xspeedgate_ops.topk_per_row, **{**good, "stride0": 1})
    refused("start <= end <= 30", xspeedgate_ops.topk_per_row, **{**good, "rowEnds": ints(31, 3)})
    refused("rowStarts", xspeedgate_ops.topk_per_row, **{**good, "seqLens": ints(3, 3), "next_n": 1})
    refused("topk is 512", kunlun_ops.fast_topkv2, score=logits, lengths=ints(1, 1), topk=512)
    refused("lengths", kunlun_ops.fast_topkv2, score=logits, lengths=ints(31, 1), topk=2048)
