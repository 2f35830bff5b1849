"""Ascend's routing calls: the documented formulas in float64, what the pages leave undefined, and what is refused."""

import pytest
import torch

from porthal.backends.ascend.emulated import moe

BF16 = torch.bfloat16


def npu(call):
    return {name: x.npu() if isinstance(x, torch.Tensor) else x for name, x in call.items()}


def held(x):
    return x.cpu().double()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("biased", [True, False])
def test_gating_with_sigmoid_chooses_by_the_bias_and_weighs_without_it(torch_npu, dtype, biased):
    x, bias = torch.randn(6, 16).to(dtype), torch.randn(16).to(dtype) if biased else None
    y, ids, p = torch_npu.npu_moe_gating_top_k(x.npu(), 4, bias=None if bias is None else bias.npu(), norm_type=1,
                                               routed_scaling_factor=2.5, out_flag=True)
    s = torch.sigmoid(x.double())
    want = (s + bias.double() if biased else s).topk(4, -1).indices
    assert ids.dtype == torch.int32 and torch.equal(ids.cpu().long(), want)
    picked = s.gather(1, want)
    assert y.dtype == dtype and p.dtype == torch.float32
    torch.testing.assert_close(held(y), 2.5 * picked / picked.sum(-1, keepdim=True), rtol=max(1e-6, torch.finfo(dtype).eps),
                               atol=0)
    torch.testing.assert_close(held(p), s, rtol=1e-6, atol=0)


def test_gating_by_default_is_a_softmax_whose_weights_are_not_divided(torch_npu):
    x = torch.randn(6, 16)
    y, ids, p = torch_npu.npu_moe_gating_top_k(x.npu(), 4)
    torch.testing.assert_close(held(y), x.double().softmax(-1).gather(1, ids.cpu().long()), rtol=1e-5, atol=0)
    assert p.shape == (6, 16) and p.isnan().all().item()


@pytest.mark.parametrize("mode", [0, 1])
def test_gating_within_the_best_groups(torch_npu, mode):
    x = torch.randn(8, 24)
    _, ids, _ = torch_npu.npu_moe_gating_top_k(x.npu(), 5, k_group=2, group_count=4, group_select_mode=mode, norm_type=1)
    for row, found in zip(torch.sigmoid(x.double()), ids.cpu().tolist()):
        groups = row.reshape(4, 6)
        worth = groups.topk(1 if mode == 0 else 2, -1).values.sum(-1)
        open_ = [e for g in worth.topk(2).indices.tolist() for e in range(6 * g, 6 * g + 6)]
        assert found == sorted(open_, key=lambda e: -row[e])[:5]


def test_gating_takes_ties_from_the_highest_expert(torch_npu):
    _, ids, _ = torch_npu.npu_moe_gating_top_k(torch.zeros(1, 16).npu(), 3, norm_type=1)
    assert ids.tolist() == [[15, 14, 13]]


@pytest.mark.parametrize(("change", "message"), [
    (dict(renorm=1), "renorm is 1"), (dict(norm_type=2), "norm_type is 2"), (dict(k=17), "k is 17; expected 1 to 16"),
    (dict(k=0), "k is 0"), (dict(bias=torch.zeros(16).half()), "bias.dtype is torch.float16"),
    (dict(bias=torch.zeros(15)), "bias.shape"), (dict(x=torch.zeros(2, 2, 16)), r"x.dim\(\) is 3"),
    (dict(x=torch.zeros(2, 2049)), r"x.shape\[1\] is 2049"), (dict(group_count=3), "group_count is 3"),
    (dict(group_count=8), "group_count is 8; expected groups of 3"), (dict(group_count=2, k_group=3), "k_group is 3"),
    (dict(group_count=4, k=5), "k is 5; expected 1 to 4"), (dict(group_select_mode=2), "group_select_mode is 2"),
    (dict(input_ids=torch.zeros(2).int()), "input_ids is given"),
])
def test_gating_limits(torch_npu, change, message):
    with pytest.raises(RuntimeError, match=f"npu_moe_gating_top_k: {message}"):
        torch_npu.npu_moe_gating_top_k(**npu(dict(x=torch.zeros(2, 16), k=4) | change))


def routed(torch_npu, **change):
    x = torch.arange(12.0).reshape(4, 3).to(BF16)
    ids = torch.tensor([[2, 0], [1, 2], [3, 2], [0, 1]], dtype=torch.int32)
    call = dict(x=x, expert_idx=ids, expert_num=4, expert_tokens_num_type=1, expert_tokens_num_flag=True,
                active_expert_range=[0, 4]) | change
    return x, torch_npu.npu_moe_init_routing_v2(**npu(call))


ORDER = [1, 6, 2, 7, 0, 3, 5, 4]  # of the choices above, by expert, then by position


def test_routing_sorts_copies_by_expert(torch_npu):
    x, (copies, places, counts, scales) = routed(torch_npu)
    assert torch.equal(copies.cpu(), x[[at // 2 for at in ORDER]]) and counts.tolist() == [2, 2, 3, 1]
    assert [places.tolist()[at] for at in ORDER] == list(range(8)) and counts.dtype == torch.int64
    assert scales.shape == (8,) and scales.isnan().all().item()
    assert routed(torch_npu, row_idx_type=1)[1][1].tolist() == ORDER
    assert routed(torch_npu, expert_tokens_num_type=0)[1][2].tolist() == [2, 4, 7, 8]


def test_routing_of_a_range_leaves_garbage_behind_its_copies(torch_npu):
    x, (copies, places, counts, _) = routed(torch_npu, active_expert_range=[1, 3])
    assert torch.equal(copies.cpu()[:5], x[[at // 2 for at in ORDER[2:7]]]) and copies[5:].isnan().all().item()
    assert [places.tolist()[at] for at in ORDER] == [-1, -1, 0, 1, 2, 3, 4, -1] and counts.tolist() == [2, 3]
    places = routed(torch_npu, active_expert_range=[1, 3], row_idx_type=1)[1][1]
    assert places[:5].tolist() == ORDER[2:7] and (places[5:].abs() > 1000).all().item()
    pairs = routed(torch_npu, active_expert_range=[1, 4], expert_tokens_num_type=2)[1][2].cpu()
    assert pairs.shape == (4, 2) and pairs[:3].tolist() == [[1, 2], [2, 3], [3, 1]] and pairs[3].tolist() == [0, 0]


def test_routing_of_choices_that_go_nowhere(torch_npu):
    ids = torch.tensor([[-1, 0], [1, -1], [-1, -1], [0, 1]], dtype=torch.int32).npu()
    _, (_, places, counts, _) = routed(torch_npu, expert_idx=ids)
    assert places.tolist() == [-1, 0, 2, -1, -1, -1, 1, 3] and counts.tolist() == [2, 2, 0, 0]


def test_routing_of_fewer_rows_counts_without_the_flag_and_scales(torch_npu):
    scale = torch.tensor([1.0, 2, 3, 4])
    x, (copies, _, counts, scales) = routed(torch_npu, active_num=5, scale=scale.npu(), expert_tokens_num_flag=False)
    assert copies.shape == (5, 3) and torch.equal(copies.cpu(), x[[at // 2 for at in ORDER[:5]]])
    assert scales.tolist() == [1, 4, 2, 4, 1] and counts.shape == (4,) and (counts.abs() > 1000).all().item()


@pytest.mark.parametrize("smooth", [None, 1, 4])
def test_routing_quantises_each_copy(torch_npu, smooth):
    factor = None if smooth is None else torch.rand(smooth, 3) + 0.5
    x, (copies, _, _, scales) = routed(torch_npu, quant_mode=1, scale=None if factor is None else factor.npu())
    expert = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3])
    rows = x[[at // 2 for at in ORDER]].double() * (1 if smooth is None else factor.double()[expert % smooth])
    want = rows.abs().amax(-1) / 127
    torch.testing.assert_close(held(scales), want, rtol=1e-6, atol=0)
    assert copies.dtype == torch.int8 and ((held(copies) - rows / want[:, None]).abs() <= 0.501).all()


def test_scale_of_a_row_of_zeros_is_zero_and_its_numbers_are_anything(torch_npu):
    _, (copies, _, _, scales) = routed(torch_npu, quant_mode=1, x=torch.zeros(4, 3).to(BF16).npu())
    assert scales.abs().sum() == 0 and copies.any().item()


@pytest.mark.parametrize(("change", "message"), [
    (dict(expert_idx=torch.zeros(4, 2).long()), "expert_idx.dtype is torch.int64"),
    (dict(expert_idx=torch.zeros(3, 2).int()), "expert_idx.shape"), (dict(drop_pad_mode=1), "drop_pad_mode is 1"),
    (dict(expert_idx=torch.full((4, 2), 4).int()), "expert_idx is 4; expected experts below 4"),
    (dict(expert_num=10241), "expert_num is 10241"), (dict(expert_num=5121, expert_tokens_num_type=2), "expert_num is 5121"),
    (dict(active_expert_range=[0, 5]), "active_expert_range is"), (dict(quant_mode=3), "quant_mode is 3"),
    (dict(expert_tokens_num_type=3), "expert_tokens_num_type is 3"), (dict(row_idx_type=2), "row_idx_type is 2"),
    (dict(active_num=-2), "active_num is -2"), (dict(offset=torch.zeros(1)), "offset is given"),
    (dict(scale=torch.zeros(3)), "scale.shape"), (dict(scale=torch.zeros(4).half()), "scale.dtype"),
    (dict(scale=torch.zeros(2, 3), quant_mode=1), "scale.shape"),
])
def test_routing_limits(torch_npu, change, message):
    with pytest.raises(RuntimeError, match=f"npu_moe_init_routing_v2: {message}"):
        routed(torch_npu, **change)


def test_routing_without_a_range_keeps_that_of_the_first_call(torch_npu, monkeypatch):
    monkeypatch.setattr(moe, "_default_range", [])
    for experts in (3, 8):
        ids = torch.tensor([[0], [1], [2], [1]], dtype=torch.int32).npu()
        counts = routed(torch_npu, expert_idx=ids, expert_num=experts, active_expert_range=[])[1][2]
        assert counts.tolist() == [1, 2, 1]  # of the second call's 8 experts, too


@pytest.mark.parametrize("probs_dtype", [BF16, torch.float32])
def test_unpermute_gathers_and_weighs(torch_npu, probs_dtype):
    rows, probs = torch.randn(8, 5).to(BF16), torch.rand(4, 2).to(probs_dtype)
    at = torch.tensor([3, 0, 1, 1, 7, 6, 5, 2], dtype=torch.int32)
    y = torch_npu.npu_moe_token_unpermute(rows.npu(), at.npu(), probs.npu())
    want = (rows.double()[at.long()].reshape(4, 2, 5) * probs.double()[..., None]).sum(1)
    assert y.dtype == BF16
    torch.testing.assert_close(held(y), want, rtol=2**-8, atol=1e-6)
    alone = torch_npu.npu_moe_token_unpermute(rows.npu(), at.npu())
    assert torch.equal(alone.cpu(), rows[at.long()])


def test_unpermute_multiplies_what_has_no_weight(torch_npu):
    rows = torch.tensor([[1.0], [float("nan")]])
    y = torch_npu.npu_moe_token_unpermute(rows.npu(), torch.tensor([0, 1]).int().npu(), torch.tensor([[1.0, 0.0]]).npu())
    assert y.isnan().all().item()


@pytest.mark.parametrize(("change", "message"), [
    (dict(sorted_indices=torch.tensor([0, -1, 2, 3]).int()), "sorted_indices is from -1 to 3"),
    (dict(sorted_indices=torch.tensor([0, 1, 2, 4]).int()), "sorted_indices is from 0 to 4"),
    (dict(sorted_indices=torch.arange(4)), "sorted_indices.dtype is torch.int64"),
    (dict(sorted_indices=torch.arange(3).int()), "sorted_indices.shape"),
    (dict(permuted_tokens=torch.ones(3, 3)), "permuted_tokens.shape"),
    (dict(probs=torch.ones(4)), r"probs.dim\(\) is 1"), (dict(probs=torch.ones(2, 2).int()), "probs.dtype"),
    (dict(probs=torch.ones(1, 513), sorted_indices=torch.zeros(513).int(), permuted_tokens=torch.ones(513, 3)), "probs.shape"),
])
def test_unpermute_limits(torch_npu, change, message):
    call = dict(permuted_tokens=torch.ones(4, 3), sorted_indices=torch.arange(4).int(), probs=torch.ones(2, 2)) | change
    with pytest.raises(RuntimeError, match=f"npu_moe_token_unpermute: {message}"):
        torch_npu.npu_moe_token_unpermute(**npu(call))


def test_unpermute_has_no_padded_mode(torch_npu):
    rows, at = torch.ones(4, 3).npu(), torch.arange(4).int().npu()
    with pytest.raises(RuntimeError, match="padded_mode is True"):
        torch_npu.npu_moe_token_unpermute(rows, at, padded_mode=True)
    with pytest.raises(RuntimeError, match="restore_shape is given"):
        torch_npu.npu_moe_token_unpermute(rows, at, restore_shape=[4, 3])


@pytest.mark.parametrize("mode", [0, 2])
def test_finalize_routing_is_the_formula(torch_npu, mode):
    rows, bias, scales = torch.randn(6, 4), torch.randn(5, 4), torch.rand(3, 2)
    skip, expert = torch.randn(3, 4), torch.tensor([[0, 4], [1, 2], [3, 3]], dtype=torch.int32)
    at = torch.tensor([5, 0, 3, 1, 4, 2], dtype=torch.int32)
    y = torch_npu.npu_moe_finalize_routing(rows.npu(), skip.npu(), skip.npu(), bias.npu(), scales.npu(), at.npu(), expert.npu(),
                                           drop_pad_mode=mode)
    table = at.long().reshape(3, 2) if mode == 2 else at.long().reshape(2, 3).T
    want = 2 * skip.double() + (scales.double()[..., None] * (rows.double()[table] + bias.double()[expert.long()])).sum(1)
    torch.testing.assert_close(held(y), want, rtol=1e-5, atol=1e-6)


def test_finalize_routing_and_choices_without_a_row(torch_npu):
    rows, at, scales = torch.ones(2, 2, 3).npu(), torch.tensor([0, -1, 3, 1]).int().npu(), torch.ones(2, 2).npu()
    padded = torch_npu.npu_moe_finalize_routing(rows, None, None, None, scales, at, None, drop_pad_mode=3)
    assert padded.tolist() == [[1, 1, 1], [2, 2, 2]]
    rows = torch.ones(4, 3).npu()
    silent = torch_npu.npu_moe_finalize_routing(rows, None, None, None, scales, at, None, drop_pad_mode=2)
    assert silent[0].isnan().all().item() and silent[1].tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match=r"expanded_src_to_dst_row is .*-1"):
        torch_npu.npu_moe_finalize_routing(rows, None, None, None, scales, at, None)


@pytest.mark.parametrize(("change", "message"), [
    (dict(drop_pad_mode=4), "drop_pad_mode is 4"), (dict(skip2=torch.ones(2, 3)), "skip1 is None"),
    (dict(bias=torch.ones(5, 3)), "export_for_source_row is None"), (dict(scales=torch.ones(2, 2).half()), "scales.dtype"),
    (dict(scales=torch.ones(1, 3)), r"expanded_src_to_dst_row.shape is \[4\]"), (dict(skip1=torch.ones(4, 3)), "skip1.shape"),
    (dict(expanded_src_to_dst_row=torch.arange(4)), "expanded_src_to_dst_row.dtype"),
    (dict(expanded_permuted_rows=torch.ones(5, 3)), "expanded_permuted_rows.shape"),
])
def test_finalize_routing_limits(torch_npu, change, message):
    call = dict(expanded_permuted_rows=torch.ones(4, 3), skip1=None, skip2=None, bias=None, scales=torch.ones(2, 2),
                expanded_src_to_dst_row=torch.arange(4).int(), export_for_source_row=None) | change
    with pytest.raises(RuntimeError, match=f"npu_moe_finalize_routing: {message}"):
        torch_npu.npu_moe_finalize_routing(**npu(call))
