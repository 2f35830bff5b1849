"""Ascend's fused prolog of MLA: the page's four paths in float64, and what is refused; and the calls between ranks."""

import pytest
import torch

BF16 = torch.bfloat16
ROWS, HIDDEN, RANK, HEADS, NOPE = 3, 1024, 1536, 2, 128


def small(*shape):
    return (torch.randn(shape) / shape[0] ** 0.5).to(BF16).npu()


@pytest.fixture(scope="module")
def inputs(torch_npu):
    angle = torch.randn(ROWS, 64, dtype=torch.float64)
    call = dict(token_x=torch.randn(ROWS, HIDDEN).to(BF16).npu(), weight_dq=small(HIDDEN, RANK),
                weight_uq_qr=small(RANK, HEADS * (NOPE + 64)), weight_uk=small(HEADS, NOPE, 512) / 8,
                weight_dkv_kr=small(HIDDEN, 576), rmsnorm_gamma_cq=torch.randn(RANK).to(BF16).npu(),
                rmsnorm_gamma_ckv=torch.randn(512).to(BF16).npu(), rope_sin=angle.sin().to(BF16).npu(),
                rope_cos=angle.cos().to(BF16).npu(), kv_cache=torch.full((3, 16, 1, 512), 9.0).to(BF16).npu(),
                kr_cache=torch.full((3, 16, 1, 64), 9.0).to(BF16).npu(), cache_index=torch.tensor([40, 3, 17]).npu())
    for name in ("weight_dq", "weight_uq_qr", "weight_dkv_kr"):
        call[name] = torch_npu.npu_format_cast(call[name], 29)
    return call


@pytest.fixture
def prolog(inputs):
    return inputs | {name: inputs[name].clone() for name in ("kv_cache", "kr_cache")}


def wide(call):
    return {name: x.cpu().double() for name, x in call.items()}


def norm(x, gamma):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * gamma


def rotated(x, cos, sin):
    first, second = x[..., ::2], x[..., 1::2]
    return torch.cat([first, second], -1) * cos + torch.cat([-second, first], -1) * sin


def test_prolog_is_its_four_paths(torch_npu, prolog):
    query, query_rope, query_scale, cq, cq_scale = torch_npu.npu_mla_prolog_v3(**prolog, query_norm_flag=True)
    c = wide(prolog)
    latent_q = norm(c["token_x"] @ c["weight_dq"], c["rmsnorm_gamma_cq"])
    q = (latent_q @ c["weight_uq_qr"]).reshape(ROWS, HEADS, NOPE + 64)
    cos, sin = c["rope_cos"], c["rope_sin"]
    kv = c["token_x"] @ c["weight_dkv_kr"]
    near = dict(rtol=2**-6, atol=2**-5)  # numbers are rounded to bfloat16 three times on the way
    torch.testing.assert_close(cq.cpu().double(), latent_q, **near)
    torch.testing.assert_close(query.cpu().double(), torch.einsum("thd,hdc->thc", q[..., :NOPE], c["weight_uk"]), **near)
    torch.testing.assert_close(query_rope.cpu().double(), rotated(q[..., NOPE:], cos[:, None], sin[:, None]), **near)
    assert query.dtype == query_rope.dtype == cq.dtype == BF16 and query_scale.shape == cq_scale.shape == (0,)
    for name, want in (("kv_cache", norm(kv[:, :512], c["rmsnorm_gamma_ckv"])), ("kr_cache", rotated(kv[:, 512:], cos, sin))):
        flat = prolog[name].cpu().reshape(48, -1)
        torch.testing.assert_close(flat[[40, 3, 17]].double(), want, rtol=2**-7, atol=2**-7)
        flat[[40, 3, 17]] = 9
        assert (flat == 9).all()


def test_prolog_returns_no_norm_unless_asked_and_takes_batches(torch_npu, prolog):
    twin = prolog | {name: prolog[name].clone() for name in ("kv_cache", "kr_cache")}
    query, query_rope, *_ = torch_npu.npu_mla_prolog_v3(**twin)
    batch = prolog | {name: prolog[name][:, None] for name in ("token_x", "rope_sin", "rope_cos", "cache_index")}
    made, made_rope, _, none, _ = torch_npu.npu_mla_prolog_v3(**batch)
    assert made.shape == (3, 1, HEADS, 512) and torch.equal(made.cpu()[:, 0], query.cpu()) and none.shape == (0,)
    assert torch.equal(made_rope.cpu()[:, 0], query_rope.cpu()) and torch.equal(batch["kv_cache"].cpu(), twin["kv_cache"].cpu())


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: {"weight_dq": c["weight_dq"].clone()}, "weight_dq's format is ND; expected FRACTAL_NZ"),
    (lambda c: {"token_x": c["token_x"].half()}, "token_x.dtype"), (lambda c: {"token_x": c["token_x"][:, :512]}, "is 512;"),
    (lambda c: {"weight_uk": c["weight_uk"][:, :64].contiguous()}, r"weight_uk.shape\[1\] is 64"),
    (lambda c: {"weight_uk": c["weight_uk"].repeat(2, 1, 1)[:3]}, r"weight_uk.shape\[0\] is 3"),
    (lambda c: {"weight_uq_qr": c["weight_uq_qr"].T}, "weight_uq_qr.shape"),
    (lambda c: {"cache_index": None}, "cache_index is None"),
    (lambda c: {"cache_index": c["cache_index"].int()}, "cache_index.dtype"),
    (lambda c: {"cache_index": c["cache_index"] - 4}, "cache_index is .*-1"), (lambda c: {"cache_mode": "PA_NZ"}, "cache_mode"),
    (lambda c: {"cache_index": c["cache_index"] + 8}, "cache_index is .*48"), (lambda c: {"kc_scale": 2.0}, "kc_scale is 2.0"),
    (lambda c: {"kv_cache": c["kv_cache"][:, :8].contiguous()}, "kr_cache.shape"),
    (lambda c: {name: c[name][:, :8].contiguous() for name in ("kv_cache", "kr_cache")}, r"kv_cache.shape\[1\] is 8"),
    (lambda c: {"rope_cos": c["rope_cos"][None]}, "rope_cos.shape"),
    (lambda c: {"weight_quant_mode": 1}, "weight_quant_mode is 1"),
    (lambda c: {"weight_dkv_kr": c["weight_dkv_kr"].T.contiguous().T}, "weight_dkv_kr.stride"),
])
def test_prolog_limits(torch_npu, prolog, change, message):
    with pytest.raises(RuntimeError, match=f"npu_mla_prolog_v3: .*{message}"):
        torch_npu.npu_mla_prolog_v3(**{**prolog, **change(prolog)})
    assert (prolog["kv_cache"] == 9).all().item() and (prolog["kr_cache"] == 9).all().item()


def dispatched(torch_npu, **change):
    ids = torch.tensor([[0, 5], [7, 1]], dtype=torch.int32)
    call = dict(x=torch.ones(2, 1024).to(BF16), expert_ids=ids, group_ep="ranks", ep_world_size=2, ep_rank_id=0,
                moe_expert_num=8) | change
    torch_npu.npu_moe_distribute_dispatch_v2(**{n: x.npu() if isinstance(x, torch.Tensor) else x for n, x in call.items()})


@pytest.mark.parametrize(("change", "message"), [
    (dict(ep_world_size=1), "ep_world_size is 1; expected 2 to 768"), (dict(ep_rank_id=2), "ep_rank_id is 2"),
    (dict(moe_expert_num=7), "moe_expert_num is 7"), (dict(x=torch.ones(2, 512).to(BF16)), r"x.shape\[1\] is 512"),
    (dict(x=torch.ones(2, 1024)), "x.dtype"), (dict(expert_ids=torch.zeros(2, 2).long()), "expert_ids.dtype"),
    (dict(expert_ids=torch.tensor([[3, 3], [0, 1]]).int()), "an expert twice"),
    (dict(expert_ids=torch.tensor([[8, 3], [0, 1]]).int()), "expert_ids is from 0 to 8"),
    (dict(shared_expert_rank_num=1), "shared_expert_rank_num is 1"), (dict(global_bs=3), "global_bs is 3"),
    (dict(group_ep=""), "group_ep is"),
    (dict(x=torch.ones(513, 1024).to(BF16), expert_ids=torch.zeros(513, 1).int()), "is 513; expected 1 to 512"),
    (dict(quant_mode=1), "quant_mode is 1"), (dict(), "ep_world_size is 2, and this stand-in has no other rank"),
])
def test_dispatch_checks_its_limits_and_then_has_nobody_to_talk_to(torch_npu, change, message):
    with pytest.raises(RuntimeError, match=f"npu_moe_distribute_dispatch_v2: .*{message}"):
        dispatched(torch_npu, **change)


@pytest.mark.parametrize(("change", "message"), [
    (dict(expert_scales=torch.ones(2, 2).half()), "expert_scales.dtype"), (dict(ep_send_counts=torch.ones(7).int()), "ep_send"),
    (dict(assist_info_for_combine=torch.ones(4).int()), "assist_info"), (dict(comm_alg="fullmesh_v1"), "comm_alg is"),
    (dict(), "ep_world_size is 2, and this stand-in has no other rank"),
])
def test_combine_checks_its_limits_and_then_has_nobody_to_talk_to(torch_npu, change, message):
    call = dict(expand_x=torch.ones(4, 1024).to(BF16), expert_ids=torch.tensor([[0, 5], [7, 1]]).int(),
                expert_scales=torch.ones(2, 2), assist_info_for_combine=torch.ones(512).int(),
                ep_send_counts=torch.ones(8).int(), group_ep="ranks", ep_world_size=2, ep_rank_id=0, moe_expert_num=8) | change
    with pytest.raises(RuntimeError, match=f"npu_moe_distribute_combine_v2: .*{message}"):
        torch_npu.npu_moe_distribute_combine_v2(**{n: x.npu() if isinstance(x, torch.Tensor) else x for n, x in call.items()})
