"""Moore Threads' stand-ins compute the published formulas, refuse what the sources refuse, and promise no more."""

import inspect
import math

import pytest
import torch

from porthal.backends.moore_threads import emulated
from porthal.backends.torch.emulation.device import copies

BF16, F8 = torch.bfloat16, torch.float8_e4m3fn
# Name, order and default of every argument, as the definitions have them.
SIGNATURES = {
    "deep_gemm.m_grouped_bf16_gemm_nt_contiguous": "(a, b, d, m_indices, alignment_m=128)",
    "deep_gemm.m_grouped_bf16_gemm_nt_masked":
        "(a, b, d, masked_m, expected_m, compiled_dims='nk', enable_overlap=False, signal=None)",
    "deep_gemm.m_grouped_fp8_gemm_nt_contiguous":
        "(a, b, d, m_indices, recipe=None, compiled_dims='nk', disable_ue8m0_cast=True, alignment_m=128)",
    "deep_gemm.m_grouped_fp8_gemm_nt_masked":
        "(a, b, d, masked_m, expected_m, recipe=None, compiled_dims='nk', disable_ue8m0_cast=True, "
        "enable_overlap=False, signal=None)",
    "deep_gemm.fp8_gemm_nt": "(a, b, d, c=None, recipe=None, compiled_dims='nk', disable_ue8m0_cast=True)",
    "deep_gemm.bf16_gemm_nt": "(a, b, d, c=None, compiled_dims='nk')",
    "deep_gemm.get_paged_mqa_logits_metadata": "(context_lens, block_kv, num_mps=0)",
    "deep_gemm.fp8_paged_mqa_logits":
        "(q, fused_kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len, clean_logits)",
    "deep_gemm.fp8_mqa_logits":
        "(q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits=False, max_seqlen_k=0)",
    "flash_mla.get_mla_metadata": "(*args, **kwargs)",
    "flash_mla.flash_mla_with_kvcache":
        "(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None, "
        "softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None, attn_sink=None, extra_k_cache=None, "
        "extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None)",
    "flash_mla.flash_mla_sparse_fwd": "(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None)",
    "mate.moe_fused_gate":
        "(input, bias, num_expert_group, topk_group, topk, num_fused_shared_experts, routed_scaling_factor, renormalize, "
        "apply_routed_scaling_factor_on_output, num_token_non_padded=0, static_index_map=None, dynamic_index_map=None, "
        "dynamic_index_map_valid=None, random_index=None, num_physical_experts=0, map_policy=0)",
    "torch.nn.functional.rope":
        "(input, freq_cis, rotary_interleaved, batch_first, multi_latent_attention=False)",
    "torch.nn.functional.swish_glu": "(input)",
    "torch.swish_glu": "(input)",
}


def found(path):
    module, _, name = path.rpartition(".")
    return getattr(__import__(module, fromlist=["_"]), name)


def musa(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device="musa")


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures(path):
    assert str(inspect.signature(found(path))) == SIGNATURES[path]


def test_every_function_says_how_well_it_is_known():
    assert set(emulated.CONFIDENCE) == {*SIGNATURES, "torch.rms_norm"}
    assert {mark for mark, _ in emulated.CONFIDENCE.values()} == {"X"}


def test_the_device_says_what_torch_musa_says(torch_musa):
    properties = torch.musa.get_device_properties()
    assert (properties.major, properties.minor) == (3, 1) and properties.multi_processor_count > 0
    assert properties.total_memory > 0 and torch_musa.__version__ == "2.7.1+emulated"


@pytest.mark.parametrize(("dtype", "rtol"), [(BF16, 2**-8), (torch.float16, 2**-10), (torch.float32, 1e-6)])
def test_norm_and_swiglu(dtype, rtol):
    x, weight = torch.randn(3, 2, 96).to(dtype), torch.randn(96).to(dtype)
    y = torch.rms_norm(x.musa(), (96,), weight.musa(), 1e-5).cpu()
    want = x.double() / ((x.double() ** 2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(y.double(), want, rtol=rtol, atol=1e-6)
    glu = torch.nn.functional.swish_glu(x.musa()).cpu()
    gate, up = x.double().chunk(2, -1)
    torch.testing.assert_close(glu.double(), torch.nn.functional.silu(gate) * up, rtol=rtol, atol=1e-6)
    assert y.dtype == glu.dtype == dtype and emulated.calls == {"rms_norm": 1, "swish_glu": 1}
    torch.rms_norm(x, (96,))  # on the host it is PyTorch's own
    with pytest.raises(RuntimeError, match=r"rms_norm: weight\.dtype is torch\.float64"):
        torch.rms_norm(x.musa(), (96,), weight.double().musa(), 1e-5)
    with pytest.raises(RuntimeError, match="rms_norm: eps is None"):
        torch.rms_norm(x.musa(), (96,), weight.musa())


@pytest.mark.parametrize("latent", [False, True])
def test_rope_rotates_halves_or_pairs_and_leaves_these_apart(latent):
    x, angle = torch.randn(5, 2, 3, 8), torch.randn(5, 8)
    y = torch.nn.functional.rope(x.musa(), angle.musa(), False, False, multi_latent_attention=latent).cpu()
    a = angle.double()[:, None, None]
    even, odd = (x.double()[..., 0::2], x.double()[..., 1::2]) if latent else x.double().chunk(2, -1)
    low, high = a.chunk(2, -1)
    want = torch.cat([even * low.cos() - odd * low.sin(), odd * high.cos() + even * high.sin()], -1)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-6)
    for flags in ((True, False), (False, True)):
        with pytest.raises(RuntimeError, match="what True does is not published"):
            torch.nn.functional.rope(x.musa(), angle.musa(), *flags)
    with pytest.raises(RuntimeError, match=r"freq_cis\.dtype is torch\.float32"):
        torch.nn.functional.rope(x.bfloat16().musa(), angle.musa(), False, False)


def test_gate_is_the_formula():
    x, bias = torch.randn(6, 256), torch.randn(256)
    weights, ids = found("mate.moe_fused_gate")(x.musa(), bias.musa(), 1, 1, 8, 0, 2.5, True, True)
    score = torch.sigmoid(x.double())
    for w, chosen, s in zip(weights.cpu().double(), ids.cpu().long(), score):
        assert set(chosen.tolist()) == set((s + bias).topk(8).indices.tolist())
        torch.testing.assert_close(w, s[chosen] / s[chosen].sum() * 2.5, rtol=1e-5, atol=0)
    plain, _ = found("mate.moe_fused_gate")(x.musa(), bias.musa(), 1, 1, 8, 0, 2.5, False, False)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32 and (plain.cpu() < 1).all()


def test_gate_of_groups_padding_and_ties():
    gate = found("mate.moe_fused_gate")
    x, bias = torch.randn(4, 256), torch.randn(256)
    _, ids = gate(x.musa(), bias.musa(), 8, 4, 8, 0, 1.0, True, False, num_token_non_padded=3)
    choice = (torch.sigmoid(x) + bias).view(4, 8, 32)
    best = choice.topk(2).values.sum(-1).topk(4).indices
    masked = torch.full_like(choice, -math.inf).scatter_(1, best[..., None].expand(-1, -1, 32), 0) + choice
    for chosen, row in zip(ids.cpu()[:3].tolist(), masked.flatten(1)):
        assert set(chosen) == set(row.topk(8).indices.tolist())
    assert (ids.cpu()[3] == -1).all()
    _, tied = gate(torch.zeros(1, 256).musa(), torch.zeros(256).musa(), 1, 1, 8, 0, 1.0, True, False)
    row = tied.cpu()[0].tolist()
    assert set(row) == set(range(248, 256)) and row not in (sorted(row), sorted(row, reverse=True))


@pytest.mark.parametrize(("change", "message"), [
    (dict(bias=torch.zeros(256, dtype=BF16)), "bias.dtype is torch.bfloat16"),
    (dict(input=torch.zeros(4, 250), bias=torch.zeros(250)), r"input.shape\[1\] is 250"),
    (dict(num_fused_shared_experts=1), "num_fused_shared_experts is 1"),
    (dict(num_expert_group=3), "num_expert_group is 3"),
    (dict(input=torch.zeros(4, 512), bias=torch.zeros(512)), "experts in a group is 512"),
    (dict(routed_scaling_factor=0.0), "routed_scaling_factor is 0"),
    (dict(num_token_non_padded=9), "num_token_non_padded is 9"),
    (dict(map_policy=1), "map_policy is 1"),
    (dict(topk=257), "topk is 257"),
])
def test_gate_limits(change, message):
    call = dict(input=torch.zeros(4, 256), bias=torch.zeros(256), num_expert_group=1, topk_group=1, topk=8,
                num_fused_shared_experts=0, routed_scaling_factor=2.5, renormalize=True,
                apply_routed_scaling_factor_on_output=True) | change
    call = {n: x.musa() if isinstance(x, torch.Tensor) else x for n, x in call.items()}
    with pytest.raises(RuntimeError, match=f"moe_fused_gate: .*{message}"):
        found("mate.moe_fused_gate")(**call)


@pytest.fixture
def grouped():
    """Three experts, 100, 0 and 130 rows in tiles of 128; the expert of each row, -1 in padding."""
    ids = torch.full((384,), -1, dtype=torch.int32)
    ids[:100], ids[128 : 128 + 130] = 0, 2
    return torch.randn(384, 256).to(BF16), torch.randn(3, 96, 256).to(BF16), ids


def quantised(x, tall):
    """float8 codes and scales for tiles of tall x 128, and what they stand for."""
    rows, width = x.shape[-2:]
    tile = x.float().unflatten(-1, (width // 128, 128))
    top = tile.abs().amax(-1)
    if tall > 1:
        top = torch.nn.functional.pad(top, (0, 0, 0, -rows % tall)).unflatten(-2, (-1, tall)).amax(-2)
    scale = top.clamp(min=1e-4) / 448
    spread = scale.repeat_interleave(tall, -2)[..., :rows, :]
    codes = (tile / spread[..., None]).flatten(-2).to(F8)
    return (codes, scale), codes.double() * spread.double().repeat_interleave(128, -1)


def test_grouped_products(grouped):
    a, b, ids = grouped
    want = torch.einsum("rk,rnk->rn", a.double(), b.double()[ids.clamp(min=0).long()])
    d = torch.zeros(384, 96, dtype=BF16, device="musa")
    assert found("deep_gemm.m_grouped_bf16_gemm_nt_contiguous")(a.musa(), b.musa(), d, ids.musa()) is None
    real = ids >= 0
    torch.testing.assert_close(d.cpu()[real].double(), want[real], rtol=2**-7, atol=2e-3)
    assert d.cpu()[100:128].isnan().all() and d.cpu()[258:].isnan().all()
    (ca, sa), wa = quantised(a, 1)
    (cb, sb), wb = quantised(b, 128)
    found("deep_gemm.m_grouped_fp8_gemm_nt_contiguous")((ca.musa(), sa.musa()), (cb.musa(), sb.musa()), d, ids.musa())
    want = torch.einsum("rk,rnk->rn", wa, wb[ids.clamp(min=0).long()])
    torch.testing.assert_close(d.cpu()[real].double(), want[real], rtol=2**-7, atol=2e-3)


def test_grouped_products_of_masked_rows(grouped):
    a, b, _ = grouped
    a = a.view(3, 128, 256)
    counts = [5, 0, 128]
    d = torch.zeros(3, 128, 96, dtype=BF16, device="musa")
    want = torch.einsum("emk,enk->emn", a.double(), b.double())
    found("deep_gemm.m_grouped_bf16_gemm_nt_masked")(a.musa(), b.musa(), d, musa(*counts), 64)
    (ca, sa), wa = quantised(a, 1)
    (cb, sb), wb = quantised(b, 128)
    for _ in range(2):
        for e, count in enumerate(counts):
            torch.testing.assert_close(d.cpu()[e, :count].double(), want[e, :count], rtol=2**-7, atol=2e-3)
            assert d.cpu()[e, count:].isnan().all()
        want = torch.einsum("emk,enk->emn", wa, wb)
        found("deep_gemm.m_grouped_fp8_gemm_nt_masked")((ca.musa(), sa.musa()), (cb.musa(), sb.musa()), d, musa(*counts), 64)


def test_plain_products():
    a, b = torch.randn(5, 256).to(BF16), torch.randn(200, 256).to(BF16)
    d, c = torch.zeros(5, 200, device="musa"), torch.randn(5, 200)
    found("deep_gemm.bf16_gemm_nt")(a.musa(), b.musa(), d, c.musa())
    torch.testing.assert_close(d.cpu().double(), a.double() @ b.double().T + c.double(), rtol=1e-5, atol=1e-4)
    (ca, sa), wa = quantised(a, 1)
    (cb, sb), wb = quantised(b, 128)
    half = torch.zeros(5, 200, dtype=BF16, device="musa")
    found("deep_gemm.fp8_gemm_nt")((ca.musa(), sa.musa()), (cb.musa(), sb.musa()), half)
    torch.testing.assert_close(half.cpu().double(), wa @ wb.T, rtol=2**-7, atol=2e-3)


@pytest.mark.parametrize(("change", "message"), [
    (dict(alignment_m=64), "alignment_m is 64"),
    (dict(alignment_m=256), r"a.shape\[0\] is 384"),
    (dict(m_indices=torch.arange(384, dtype=torch.int32) % 3), "expected one expert in rows 0 to 127"),
    (dict(m_indices=torch.full((384,), 3, dtype=torch.int32)), "m_indices is 3"),
    (dict(m_indices=torch.zeros(384, dtype=torch.int64)), "m_indices.dtype is torch.int64"),
    (dict(m_indices=torch.zeros(3, dtype=torch.int32)), "m_indices.shape is"),
    (dict(a=torch.zeros(384, 256)), "a.dtype is torch.float32"),
    (dict(b=torch.zeros(3, 256, 96, dtype=BF16)), "b.shape is"),
    (dict(d=torch.zeros(384, 96)), "d.dtype is torch.float32"),
])
def test_grouped_limits(grouped, change, message):
    a, b, ids = grouped
    call = dict(a=a, b=b, d=torch.zeros(384, 96, dtype=BF16), m_indices=ids) | change
    call = {n: x.musa() if isinstance(x, torch.Tensor) else x for n, x in call.items()}
    with pytest.raises(RuntimeError, match=f"m_grouped_bf16_gemm_nt_contiguous: .*{message}"):
        found("deep_gemm.m_grouped_bf16_gemm_nt_contiguous")(**call)


def test_the_alignment_that_is_named_is_not_the_default():
    assert found("deep_gemm.get_mk_alignment_for_contiguous_layout")() == 256


@pytest.fixture
def scoring():
    """5 queries of 32 heads and 200 keys in float8; the scores in float64."""
    q = torch.randn(5, 32, 128).to(F8)
    keys, scale = torch.randn(200, 128).to(F8), torch.rand(200) + 0.5
    weights = torch.randn(5, 32)
    score = (weights.double()[..., None] * (q.double() @ (keys.double() * scale.double()[:, None]).T).relu()).sum(1)
    return q, (keys, scale), weights, score


def test_dense_scores(scoring):
    q, kv, weights, score = scoring
    start, end = [0, 3, 10, 0, 50], [200, 100, 10, 1, 64]
    call = (q.musa(), tuple(x.musa() for x in kv), weights.musa(), musa(*start), musa(*end))
    free, clean = found("deep_gemm.fp8_mqa_logits")(*call), found("deep_gemm.fp8_mqa_logits")(*call, clean_logits=True)
    narrow = found("deep_gemm.fp8_mqa_logits")(*call, max_seqlen_k=97).cpu()
    for t, (a, b) in enumerate(zip(start, end)):
        for y in (free.cpu()[t, a:b], clean.cpu()[t, a:b]):
            torch.testing.assert_close(y.double(), score[t, a:b], rtol=1e-5, atol=1e-3)
        kept = min(97, b - a)
        assert torch.equal(narrow[t, :kept], free.cpu()[t, a : a + kept]) and narrow[t, kept:].isnan().all()
        outside = torch.cat([clean.cpu()[t, :a], clean.cpu()[t, b:]])
        assert (outside == -math.inf).all()
        assert free.cpu()[t, b:].isnan().all()


@pytest.mark.parametrize("two", [False, True])
def test_paged_scores(scoring, two):
    q, (keys, scale), weights, _ = scoring
    table = torch.tensor([[4, 0, 3, 2], [1, 9, 9, 9]], dtype=torch.int32)
    cache = torch.zeros(5, 64 * 132, dtype=torch.uint8)
    for i, row in enumerate(table.tolist()):
        for page, block in enumerate(row[: 4 if i == 0 else 1]):
            span = slice(64 * page, min(200, 64 * page + 64))
            n = span.stop - span.start
            cache[block, : n * 128] = keys[span].view(torch.uint8).flatten()
            cache[block, 64 * 128 : 64 * 128 + 4 * n] = scale[span].view(torch.uint8)
    q, weights = q[:4].view(2, 2, 32, 128), weights[:4]
    lengths = torch.tensor([[190, 200], [7, 30]] if two else [200, 30], dtype=torch.int32)
    meta = found("deep_gemm.get_paged_mqa_logits_metadata")(lengths.musa(), 64)
    call = (q.musa(), cache.view(5, 64, 1, 132).musa(), weights.musa(), lengths.musa(), table.musa(), meta, 256)
    got = found("deep_gemm.fp8_paged_mqa_logits")(*call, True).cpu()
    free = found("deep_gemm.fp8_paged_mqa_logits")(*call, False).cpu()
    seen = [190, 200, 7, 30] if two else [199, 200, 29, 30]
    wide = keys.double() * scale.double()[:, None]
    for row, n in enumerate(seen):
        want = (weights[row].double()[:, None] * (q.flatten(0, 1)[row].double() @ wide[:n].T).relu()).sum(0)
        torch.testing.assert_close(got[row, :n].double(), want, rtol=1e-5, atol=1e-3)
        assert (got[row, n:] == -math.inf).all() and free[row, n:].isnan().all()
    stale = (*call[:3], torch.zeros_like(lengths).musa(), *call[4:])
    with pytest.raises(RuntimeError, match="schedule_meta is that of other lengths"):
        found("deep_gemm.fp8_paged_mqa_logits")(*stale, True)
    with pytest.raises(RuntimeError, match="max_context_len is 64"):
        found("deep_gemm.fp8_paged_mqa_logits")(*call[:6], 64, True)
    with pytest.raises(RuntimeError, match="block_kv is 128"):
        found("deep_gemm.get_paged_mqa_logits_metadata")(lengths.musa(), 128)
    with pytest.raises(TypeError, match="clean_logits"):
        found("deep_gemm.fp8_paged_mqa_logits")(*call)


@pytest.fixture
def attention():
    """Three rows of 64 heads over 90 keys in bfloat16: places in no order, -1 and past the end between; row 2 sees none."""
    q, kv = torch.randn(3, 64, 576).to(BF16), torch.randn(90, 1, 576).to(BF16)
    picked = torch.stack([torch.randperm(90)[:64] for _ in range(3)]).int()
    picked[0, 5], picked[0, 9], picked[2] = -1, 90, -1
    length = torch.tensor([64, 10, 64], dtype=torch.int32)
    want, lse = torch.zeros(3, 64, 512, dtype=torch.double), torch.full((3, 64), math.inf, dtype=torch.double)
    for t in (0, 1):
        chosen = picked[t, : length[t]]
        k = kv[chosen[(chosen >= 0) & (chosen < 90)].long(), 0].double()
        logits = q[t].double() @ k.T * 0.05
        want[t], lse[t] = torch.softmax(logits, -1) @ k[:, :512], logits.logsumexp(-1)
    return q, kv, picked, length, want, lse


def test_prefill_attention(attention):
    q, kv, picked, length, want, lse = attention
    sink = torch.randn(64)
    call = (q.musa(), kv.musa(), picked[:, None].musa(), 0.05)
    out, top, got = found("flash_mla.flash_mla_sparse_fwd")(*call, topk_length=length.musa())
    torch.testing.assert_close(out.cpu().double(), want, rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(got.cpu().double(), lse, rtol=1e-5, atol=1e-5)
    assert out.dtype == BF16 and (top.cpu()[2] == -math.inf).all() and (got.cpu()[2] == math.inf).all()
    sunk = found("flash_mla.flash_mla_sparse_fwd")(*call, attn_sink=sink.musa(), topk_length=length.musa())[0]
    scaled = want * torch.sigmoid(lse - sink)[..., None].nan_to_num()
    torch.testing.assert_close(sunk.cpu().double(), scaled, rtol=2**-6, atol=1e-5)


def test_a_key_behind_the_length_is_seen_if_it_is_not_a_number(attention):
    q, kv, picked, length, _, _ = attention
    kv[picked[1, 20]] = math.nan
    out = found("flash_mla.flash_mla_sparse_fwd")(q.musa(), kv.musa(), picked[:, None].musa(), 0.05, topk_length=length.musa())
    assert out[0].cpu()[1].isnan().all()


def packed(kv):
    """[n, 656] bytes of keys [n, 576], and what they stand for."""
    (codes, scale), wide = quantised(kv[:, :512], 1)
    raw = torch.cat([codes.view(torch.uint8), scale.contiguous().view(torch.uint8),
                     kv[:, 512:].contiguous().view(torch.uint8)], 1)
    return raw, torch.cat([wide, kv[:, 512:].double()], 1)


def test_decode_attention(attention):
    q, kv, picked, _, _, _ = attention
    raw, wide = packed(torch.nn.functional.pad(kv[:, 0], (0, 0, 0, 38)))
    q, picked = torch.stack([q[:2], q[1:]]), torch.stack([picked[:2], picked[1:]])
    length = torch.tensor([64, 7], dtype=torch.int32)
    schedule, nothing = found("flash_mla.get_mla_metadata")()
    call = dict(q=q.musa(), k_cache=raw.view(2, 64, 1, 656).musa(), block_table=None, cache_seqlens=None, head_dim_v=512,
                tile_scheduler_metadata=schedule, softmax_scale=0.05, is_fp8_kvcache=True, indices=picked.musa(),
                topk_length=length.musa())
    out, lse = found("flash_mla.flash_mla_with_kvcache")(**call)
    assert nothing is None and out.shape == (2, 2, 64, 512) and lse.shape == (2, 64, 2)
    for b, s in ((0, 0), (0, 1), (1, 0)):
        chosen = picked[b, s, : length[b]]
        k = wide[chosen[chosen >= 0].long()]
        logits = q[b, s].double() @ k.T * 0.05
        torch.testing.assert_close(out.cpu()[b, s].double(), torch.softmax(logits, -1) @ k[:, :512], rtol=2**-7, atol=1e-4)
        torch.testing.assert_close(lse.cpu()[b, :, s].double(), logits.logsumexp(-1), rtol=1e-4, atol=1e-4)
    assert not out.cpu()[1, 1].any() and (lse.cpu()[1, :, 1] == math.inf).all()
    found("flash_mla.flash_mla_with_kvcache")(**call)
    for change, message in ((dict(topk_length=musa(64, 8)), r"topk_length is \[64, 8\]; expected the \[64, 7\]"),
                            (dict(q=call["q"][:, :1].contiguous(), indices=call["indices"][:, :1].contiguous()),
                             "the call's shape")):
        with pytest.raises(RuntimeError, match=message):
            found("flash_mla.flash_mla_with_kvcache")(**call | change)


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: dict(q=c["q"][:, :8].contiguous()), "q's head count is 8; expected a multiple of 64"),
    (lambda c: dict(q=c["q"].float()), "q.dtype is torch.float32"),
    (lambda c: dict(q=c["q"].transpose(0, 1).contiguous().transpose(0, 1)), r"q.stride\(\)"),
    (lambda c: dict(kv=c["kv"].half()), "kv.dtype is torch.float16"),
    (lambda c: dict(kv=c["kv"].expand(-1, 2, -1).contiguous()), "kv.shape"),
    (lambda c: dict(indices=c["indices"].long()), "indices.dtype is torch.int64"),
    (lambda c: dict(indices=c["indices"][..., :60].contiguous()), r"indices.shape\[-1\] is 60"),
    (lambda c: dict(indices=c["indices"][:, 0]), r"indices.dim\(\) is 2"),
    (lambda c: dict(d_v=256), "d_v is 256"),
    (lambda c: dict(topk_length=musa(1, 2)), "topk_length.shape"),
    (lambda c: dict(topk_length=musa(1, 2, 3).long()), "topk_length.dtype"),
])
def test_prefill_limits(attention, change, message):
    q, kv, picked, *_ = attention
    call = dict(q=q.musa(), kv=kv.musa(), indices=picked[:, None].musa(), sm_scale=0.05)
    with pytest.raises(RuntimeError, match=f"flash_mla_sparse_fwd: {message}"):
        found("flash_mla.flash_mla_sparse_fwd")(**call | change(call))


@pytest.mark.parametrize(("change", "message"), [
    (dict(tile_scheduler_metadata=None), "tile_scheduler_metadata is NoneType"),
    (dict(is_fp8_kvcache=False), "is_fp8_kvcache is False"),
    (dict(causal=True), "causal is True"),
    (dict(indices=None), "indices is None"),
    (dict(num_splits=3), "num_splits is given"),
    (dict(topk_length=torch.zeros(1, 2, dtype=torch.int32)), "topk_length.shape"),
    (dict(k_cache=torch.zeros(2, 64, 1, 576, dtype=BF16)), "k_cache.dtype is torch.bfloat16"),
    (dict(head_dim_v=256), "head_dim_v is 256"),
])
def test_decode_limits(change, message):
    call = dict(q=torch.zeros(1, 2, 64, 576, dtype=BF16), k_cache=torch.zeros(2, 64, 1, 656, dtype=torch.uint8),
                block_table=None, cache_seqlens=None, head_dim_v=512,
                tile_scheduler_metadata=found("flash_mla.get_mla_metadata")()[0], is_fp8_kvcache=True,
                indices=torch.zeros(1, 2, 64, dtype=torch.int32)) | change
    call = {n: x.musa() if isinstance(x, torch.Tensor) else x for n, x in call.items()}
    with pytest.raises(RuntimeError, match=f"flash_mla_with_kvcache: {message}"):
        found("flash_mla.flash_mla_with_kvcache")(**call)


def test_host_tensors_are_refused_and_nothing_is_copied(attention):
    q, kv, picked, *_ = attention
    call = (q.musa(), kv.musa(), picked[:, None].musa(), 0.05)
    copies.reset()
    found("flash_mla.flash_mla_sparse_fwd")(*call)
    assert (copies.to_host, copies.to_device) == (0, 0) and emulated.calls == {"flash_mla_sparse_fwd": 1}
    with pytest.raises(RuntimeError, match="same device"):
        found("flash_mla.flash_mla_sparse_fwd")(q, *call[1:])
    with pytest.raises(RuntimeError, match="on the host"):
        found("flash_mla.flash_mla_sparse_fwd")(q, kv, picked[:, None], 0.05)
