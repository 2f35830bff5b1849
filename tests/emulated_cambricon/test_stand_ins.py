"""Cambricon's stand-ins compute the published formulas, refuse what the page refuses, and promise no more."""

import inspect
import math

import pytest
import torch

from porthal.backends.cambricon import emulated
from porthal.backends.torch.emulation.device import copies

BF16 = torch.bfloat16
# Name, order and default of every argument, as torch_mlu_ops 1.12.1 has them.
SIGNATURES = {
    "fused_rms_norm": "(x, residual, gamma, beta, bias, eps, store_output_before_norm, quant_scale=None, out=None, "
                      "dynamic_quant=False, store_output_after_norm=False, quant_type=torch.int8, scale_type=torch.float32, "
                      "mx_quant=False)",
    "fused_layer_norm": "(x, residual, gamma, beta, bias, eps, store_output_before_norm, quant_scale=None, out=None, "
                        "dynamic_quant=False, store_output_after_norm=False, quant_type=torch.int8, gamma_add_coef=0.0, "
                        "scale_type=torch.float32, mx_quant=False)",
    "apply_rotary": "(input, sin_cache, cos_cache, position_ids, cu_seqlens, interleaved, discrete, dynamic_ntk, max_seqlen, "
                    "output=None, is_inverse=False)",
    "active": "(input, act_mode, is_gated, active_coef=1.0, high_precision=False, gelu_approximate='none')",
    "moe_active": "(input, act_mode, is_gated, output=None, bias=None, cusum_token_count=None, start_expert_id=0, "
                  "expert_size=0, high_precision=False, gelu_approximate='none', swiglu_limit=0, weight=None)",
    "reshape_paged_cache": "(k, v, k_cache, v_cache, slot_mapping, direction=False)",
    "quant_to_paged_cache": "(k, v, k_cache, v_cache, k_cache_quant_scale, v_cache_quant_scale, slot_mapping)",
    "reshape_from_cache": "(key, value, key_cache, value_cache, context_lengths, max_context_len, context_seq_offset=None, "
                          "block_tables=None, cache_seq_offset=None)",
    "single_query_cached_kv_attn":
        "(q, k_cache, v_cache, out, block_tables, context_lens, k_cache_quant_scale, v_cache_quant_scale, alibi_slopes, "
        "max_context_len, windows_size_left, windows_size_right, softmax_scale, return_lse=False, "
        "kv_cache_quant_bit_size=-1, q_quant_scale=None, out_quant_scale=None, out_dtype=torch.float16, "
        "compute_dtype=torch.float32, head_size_v=-1, mask=None, cu_seq_q=None, max_seq_q=-1, sink=None)",
    "masked_indexer_select_paged_kv":
        "(query, k_cache, weights, kv_cache_block_table, cu_seq_q_lens, cu_seq_k_lens, k_context_lens, "
        "k_cache_block_table, is_prefill, index_topk, kv_cache_block_size, softmax_scale, q_scale=None, "
        "k_scale_cache=None, sparse_block_table=None, sparse_context_lens=None, is_score_float=False, compress_ratio=1, "
        "kv_cache_block_table_offset=None)",
    "moe_sigmoid_topk": "(input, topk, normalize=False, num_expert_group=-1, topk_group=0, mask=None, "
                        "normed_by='topk_logit', route_scale=1.0, score_bias=None, reduce_weight=None, expert_id=None)",
    "moe_softmax_topk": "(input, topk, normalize=False, num_expert_group=-1, topk_group=0, mask=None, "
                        "normed_by='topk_logit', route_scale=1.0, reduce_weight=None, expert_id=None, score_bias=None)",
    "moe_gen_idx": "(expert_id, expert_num, return_token2expert_idx=False)",
    "moe_expand_input": "(input, gather_idx, cusum_token_count=None, start_expert_id=0, expert_size=0, output=None)",
    "moe_combine_result": "(input, reduce_weight, gather_ids, residual, cusum_token_count, start_expert_id, expert_size, "
                          "bias=None, output=None)",
    "group_gemm": "(a, b, group_list, expand_idx, c, alpha, beta, max_in_group_list, bias=None, d=None, trans_a=False, "
                  "trans_b=True, tile_config=None, idx_offset=None, output_dtype=None)",
    "smooth_quant_group_gemm":
        "(a, b, m_list, expand_idx, c, alpha, beta, a_scale, b_scale, dtype, max_m, bias=None, quant_flag=None, d=None, "
        "tile_config=None, a_calibration=None, b_calibration=None, a_quant_bit_size=8, a_lora=None, b_lora=None, "
        "idx_offset=None, is_symmetric_quant=True)",
    "scaled_quantize":
        "(x, scale=None, zero=None, scale_ub=None, quant_type=torch.int8, quant_mode='dynamic_per_token', act_mode='none', "
        "active_coef=1.0, is_gated=False, quant_bit_size=8, scale_type=torch.float32, need_output_scale_trans=False, "
        "output_reduced=None, group_size=1)",
    "moe_quantize":
        "(x, smooth, zero=None, token_count=None, gather_index=None, gather_index_start_position=None, output=None, "
        "output_scale=None, dynamic_quant=True, act_mode='none', active_coef=1.0, is_gated=False, quant_type=torch.int8, "
        "quant_bit_size=8, scale_type=torch.float32, need_output_scale_trans=False, output_reduced=None, group_size=1)",
    "scaled_matmul":
        "(a, b, a_scale, b_scale, output_dtype, bias=None, c=None, act_mode='none', quant_bit_size=8, alpha=1.0, beta=1.0, "
        "use_hp_active=False, a_quant_bit_size=-1, a_calib=None, b_calib=None, output=None, tile_config=None)",
    "matmul": "(a, b, bias=None, c=None, act_mode='none', alpha=1.0, beta=0.0, fast_act=True, approximate=True, dtype=None, "
              "a_scale=None, b_scale=None, trans_a=False, trans_b=True, tile_config=None, output=None)",
    "batch_matmul": "(a, b, c=None, alpha=1.0, beta=0.0, a_scale=None, b_scale=None, trans_a=False, trans_b=True, d=None, "
                    "bias=None, act_mode='none', dtype=None, use_hp_active=False, approximate=False)",
}


def mlu(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device="mlu")


def close(got, want, rtol=2**-7, atol=1e-5):
    torch.testing.assert_close(got.cpu().double(), want.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(torch_mlu_ops, name):
    assert str(inspect.signature(getattr(torch_mlu_ops, name))) == SIGNATURES[name]


def test_every_function_says_how_well_it_is_known():
    assert set(emulated.CONFIDENCE) == {f"torch_mlu_ops.{name}" for name in SIGNATURES}
    assert set(emulated.KERNELS) == set(SIGNATURES)


def test_the_device_says_what_torch_mlu_says():
    properties = torch.mlu.get_device_properties()
    assert properties.major >= 5 and properties.cluster_count * properties.core_num_per_cluster > 0


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_norms(torch_mlu_ops, dtype):
    x, residual, gamma, beta = (torch.randn(*shape).to(dtype) for shape in ((5, 96), (5, 96), (96,), (96,)))
    rtol = 1e-5 if dtype == torch.float32 else 2**-7
    plain = torch_mlu_ops.fused_rms_norm(x.mlu(), None, gamma.mlu(), None, None, 1e-5, False)
    close(plain, x.double() / (x.double() ** 2).mean(-1, keepdim=True).add(1e-5).sqrt() * gamma.double(), rtol)
    y, total = torch_mlu_ops.fused_rms_norm(x.mlu(), residual.mlu(), gamma.mlu(), None, None, 1e-5, True)
    s = x.double() + residual.double()
    close(total, s, rtol)
    close(y, s / (s**2).mean(-1, keepdim=True).add(1e-5).sqrt() * gamma.double(), rtol)
    out = torch.zeros(5, 96, dtype=dtype, device="mlu")
    same = torch_mlu_ops.fused_layer_norm(x.mlu(), None, gamma.mlu(), beta.mlu(), None, 1e-6, False, None, out)
    d = x.double()
    want = (d - d.mean(-1, keepdim=True)) / (d.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    want = want * gamma.double() + beta.double()
    close(out, want, rtol, 2e-3 if dtype == BF16 else 1e-4)
    assert same is out
    codes, scale = torch_mlu_ops.fused_rms_norm(x.mlu(), None, gamma.mlu(), None, None, 1e-5, False,
                                                torch.ones(96).mlu(), dynamic_quant=True)
    assert codes.dtype == torch.int8 and scale.shape == (5,)
    close(codes.cpu().double() * scale.cpu().double()[:, None], plain.cpu(), 0, 0.03)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_writes_in_place_what_the_tables_say(torch_mlu_ops, interleaved):
    x, angle = torch.randn(6, 3, 12), torch.rand(20, 4)
    table = angle.repeat_interleave(2, 1) if interleaved else angle.repeat(1, 2)
    places = torch.tensor([4, 5, 19, 0, 1, 2])
    device = x.mlu()
    got = torch_mlu_ops.apply_rotary(device, table.sin().mlu(), table.cos().mlu(), places.int().mlu(), mlu(0, 2, 6),
                                     interleaved, True, False, 4)
    a = angle[places].double()[:, None]
    u, v = (x[..., 0:8:2], x[..., 1:8:2]) if interleaved else (x[..., :4], x[..., 4:8])
    u, v = u.double() * a.cos() - v.double() * a.sin(), v.double() * a.cos() + u.double() * a.sin()
    want = torch.stack([u, v], -1).flatten(-2) if interleaved else torch.cat([u, v], -1)
    close(got, torch.cat([want, x[..., 8:].double()], -1), 1e-5)
    assert got is device
    started = torch_mlu_ops.apply_rotary(x.mlu(), table.sin().mlu(), table.cos().mlu(), mlu(4, 0), mlu(0, 2, 6), interleaved,
                                         False, False, 4)
    close(started[:2], got.cpu()[:2])  # the first sequence starts at 4, as its places above
    out = torch.zeros_like(device)
    torch_mlu_ops.apply_rotary(x.mlu(), table.sin().mlu(), table.cos().mlu(), places.int().mlu(), mlu(0, 2, 6), interleaved,
                               True, False, 4, output=out)
    assert out.cpu()[..., 8:].isnan().all() and torch.equal(out.cpu()[..., :8], got.cpu()[..., :8])


def test_activations(torch_mlu_ops):
    x = torch.randn(6, 16)
    want = torch.nn.functional.silu(x[:, :8].double()) * x[:, 8:].double()
    close(torch_mlu_ops.active(x.mlu(), "silu", True), want, 1e-5)
    device = x.mlu()
    half = device[:, :8]
    got = torch_mlu_ops.moe_active(device, "silu", True, half, None, mlu(0, 1, 3, 5), 1, 2)
    assert got is half
    close(device[:4, :8], want[:4], 1e-5)
    assert device.cpu()[4:, :8].isnan().all()


def test_paged_cache_there_and_back(torch_mlu_ops):
    k, cache = torch.randn(4, 1, 32).to(BF16), torch.zeros(3, 1, 16, 32, dtype=BF16, device="mlu")
    slots = mlu(17, -1, 3, 40)
    assert torch_mlu_ops.reshape_paged_cache(k.mlu(), None, cache, None, slots) is cache
    flat = cache.cpu().view(-1, 32)
    assert torch.equal(flat[[17, 3, 40]], k[[0, 2, 3], 0]) and flat.abs().sum(1).count_nonzero() == 3
    back = torch.zeros(4, 1, 32, dtype=BF16, device="mlu")
    torch_mlu_ops.reshape_paged_cache(back, None, cache, None, slots, True)
    assert torch.equal(back.cpu()[[0, 2, 3]], k[[0, 2, 3]]) and not back.cpu()[1].any()
    dense = torch.zeros(22, 1, 32, dtype=BF16, device="mlu")
    table = mlu(*[[1, 0], [2, 2]])
    torch_mlu_ops.reshape_from_cache(dense, None, cache, None, mlu(20, 2), 20, block_tables=table)
    want = torch.cat([cache.cpu()[[1, 0], 0].flatten(0, 1)[:20], cache.cpu()[2, 0, :2]])
    assert torch.equal(dense.cpu()[:, 0], want)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_in_the_paged_cache(torch_mlu_ops, dtype):
    k = torch.randn(3, 1, 32).to(BF16)
    cache, scale = torch.zeros(2, 1, 16, 32, dtype=dtype, device="mlu"), torch.zeros(2, 1, 16, device="mlu")
    torch_mlu_ops.quant_to_paged_cache(k.mlu(), None, cache, None, scale, None, mlu(17, 0, 5))
    wide = (cache.cpu().double() * scale.cpu().double()[..., None]).view(32, 32)[[17, 0, 5]]
    top = k.double().abs().amax(-1)
    close(scale.cpu().view(32)[[17, 0, 5]], top[:, 0] / (127 if dtype == torch.int8 else 448), 1e-6)
    step = top / 254 if dtype == torch.int8 else k[:, 0].double().abs() / 16 + top / 448
    assert ((wide - k[:, 0].double()).abs() <= step * 1.001).all()
    with pytest.raises(RuntimeError, match="slot_mapping is"):
        torch_mlu_ops.quant_to_paged_cache(k.mlu(), None, cache, None, scale, None, mlu(17, -1, 5))


@pytest.fixture
def attention():
    """Three rows of 8 heads over slots of 40, one of them without tokens; garbage behind the counts."""
    q, cache = torch.randn(3, 1, 8, 576).to(BF16), torch.randn(40, 1, 1, 576).to(BF16)
    table = torch.stack([torch.randperm(40)[:24] for _ in range(3)]).int()
    table[1, 7:] = 123456
    call = dict(q=q.mlu(), k_cache=cache.mlu(), v_cache=None, out=torch.zeros(3, 1, 8, 512, dtype=BF16, device="mlu"),
                block_tables=table.mlu(), context_lens=mlu(24, 7, 0), k_cache_quant_scale=None, v_cache_quant_scale=None,
                alibi_slopes=None, max_context_len=24, windows_size_left=-1, windows_size_right=-1, softmax_scale=0.05,
                head_size_v=512)
    want, lse = [], []
    for i, n in enumerate((24, 7)):
        k = cache[table[i, :n].long(), 0, 0].double()
        logits = q[i, 0].double() @ k.T * 0.05
        want.append(torch.softmax(logits, -1) @ k[:, :512])
        lse.append(logits.logsumexp(-1))
    return call, torch.stack(want), torch.stack(lse)


def test_attention(torch_mlu_ops, attention):
    call, want, lse = attention
    out, sums = torch_mlu_ops.single_query_cached_kv_attn(**call, return_lse=True)
    assert out is call["out"] and out.cpu()[2].isnan().all()
    close(out[:2, 0], want)
    close(sums[:2, :, 0], lse, 1e-5)
    short = torch_mlu_ops.single_query_cached_kv_attn(**call | dict(max_context_len=8))
    assert short.cpu()[0].isnan().all() and not short.cpu()[1].isnan().any()
    pages = call["k_cache"].cpu().view(5, 1, 8, 576).mlu()
    paged = torch_mlu_ops.single_query_cached_kv_attn(**call | dict(
        k_cache=pages, block_tables=mlu([3, 1], [0, 9], [0, 0]), context_lens=mlu(11, 3, 1), compute_dtype=torch.float16))
    k = pages.cpu()[[3, 1], 0].flatten(0, 1)[:11].double()
    close(paged[0, 0], torch.softmax(call["q"].cpu()[0, 0].double() @ k.T * 0.05, -1) @ k[:, :512], 2**-6, 2e-3)


def test_attention_over_codes(torch_mlu_ops, attention):
    call, _, _ = attention
    scale = torch.rand(40, 1, 1) * 0.02
    codes = torch.randint(-127, 128, (40, 1, 1, 576), dtype=torch.int8)
    out = torch_mlu_ops.single_query_cached_kv_attn(**call | dict(
        k_cache=codes.mlu(), k_cache_quant_scale=scale.mlu(), kv_cache_quant_bit_size=8))
    k = (codes.double() * scale.double()[..., None])[call["block_tables"].cpu()[0].long(), 0, 0]
    close(out[0, 0], torch.softmax(call["q"].cpu()[0, 0].double() @ k.T * 0.05, -1) @ k[:, :512], 2**-6, 2e-3)


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: dict(q=c["q"].expand(-1, 2, -1, -1)), r"q.shape\[1\] is 2"),
    (lambda c: dict(q=c["q"].repeat(1, 1, 33, 1)), "q's head count is 264; expected 256 at most"),
    (lambda c: dict(k_cache=c["k_cache"].half()), "k_cache.dtype is torch.float16"),
    (lambda c: dict(block_tables=c["block_tables"].long()), "block_tables.dtype"),
    (lambda c: dict(context_lens=mlu(24, 9, 0)), r"block_tables\[1\] is"),
    (lambda c: dict(windows_size_left=0), "windows_size_left is 0"),
    (lambda c: dict(windows_size_right=0), "windows_size_right is 0"),
    (lambda c: dict(compute_dtype=BF16), "compute_dtype is torch.bfloat16"),
    (lambda c: dict(head_size_v=64), "head_size_v is 64"),
    (lambda c: dict(out=None, head_size_v=-1), "head_size_v is -1"),
    (lambda c: dict(sink=torch.zeros(8).mlu()), "sink is given"),
    (lambda c: dict(k_cache=c["k_cache"].expand(-1, 2, -1, -1).contiguous()), r"k_cache.shape\[1\] is 2"),
])
def test_attention_limits(torch_mlu_ops, attention, change, message):
    with pytest.raises(RuntimeError, match=f"single_query_cached_kv_attn: {message}"):
        torch_mlu_ops.single_query_cached_kv_attn(**attention[0] | change(attention[0]))


@pytest.fixture
def indexer():
    """Two requests, 2 rows each, of 40 and 3 keys in scrambled blocks of 16, integer data."""
    q, w = torch.randint(-2, 3, (2, 2, 32, 128)).to(BF16), torch.randint(-3, 4, (2, 2, 32, 1)).float()
    table, cache = torch.tensor([[4, 0, 3], [2, 9, 9]], dtype=torch.int32), torch.randint(-2, 3, (5, 1, 16, 128)).to(BF16)
    call = dict(query=q.mlu(), k_cache=cache.mlu(), weights=w.mlu(), kv_cache_block_table=table.mlu(), cu_seq_q_lens=None,
                cu_seq_k_lens=None, k_context_lens=mlu(40, 3), k_cache_block_table=table.mlu(), is_prefill=False,
                index_topk=12, kv_cache_block_size=16, softmax_scale=0.25, is_score_float=True)
    keys = [cache[[4, 0, 3], 0].flatten(0, 1)[:40].double(), cache[2, 0, :3].double()]
    score = [[(w[b, s].double() * (q[b, s].double() @ k[: len(k) - 1 + s].T).relu()).sum(0) * 0.25 for s in (0, 1)]
             for b, k in enumerate(keys)]
    return call, keys, score


def slots(table, place):
    return [table[j // 16] * 16 + j % 16 for j in place]


def check(score, table, row, count):
    kept = min(12, len(score))
    places = {slot: j for j, slot in enumerate(slots(table, range(len(score))))}
    chosen = [places[slot] for slot in row[:kept]]
    assert count == kept and len(set(chosen)) == kept
    assert score[chosen].sort().values.tolist() == score.sort().values[-kept:].tolist()


def test_indexer_of_pages(torch_mlu_ops, indexer):
    call, _, score = indexer
    table, count = torch_mlu_ops.masked_indexer_select_paged_kv(**call)
    assert table.shape == (2, 2, 12) and count.shape == (4,) and table.dtype == count.dtype == torch.int32
    for b, blocks in enumerate(([4, 0, 3], [2])):
        for s in (0, 1):
            check(score[b][s], blocks, table.cpu()[b, s].tolist(), count.cpu()[2 * b + s])
    assert (table.cpu()[1, :, 3:].abs() > 1000).any()


def test_indexer_of_dense_keys_writes_into_what_it_is_given(torch_mlu_ops, indexer):
    call, keys, score = indexer
    table, count = torch.zeros(4, 12, dtype=torch.int32, device="mlu"), torch.zeros(4, dtype=torch.int32, device="mlu")
    made = torch_mlu_ops.masked_indexer_select_paged_kv(**call | dict(
        query=call["query"].flatten(0, 1), weights=call["weights"].flatten(0, 1), k_cache=torch.cat(keys).to(BF16).mlu(),
        is_prefill=True, cu_seq_q_lens=mlu(0, 2, 4), cu_seq_k_lens=mlu(0, 40, 43), k_context_lens=None,
        k_cache_block_table=None, sparse_block_table=table, sparse_context_lens=count))
    assert made[0] is table and made[1] is count
    for b, blocks in enumerate(([4, 0, 3], [2])):
        for s in (0, 1):
            check(score[b][s], blocks, table.cpu()[2 * b + s].tolist(), count.cpu()[2 * b + s])


def test_indexer_of_codes(torch_mlu_ops, indexer):
    call, keys, _ = indexer
    scales = torch.rand(2, 2, 32, 1) + 0.5, torch.rand(5, 1, 16, 1) + 0.5
    codes = {name: call[name].cpu().to(torch.int8).mlu() for name in ("query", "k_cache")}
    table, _ = torch_mlu_ops.masked_indexer_select_paged_kv(**call | codes | dict(
        q_scale=scales[0].mlu(), k_scale_cache=scales[1].mlu()))
    k_scale = scales[1][[4, 0, 3]].flatten()[:40].double()
    w = call["weights"].cpu().double() * scales[0].double()
    score = (w[0, 1] * (call["query"].cpu()[0, 1].double() @ keys[0].T).relu()).sum(0) * k_scale
    best = score.argsort(descending=True)[:12].tolist()
    assert set(table.cpu()[0, 1].tolist()) == set(slots([4, 0, 3], best))


def test_indexer_scores_are_bfloat16_unless_asked(torch_mlu_ops, indexer):
    call, _, _ = indexer
    query, cache, weights = (torch.zeros_like(call[n]) for n in ("query", "k_cache", "weights"))
    query[..., 0], weights[..., 0, :], cache[4, 0, :, 0] = 1, 1, torch.arange(256, 272, device="mlu").to(BF16)
    cache[4, 0, 1, 0], cache[4, 0, 1, 1], query[0, 1, 0, 1] = 256, 0.5, 1  # 256.5 is 256 in bfloat16
    call |= dict(query=query, k_cache=cache, weights=weights, k_context_lens=mlu(2, 3), index_topk=1, softmax_scale=1.0)
    cache[4, 0, 0, 0] = 256
    exact = torch_mlu_ops.masked_indexer_select_paged_kv(**call)[0].cpu()[0, 1, 0]
    cache[4, 0, 0, 1], cache[4, 0, 1, 1] = 0.5, 0
    assert exact == slots([4], [1])[0]
    assert torch_mlu_ops.masked_indexer_select_paged_kv(**call)[0].cpu()[0, 1, 0] == slots([4], [0])[0]
    rounded = torch_mlu_ops.masked_indexer_select_paged_kv(**call | dict(is_score_float=False))[0].cpu()[0, 1, 0]
    assert rounded == slots([4], [1])[0]  # a tie, taken from the highest place


def test_indexer_ties_come_from_the_highest_place_in_no_order(torch_mlu_ops, indexer):
    call, _, _ = indexer
    call["weights"].zero_()
    row = torch_mlu_ops.masked_indexer_select_paged_kv(**call)[0].cpu()[0, 1].tolist()
    assert set(row) == set(slots([4, 0, 3], range(28, 40))) and row not in (sorted(row), sorted(row, reverse=True))


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: dict(query=c["query"][:, :, :8].contiguous(), weights=c["weights"][:, :, :8]), "query's head count is 8"),
    (lambda c: dict(query=c["query"][..., :64].contiguous()), r"query.shape\[-1\] is 64"),
    (lambda c: dict(query=c["query"].float()), "query.dtype is torch.float32"),
    (lambda c: dict(weights=c["weights"][..., 0]), "weights.shape is"),
    (lambda c: dict(weights=c["weights"].half()), "weights.dtype is torch.float16"),
    (lambda c: dict(kv_cache_block_size=8), "kv_cache_block_size is 8"),
    (lambda c: dict(kv_cache_block_table=c["kv_cache_block_table"].long()), "kv_cache_block_table.dtype"),
    (lambda c: dict(k_context_lens=mlu(40, 17)), "k_cache_block_table is"),
    (lambda c: dict(k_context_lens=None), "k_context_lens or k_cache_block_table is None"),
    (lambda c: dict(q_scale=torch.ones(2, 2, 32, 1).mlu()), "q_scale is given"),
    (lambda c: dict(query=c["query"].to(torch.int8)), "q_scale is None"),
    (lambda c: dict(compress_ratio=4), "compress_ratio is 4"),
    (lambda c: dict(is_prefill=True), r"query.dim\(\) is 4"),
])
def test_indexer_limits(torch_mlu_ops, indexer, change, message):
    with pytest.raises(RuntimeError, match=f"masked_indexer_select_paged_kv: {message}"):
        torch_mlu_ops.masked_indexer_select_paged_kv(**indexer[0] | change(indexer[0]))


@pytest.mark.parametrize("groups", [-1, 4])
def test_router(torch_mlu_ops, groups):
    x, bias = torch.randn(5, 32), torch.randn(32)
    weights, ids = torch_mlu_ops.moe_sigmoid_topk(x.mlu(), 4, True, groups, 2, route_scale=2.5, score_bias=bias.mlu())
    score = torch.sigmoid(x.double())
    choice = score + bias.double()
    if groups > 1:
        grouped = choice.view(5, 4, 8)
        best = grouped.topk(2, -1).values.sum(-1).topk(2).indices
        choice = (torch.full_like(grouped, -math.inf).scatter_(1, best[..., None].expand(-1, -1, 8), 0) + grouped).flatten(1)
    for w, chosen, s, c in zip(weights.cpu().double(), ids.cpu().long(), score, choice):
        assert set(chosen.tolist()) == set(c.topk(4).indices.tolist())
        torch.testing.assert_close(w, s[chosen] / s[chosen].sum() * 2.5, rtol=1e-5, atol=0)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    soft, _ = torch_mlu_ops.moe_softmax_topk(x.mlu(), 32)
    close(soft.sum(1), torch.ones(5), 1e-5)


@pytest.mark.parametrize(("first", "size"), [(0, 6), (2, 3)])
def test_experts_from_routing_to_sum(torch_mlu_ops, first, size):
    x, ids = torch.randn(7, 16), torch.stack([torch.randperm(6)[:3] for _ in range(7)]).int()
    w13, w2, weight = torch.randn(6, 8, 16), torch.randn(6, 16, 4), torch.rand(7, 3)
    expand, combine, count, sums = torch_mlu_ops.moe_gen_idx(ids.mlu(), 6)
    rows = torch_mlu_ops.moe_expand_input(x.mlu(), expand, sums, first, size)
    assert rows.shape == (21, 16) and (size == 6 or rows.cpu()[-1].isnan().all())
    here = count[first : first + size]
    up = torch_mlu_ops.group_gemm(rows, w13[first : first + size].mlu(), here, None, None, None, None, 7)
    act = torch_mlu_ops.moe_active(up, "silu", True, up[:, :4], None, sums, first, size)
    down = torch_mlu_ops.group_gemm(act, w2[first : first + size].mlu(), here, None, None, None, None, 7)
    got = torch_mlu_ops.moe_combine_result(down, weight.mlu(), combine, None, sums, first, size)
    want = torch.zeros(7, 16, dtype=torch.double)
    for t in range(7):
        for k in range(3):
            e = ids[t, k]
            if first <= e < first + size:
                gate, lift = (w13[e].double() @ x[t].double()).chunk(2)
                want[t] += weight[t, k] * (w2[e].double() @ (torch.nn.functional.silu(gate) * lift))
    close(got, want, 1e-4, 1e-4)
    assert count.tolist() == torch.bincount(ids.flatten(), minlength=6).tolist()


def test_products_of_codes(torch_mlu_ops):
    x, w = torch.randn(7, 32), torch.randint(-127, 128, (2, 8, 32), dtype=torch.int8)
    scale, counts, smooth = torch.rand(2, 8), mlu(3, 2), torch.rand(2, 32) + 0.5
    codes, row = torch_mlu_ops.moe_quantize(x.mlu(), smooth.mlu(), token_count=counts)
    y = torch_mlu_ops.smooth_quant_group_gemm(codes, w.mlu(), counts, None, None, None, None, row, scale.mlu(), BF16, 3)
    wide = (codes.cpu().double() * row.cpu().double()[:, None])[:5]
    by_row = smooth.repeat_interleave(torch.tensor([3, 2]), 0).double()
    close(wide, x[:5].double() * by_row, 0, 0.02)
    w_wide = w.double() * scale.double()[..., None]
    want = torch.cat([wide[:3] @ w_wide[0].T, wide[3:] @ w_wide[1].T])
    close(y[:5], want, 2**-7, 1e-2)
    assert y.cpu()[5:].isnan().all()
    codes, row = torch_mlu_ops.scaled_quantize(x.mlu())
    y = torch_mlu_ops.scaled_matmul(codes, w[0].mlu(), row, scale[0].mlu(), BF16, a_quant_bit_size=8)
    wide = codes.cpu().double() * row.cpu().double()[:, None]
    close(y, wide @ w_wide[0].T, 2**-7, 1e-2)
    with pytest.raises(RuntimeError, match=r"a_quant_bit_size and quant_bit_size is \(-1, 8\)"):
        torch_mlu_ops.scaled_matmul(codes, w[0].mlu(), row, scale[0].mlu(), BF16)
    gated, _ = torch_mlu_ops.scaled_quantize(x.mlu(), act_mode="silu", is_gated=True)
    assert gated.shape == (7, 16)


def test_dense_products(torch_mlu_ops):
    a, b, bias = torch.randn(5, 16), torch.randn(8, 16), torch.randn(8)
    close(torch_mlu_ops.matmul(a.mlu(), b.mlu(), bias.mlu()), a.double() @ b.double().T + bias.double(), 1e-5)
    close(torch_mlu_ops.batch_matmul(a.view(1, 5, 16).mlu(), b.mlu()[None]), (a.double() @ b.double().T)[None], 1e-5)


ROWS, PAGE = torch.ones(2, 1, 8), torch.ones(1, 1, 16, 8)
PAIR = torch.tensor([2, 2], dtype=torch.int32)


@pytest.mark.parametrize(("name", "args", "message"), [
    ("moe_gen_idx", (torch.tensor([[0, 6]], dtype=torch.int32), 6), "expert_id is"),
    ("moe_gen_idx", (torch.tensor([[0, 1]]), 6), "expert_id.dtype is torch.int64"),
    ("group_gemm", (torch.ones(4, 8), torch.ones(2, 3, 8), PAIR, None, None, None, None, 1), "max_in_group_list is 1"),
    ("group_gemm", (torch.ones(4, 8), torch.ones(2, 8, 3), PAIR, None, None, None, None, 4), "b.shape is"),
    ("group_gemm", (torch.ones(4, 8), torch.ones(2, 3, 8), PAIR, None, None, 1.0, 0.0, 4), "alpha is given"),
    ("active", (torch.ones(4, 8), "gelu", True), "act_mode is 'gelu'"),
    ("fused_rms_norm", (torch.ones(4, 8), None, torch.ones(8).double(), None, None, 1e-5, False), "gamma.dtype"),
    ("apply_rotary", (torch.ones(4, 2, 8), *[torch.ones(4, 9)] * 2, None, None, True, False, False, 4), "sin_cache.shape"),
    ("apply_rotary", (torch.ones(4, 2, 8), *[torch.ones(3, 8)] * 2, None, None, True, False, False, 4), "position_ids is"),
    ("apply_rotary", (torch.ones(4, 2, 8), *[torch.ones(4, 8)] * 2, torch.arange(4), None, True, True, False, 4),
     "position_ids.dtype is torch.int64"),
    ("reshape_paged_cache", (ROWS, None, PAGE, None, torch.tensor([0, 16], dtype=torch.int32)), "slot_mapping is"),
    ("reshape_paged_cache", (ROWS, None, PAGE, None, torch.tensor([0, 1])), "slot_mapping.dtype"),
])
def test_other_limits(torch_mlu_ops, name, args, message):
    with pytest.raises(RuntimeError, match=f"{name}: {message}"):
        getattr(torch_mlu_ops, name)(*(x.mlu() if isinstance(x, torch.Tensor) else x for x in args))


def test_host_tensors_are_refused_and_nothing_is_copied(torch_mlu_ops, attention):
    call, _, _ = attention
    copies.reset()
    torch_mlu_ops.single_query_cached_kv_attn(**call)
    assert (copies.to_host, copies.to_device) == (0, 0) and emulated.calls == {"single_query_cached_kv_attn": 1}
    with pytest.raises(RuntimeError, match="same device"):
        torch_mlu_ops.single_query_cached_kv_attn(**call | dict(context_lens=call["context_lens"].cpu()))
