"""Ascend's writes to a cache: what is written, what stays, and what is refused."""

import math

import pytest
import torch

BF16 = torch.bfloat16


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_scatter_writes_rows_in_place(torch_npu, index_dtype):
    cache = torch.arange(24.0).reshape(6, 4).to(BF16).npu()
    rows = -torch.arange(8.0).reshape(2, 4).to(BF16).npu()
    made = torch_npu.npu_scatter_nd_update_(cache, torch.tensor([[4], [1]], dtype=index_dtype).npu(), rows)
    wanted = torch.arange(24.0).reshape(6, 4)
    wanted[[4, 1]] = rows.cpu().float()
    assert made is cache and torch.equal(cache.cpu().float(), wanted)


def test_scatter_reaches_single_numbers_and_strided_caches(torch_npu):
    cache = torch.zeros(4, 3).npu()
    torch_npu.npu_scatter_nd_update_(cache.T, torch.tensor([[2, 1], [0, 3]]).npu(), torch.tensor([5.0, 7.0]).npu())
    assert cache[1, 2] == 5 and cache[3, 0] == 7 and cache.sum() == 12


def test_scatter_keeps_another_row_than_the_last_of_two(torch_npu):
    cache = torch.zeros(3, 2).npu()
    torch_npu.npu_scatter_nd_update_(cache, torch.tensor([[1], [1]]).npu(), torch.tensor([[1.0, 1], [2, 2]]).npu())
    assert cache[1].tolist() == [1, 1]


@pytest.mark.parametrize(("change", "message"), [
    (dict(input=torch.zeros(6, 4).double(), updates=torch.zeros(2, 4).double()), "input.dtype is torch.float64"),
    (dict(updates=torch.zeros(2, 4).half()), "updates.dtype"), (dict(updates=torch.zeros(3, 4)), "updates.shape"),
    (dict(indices=torch.zeros(2, 1)), "indices.dtype"), (dict(indices=torch.zeros(2).long()), r"indices.dim\(\) is 1"),
    (dict(indices=torch.zeros(2, 3).long()), r"indices.shape\[-1\] is 3"),
    (dict(indices=torch.tensor([[1], [-1]])), r"indices is \[\[-1\]\]"),
    (dict(indices=torch.tensor([[6], [2]])), r"indices is \[\[6\]\]; expected within \[6\]"),
])
def test_scatter_limits(torch_npu, change, message):
    call = dict(input=torch.zeros(6, 4), indices=torch.zeros(2, 1).long(), updates=torch.zeros(2, 4)) | change
    with pytest.raises(RuntimeError, match=f"npu_scatter_nd_update_: {message}"):
        torch_npu.npu_scatter_nd_update_(*(x.npu() for x in call.values()))


@pytest.fixture
def fused():
    """One sequence of 5 rows into scattered slots of 3 pages of 16."""
    angle = torch.randn(1, 1, 5, 64, dtype=torch.float64)
    return dict(kv=torch.randn(1, 1, 5, 576).to(BF16).npu(), gamma=torch.randn(512).to(BF16).npu(),
                cos=angle.cos().to(BF16).npu(), sin=angle.sin().to(BF16).npu(),
                index=torch.tensor([40, 3, 17, 0, 47]).npu(), k_cache=torch.full((3, 16, 1, 64), 9.0).to(BF16).npu(),
                ckv_cache=torch.full((3, 16, 1, 512), 9.0).to(BF16).npu(), epsilon=1e-3, cache_mode="PA")


def norm_and_rotation(call):
    kv, cos, sin = (call[name].cpu().double() for name in ("kv", "cos", "sin"))
    latent, rope = kv[..., :512], kv[..., 512:]
    latent = latent / torch.sqrt((latent**2).mean(-1, keepdim=True) + call["epsilon"]) * call["gamma"].cpu().double()
    first, second = rope[..., ::2], rope[..., 1::2]
    return latent, torch.cat([first, second], -1) * cos + torch.cat([-second, first], -1) * sin


def test_fused_write_is_norm_rotation_and_scatter(torch_npu, fused):
    latent, rope = norm_and_rotation(fused)
    k, c, k_out, c_out = torch_npu.npu_kv_rmsnorm_rope_cache(**fused, is_output_kv=True)
    assert k is fused["k_cache"] and c is fused["ckv_cache"]
    for cache, out, wanted in ((k, k_out, rope), (c, c_out, latent)):
        flat, slots = cache.cpu().reshape(48, -1), fused["index"].cpu()
        torch.testing.assert_close(flat[slots].double(), wanted[0, 0], rtol=2**-8, atol=1e-5)
        assert torch.equal(out.cpu()[0, 0], flat[slots])
        flat[slots] = 9
        assert (flat == 9).all()


def test_fused_write_v2_returns_no_cache_and_garbage_unless_asked(torch_npu, fused):
    twin = fused | {name: fused[name].clone() for name in ("k_cache", "ckv_cache")}
    torch_npu.npu_kv_rmsnorm_rope_cache(**twin)
    rope, latent = torch_npu.npu_kv_rmsnorm_rope_cache_v2(**fused)
    assert rope.shape == (1, 1, 5, 64) and latent.shape == (1, 1, 5, 512)
    assert rope.isnan().all().item() and latent.isnan().all().item()
    assert torch.equal(fused["k_cache"].cpu(), twin["k_cache"].cpu())


def test_fused_write_to_caches_of_sequences(torch_npu, fused):
    latent, rope = norm_and_rotation(fused)
    fused |= dict(cache_mode="Norm", index=torch.tensor([[7, 0, 3, 1, 4]]).npu(),
                  k_cache=torch.zeros(1, 1, 8, 64).to(BF16).npu(), ckv_cache=torch.zeros(1, 1, 8, 512).to(BF16).npu())
    torch_npu.npu_kv_rmsnorm_rope_cache_v2(**fused)
    for name, wanted in (("k_cache", rope), ("ckv_cache", latent)):
        found = fused[name].cpu()[0, 0]
        torch.testing.assert_close(found[[7, 0, 3, 1, 4]].double(), wanted[0, 0], rtol=2**-8, atol=1e-5)
        assert found[[2, 5, 6]].abs().sum() == 0


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: {"cache_mode": "PA_NZ"}, "cache_mode is 'PA_NZ'"), (lambda c: {"kv": c["kv"].float()}, "kv.dtype"),
    (lambda c: {"kv": c["kv"][..., :512]}, "kv.shape"), (lambda c: {"gamma": c["gamma"].half()}, "gamma.dtype"),
    (lambda c: {"cos": c["cos"][0]}, "cos.shape"), (lambda c: {"index": c["index"].int()}, "index.dtype is torch.int32"),
    (lambda c: {"index": c["index"][None]}, "index.shape"), (lambda c: {"index": c["index"] * 2}, "index is"),
    (lambda c: {"index": c["index"] - 1}, "index is"), (lambda c: {"index": c["index"] // 40}, "index is twice the same slot"),
    (lambda c: {"k_cache": c["k_cache"].int().char(), "ckv_cache": c["ckv_cache"].int().char()}, "k_cache.dtype is torch.int8"),
    (lambda c: {"k_cache": c["k_cache"][:2]}, "ckv_cache.shape"),
    (lambda c: {"k_rope_scale": torch.ones(64).npu()}, "k_rope_scale is given"), (lambda c: {"v": c["kv"]}, "v is given"),
    (lambda c: {name: c[name].transpose(0, 2) for name in ("kv", "cos", "sin")}, r"k_cache.shape\[0\] is 3; expected 5"),
    (lambda c: {"cache_mode": "Norm", "is_output_kv": True}, "is_output_kv is True"),
])
def test_fused_write_limits(torch_npu, fused, change, message):
    with pytest.raises(RuntimeError, match=f"npu_kv_rmsnorm_rope_cache_v2: .*{message}"):
        torch_npu.npu_kv_rmsnorm_rope_cache_v2(**{**fused, **change(fused)})
    with pytest.raises(RuntimeError, match=f"npu_kv_rmsnorm_rope_cache: .*{message}"):
        torch_npu.npu_kv_rmsnorm_rope_cache(**{**fused, **change(fused)})
    assert math.isclose(fused["k_cache"].float().mean().item(), 9)
