"""Ascend's quantisation to int8, alone, fused and in the attention of an int8 cache, in float64; and what is refused."""

import pytest
import torch

BF16 = torch.bfloat16


def npu(x):
    if isinstance(x, dict):
        return {name: npu(value) for name, value in x.items()}
    if isinstance(x, list):
        return [npu(value) for value in x]
    return x.npu() if isinstance(x, torch.Tensor) else x


def int8(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def check_rows(q, scale, want):
    """Numbers within half a step of what they stand for, steps of max / 127."""
    step = want.abs().amax(-1) / 127
    assert q.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == want.shape[:-1]
    torch.testing.assert_close(scale.cpu().double(), step, rtol=1e-5, atol=0)
    assert ((q.cpu().double() - want / step[..., None]).abs() <= 0.51).all()


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("dst_type", [None, torch.int8])
def test_dynamic_quant(torch_npu, smooth, dst_type):
    x, factor = torch.randn(3, 2, 40).to(BF16), (torch.rand(40) + 0.5).to(BF16)
    q, scale = torch_npu.npu_dynamic_quant(x.npu(), smooth_scales=factor.npu() if smooth else None, dst_type=dst_type)
    check_rows(q, scale, x.double() * (factor.double() if smooth else 1))


@pytest.mark.parametrize(("change", "message"), [
    (dict(input=torch.ones(2, 8)), "input.dtype is torch.float32"), (dict(input=torch.ones(8).half()), r"input.dim\(\) is 1"),
    (dict(smooth_scales=torch.ones(8)), "smooth_scales.dtype"),
    (dict(smooth_scales=torch.ones(7).half()), "smooth_scales.shape"),
    (dict(dst_type=torch.int32), "dst_type is 3"), (dict(quant_mode="pertensor"), "quant_mode is 'pertensor'"),
    (dict(group_index=torch.ones(1).int()), "group_index is given"),
])
def test_dynamic_quant_limits(torch_npu, change, message):
    with pytest.raises(RuntimeError, match=f"npu_dynamic_quant: {message}"):
        torch_npu.npu_dynamic_quant(**npu(dict(input=torch.ones(2, 8).half()) | change))


def fused(**change):
    return dict(x=int8(7, 32), weight=[int8(3, 32, 16)], weight_scale=[torch.rand(3, 16) / 50], x_scale=torch.rand(7) / 50,
                group_list=torch.tensor([2, 0, 4]), group_list_type=1, dequant_dtype=0, quant_dtype=0) | change


def test_grouped_matmul_swiglu_quant(torch_npu):
    call = fused()
    held = npu(call)
    held["weight"] = [torch_npu.npu_format_cast(held["weight"][0], 29)]
    q, scale = torch_npu.npu_grouped_matmul_swiglu_quant_v2(**held)
    group = [0, 0, 2, 2, 2, 2]
    c = torch.einsum("mk,mkn->mn", call["x"][:6].double(), call["weight"][0].double()[group])
    c = c * call["x_scale"][:6, None].double() * call["weight_scale"][0].double()[group]
    gate, up = c.chunk(2, -1)
    check_rows(q[:6], scale[:6], gate * torch.sigmoid(gate) * up)
    assert scale[6].isnan().item()


@pytest.mark.parametrize(("change", "message"), [
    (dict(dequant_dtype=6), "dequant_dtype is 6"), (dict(quant_dtype=1), "quant_dtype is 1"),
    (dict(group_list_type=2), "group_list_type is 2"), (dict(x=torch.ones(7, 32)), "x.dtype"),
    (dict(x_scale=torch.ones(7, 1)), "x_scale.shape"), (dict(weight_scale=[torch.ones(3, 16).long()]), "weight_scale"),
    (dict(group_list=torch.tensor([2, 0, 6])), "7 rows at most"), (dict(smooth_scale=torch.ones(3)), "smooth_scale is given"),
    (dict(x=int8(7, 16)), r"x.shape\[1\] is 16"), (dict(weight=[int8(3, 32, 16)]), "format is ND; expected FRACTAL_NZ"),
])
def test_grouped_matmul_swiglu_quant_limits(torch_npu, change, message):
    held = npu(fused(**change))
    if "weight" not in change:
        held["weight"] = [torch_npu.npu_format_cast(held["weight"][0], 29)]
    with pytest.raises(RuntimeError, match=f"npu_grouped_matmul_swiglu_quant_v2: .*{message}"):
        torch_npu.npu_grouped_matmul_swiglu_quant_v2(**held)


@pytest.mark.parametrize("left", [True, False])
def test_dequant_swiglu_quant_activates_the_second_half_unless_told(torch_npu, left):
    x, weight, each = torch.randint(-9999, 9999, (6, 128), dtype=torch.int32), torch.rand(2, 128) / 99, torch.rand(6, 1) / 99
    smooth, counts = torch.rand(2, 64) + 0.5, torch.tensor([2, 3])
    call = dict(x=x, weight_scale=weight, activation_scale=each, quant_scale=smooth, group_index=counts, quant_mode=1)
    q, scale = torch_npu.npu_dequant_swiglu_quant(**npu(call), **(dict(activate_left=True) if left else {}))
    group = [0, 0, 1, 1, 1]
    a, b = (x[:5].double() * weight.double()[group] * each[:5].double()).chunk(2, -1)
    want = (a * torch.sigmoid(a) * b if left else b * torch.sigmoid(b) * a) * smooth.double()[group]
    check_rows(q[:5], scale[:5], want)
    assert scale[5].isnan().item()


def test_swiglu_quant_of_floats(torch_npu):
    x = torch.randn(4, 10).to(BF16)
    a, b = x.double().chunk(2, -1)
    check_rows(*torch_npu.npu_dequant_swiglu_quant(x.npu(), quant_mode=1, activate_left=True), a * torch.sigmoid(a) * b)


@pytest.mark.parametrize(("change", "message"), [
    (dict(quant_mode=0), "quant_mode is 0"), (dict(x=torch.ones(4, 128)), "x.dtype"), (dict(swiglu_mode=1), "swiglu_mode is 1"),
    (dict(x=torch.ones(4, 127).half()), r"x.shape\[1\] is 127"), (dict(x=torch.ones(4, 128).int()), "activation_scale is None"),
    (dict(activation_scale=torch.ones(4, 1)), "activation_scale is given"),
    (dict(weight_scale=torch.ones(128)), "weight_scale.shape"),
    (dict(group_index=torch.tensor([4]).int()), "group_index.dtype"), (dict(group_index=torch.tensor([5])), "4 rows at most"),
    (dict(group_index=torch.tensor([4]), x=torch.ones(4, 64).half()), "x.shape.* is 32; expected a multiple of 64"),
    (dict(quant_scale=torch.ones(64)), "quant_scale.shape"), (dict(bias=torch.ones(128).int()), "bias is given"),
])
def test_dequant_swiglu_quant_limits(torch_npu, change, message):
    with pytest.raises(RuntimeError, match=f"npu_dequant_swiglu_quant: .*{message}"):
        torch_npu.npu_dequant_swiglu_quant(**npu(dict(x=torch.ones(4, 128).half(), quant_mode=1) | change))


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def indexer():
    """Two requests, 3 and 1 query rows of 40 and 7 keys in scrambled blocks of 16."""
    table = ints([4, 0, 3], [2, 1, 1])
    query, key = (torch.randint(-3, 4, shape, dtype=torch.int8) for shape in ((4, 8, 128), (5, 16, 1, 128)))
    call = dict(query=query, key=key, weights=torch.randn(4, 8).half(), query_dequant_scale=torch.rand(4, 8).half(),
                query_quant_mode=0, key_quant_mode=0, key_dequant_scale=torch.rand(5, 16, 1).half(),
                actual_seq_lengths_query=ints(3, 4), sparse_count=12,
                actual_seq_lengths_key=ints(40, 7), block_table=table, layout_query="TND", layout_key="PA_BSND")
    score = []
    for row, (b, n) in enumerate([(0, 38), (0, 39), (0, 40), (1, 7)]):
        slots = [int(table[b, p // 16]) * 16 + p % 16 for p in range(n)]
        dots = call["query"][row].double() @ call["key"].reshape(80, 128).double()[slots].T
        scale = call["query_dequant_scale"][row].double()[:, None] * call["key_dequant_scale"].reshape(80).double()[slots]
        score.append((call["weights"][row].double()[:, None] * (dots * scale).relu()).sum(0))
    return call, score


def test_quant_indexer_selects_the_largest_scores(torch_npu, indexer):
    call, score = indexer
    indices = torch_npu.npu_quant_lightning_indexer(**npu(call))
    assert indices.shape == (4, 1, 12) and indices.dtype == torch.int32
    for row, s in zip(indices.cpu()[:, 0].tolist(), score):
        kept = min(12, len(s))
        assert row[kept:] == [-1] * (12 - kept) and set(row[:kept]) == set(s.topk(kept).indices.tolist())


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: {"query": c["query"].half()}, "query.dtype"), (lambda c: {"key": c["key"].half()}, "key.dtype"),
    (lambda c: {"weights": c["weights"].to(BF16)}, "weights.dtype"),
    (lambda c: {"query_quant_mode": 1}, "query_quant_mode is 1"),
    (lambda c: {"query_dequant_scale": c["query_dequant_scale"].float()}, "query_dequant_scale.dtype"),
    (lambda c: {"key_dequant_scale": c["key_dequant_scale"][..., 0]}, "key_dequant_scale.shape"),
    (lambda c: {"sparse_count": 3072}, "sparse_count is 3072"), (lambda c: {"layout_key": "BSND"}, "layout_key is 'BSND'"),
    (lambda c: {"weights": c["weights"] * 0 + 60000, "query_dequant_scale": c["query_dequant_scale"] + 2}, "beyond 65504"),
])
def test_quant_indexer_limits(torch_npu, indexer, change, message):
    with pytest.raises(RuntimeError, match=f"npu_quant_lightning_indexer: .*{message}"):
        torch_npu.npu_quant_lightning_indexer(**npu({**indexer[0], **change(indexer[0])}))


@pytest.fixture
def attention():
    """Two requests, 2 and 1 query rows of 20 and 5 keys in pages of packed rows of 656 bytes."""
    table, nope = ints([3, 0], [1, 2]), int8(4, 16, 512)
    rope, scale = torch.randn(4, 16, 64).to(BF16), torch.rand(4, 16, 4) / 99
    packed = torch.cat([nope, rope.view(torch.int8), scale.view(torch.int8)], -1)[:, :, None].contiguous()
    chosen = ints([7, 0, 18, 3, -1, -1], [19, 2, 11, 5, 4, 9], [4, 1, -1, -1, -1, -1])
    call = dict(query=torch.randn(3, 4, 576).to(BF16), sparse_indices=chosen[:, None], scale_value=0.0625, key_quant_mode=2,
                value_quant_mode=2, block_table=table, actual_seq_lengths_query=ints(2, 3), actual_seq_lengths_kv=ints(20, 5),
                layout_query="TND", layout_kv="PA_BSND", attention_mode=2)
    want = []
    for row, b in enumerate((0, 0, 1)):
        at = [(int(table[b, p // 16]), p % 16) for p in chosen[row].tolist() if p >= 0]
        latent = torch.stack([nope[i].double() * scale[i].double().repeat_interleave(128) for i in at])
        keys = torch.cat([latent, torch.stack([rope[i].double() for i in at])], -1)
        want.append(torch.softmax(call["query"][row].double() @ keys.T * 0.0625, -1) @ latent)
    packed = packed.npu()
    return npu(call) | dict(key=packed, value=packed), torch.stack(want)


def test_attention_of_packed_rows(torch_npu, attention):
    call, want = attention
    out = torch_npu.npu_kv_quant_sparse_flash_attention(**call)
    assert out.shape == (3, 4, 512) and out.dtype == BF16
    torch.testing.assert_close(out.cpu().double(), want, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: {"key_quant_mode": 1}, "key_quant_mode is 1"), (lambda c: {"attention_mode": 0}, "attention_mode is 0"),
    (lambda c: {"tile_size": 64}, "tile_size is 64"), (lambda c: {"rope_head_dim": 32}, "rope_head_dim is 32"),
    (lambda c: {"query": c["query"][..., :512].contiguous()}, r"query.shape\[-1\] is 512"),
    (lambda c: {"query": c["query"].repeat(1, 12, 1)}, "head count is 48"), (lambda c: {"value": c["key"] + 1}, "other data"),
    (lambda c: dict.fromkeys(("key", "value"), c["key"][..., :640].contiguous()), "key.shape"),
    (lambda c: {"key": c["key"].view(torch.uint8)}, "key.dtype is torch.uint8"),
    (lambda c: {"sparse_indices": c["sparse_indices"] + 3}, "sparse_indices is from"),
    (lambda c: {"quant_scale_repo_mode": 0}, "quant_scale_repo_mode is 0"),
])
def test_attention_of_packed_rows_limits(torch_npu, attention, change, message):
    with pytest.raises(RuntimeError, match=f"npu_kv_quant_sparse_flash_attention: .*{message}"):
        torch_npu.npu_kv_quant_sparse_flash_attention(**{**attention[0], **change(attention[0])})
