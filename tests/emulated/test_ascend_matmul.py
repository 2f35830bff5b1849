"""Ascend's products with weights, of floats and of int8: the documented formulas in float64, and what is refused."""

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


def grouped(**change):
    return dict(x=[torch.randn(7, 6).to(BF16)], weight=[torch.randn(3, 6, 5).to(BF16)], group_list=torch.tensor([2, 0, 4]),
                group_list_type=1, group_type=0, split_item=2) | change


def by_group(x, weight, counts):
    parts, at = [], 0
    for expert, n in enumerate(counts):
        parts.append(x[at : at + n].double() @ weight[expert].double())
        at += n
    return torch.cat(parts)


@pytest.mark.parametrize("kind", ["counts", "sums", "strided weight", "a weight per group"])
def test_grouped_matmul_multiplies_each_group_and_leaves_garbage_behind(torch_npu, kind):
    call = grouped()
    want = by_group(call["x"][0], call["weight"][0], [2, 0, 4])
    if kind == "sums":
        call |= dict(group_list=torch.tensor([2, 2, 6]), group_list_type=0)
    elif kind == "strided weight":
        call["weight"] = [call["weight"][0].transpose(1, 2).contiguous().npu().transpose(1, 2)]
    elif kind == "a weight per group":
        call["weight"] = list(call["weight"][0])
    [y] = torch_npu.npu_grouped_matmul(**npu(call))
    assert y.dtype == BF16 and y.shape == (7, 5) and y[6].isnan().all().item()
    torch.testing.assert_close(y.cpu()[:6].double(), want, rtol=2**-8, atol=1e-5)


def test_grouped_matmul_of_pairs(torch_npu):
    x, weight = [torch.randn(2, 3, 4), torch.randn(5, 6)], [torch.randn(4, 7), torch.randn(6, 1)]
    made = torch_npu.npu_grouped_matmul(npu(x), npu(weight), group_type=-1)
    for a, b, y in zip(x, weight, made):
        torch.testing.assert_close(y.cpu().double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scale_dtype", "made"), [(BF16, BF16), (torch.float32, torch.float16)])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("pairs", [True, False])
def test_grouped_matmul_of_int8(torch_npu, scale_dtype, made, per_token, pairs):
    x, weight, scale, each = int8(7, 6), int8(3, 6, 5), torch.rand(3, 5).to(scale_dtype) / 50, torch.rand(7) / 50
    call = grouped(x=[x], weight=[weight], scale=[scale], per_token_scale=[each] if per_token else None, output_dtype=made)
    if pairs:
        call |= dict(group_list=torch.tensor([[0, 2], [2, 4], [0, 0]]), group_list_type=2)
    [y] = torch_npu.npu_grouped_matmul(**npu(call))
    want = by_group(x, weight, [2, 0, 4]) * scale.double()[[0, 0, 2, 2, 2, 2]] * (each[:6, None].double() if per_token else 1)
    assert y.dtype == made
    torch.testing.assert_close(y.cpu()[:6].double(), want, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(("change", "message"), [
    (dict(group_type=None), "group_type is None"), (dict(split_item=0), "split_item is 0; expected 2 or 3"),
    (dict(group_list=None), "group_list is None"), (dict(group_list=torch.tensor([2, 1, 4]).int()), "group_list.dtype"),
    (dict(group_list=torch.tensor([2, 1])), "group_list.shape"), (dict(group_list=torch.tensor([2, 2, 4])), "7 rows at most"),
    (dict(group_list=torch.tensor([2, -1, 4])), "counts that are not negative"),
    (dict(group_list=torch.tensor([2, 1, 4]), group_list_type=0), "sums that never fall"),
    (dict(group_list_type=2), "group_list_type is 2"), (dict(group_list_type=3), "group_list_type is 3"),
    (dict(weight=[torch.ones(3, 5, 6).to(BF16)]), "weight.shape"), (dict(weight=[torch.ones(3, 6, 5)]), "weight.dtype"),
    (dict(weight=[torch.ones(6, 5).to(BF16)]), r"weight\[0\].dim\(\) is 2"), (dict(bias=[torch.ones(5)]), "bias is given"),
    (dict(x=[torch.ones(6, 7).to(BF16).T]), r"x\[0\].stride"), (dict(x=[torch.ones(7, 6).double()]), r"weight.dtype"),
    (dict(output_dtype=torch.float32), "output_dtype is 6"), (dict(output_dtype=7), "output_dtype is 7"),
    (dict(scale=[torch.ones(3, 5)]), "scale is given"), (dict(act_type=5), "act_type is 5"),
    (dict(group_type=2), "group_type is 2"), (dict(x=[torch.ones(7, 6).to(BF16)] * 2), r"len\(x\) is 2"),
    (dict(group_type=-1, split_item=0), "group_list is given"),
])
def test_grouped_matmul_limits(torch_npu, change, message):
    with pytest.raises(RuntimeError, match=f"npu_grouped_matmul: .*{message}"):
        torch_npu.npu_grouped_matmul(**npu(grouped(**change)))


@pytest.mark.parametrize(("change", "message"), [
    (dict(scale=None), r"len\(scale\) is None"), (dict(output_dtype=None), "output_dtype is None; expected torch.bfloat16"),
    (dict(output_dtype=torch.float16), "output_dtype is 5"), (dict(scale=[torch.ones(5).to(BF16)]), r"scale\[0\].shape"),
    (dict(scale=[torch.ones(3, 5).long()]), r"scale\[0\].dtype"), (dict(weight=[torch.ones(3, 6, 5)]), "weight.dtype"),
    (dict(per_token_scale=[torch.ones(7).to(BF16)]), r"per_token_scale\[0\].dtype"),
    (dict(per_token_scale=[torch.ones(7, 1)]), r"per_token_scale\[0\].shape"),
])
def test_grouped_matmul_limits_of_int8(torch_npu, change, message):
    call = grouped(x=[int8(7, 6)], weight=[int8(3, 6, 5)], scale=[torch.ones(3, 5).to(BF16)], output_dtype=BF16) | change
    with pytest.raises(RuntimeError, match=f"npu_grouped_matmul: .*{message}"):
        torch_npu.npu_grouped_matmul(**npu(call))


def test_a_format_stays_with_its_tensor_alone(torch_npu):
    x = torch.randn(4, 32).npu()
    held = torch_npu.npu_format_cast(x.T, 29)
    assert torch_npu.get_npu_format(held) is torch_npu.Format.FRACTAL_NZ and torch_npu.get_npu_format(x) == 2
    assert held.is_contiguous() and torch.equal(held.cpu(), x.cpu().T)
    assert torch_npu.get_npu_format(held.clone()) == 2 and torch_npu.get_npu_format(torch_npu.npu_format_cast(held, 2)) == 2
    with pytest.raises(RuntimeError, match="acl_format is 3"):
        torch_npu.npu_format_cast(x, 3)


def test_without_the_setting_a_cast_gives_rows_and_a_warning(torch_npu, monkeypatch):
    monkeypatch.setattr(torch.npu.config, "allow_internal_format", False)
    with pytest.warns(UserWarning, match="allow_internal_format=False"):
        made = torch_npu.npu_format_cast(torch.randn(4, 32).npu(), 29)
    assert torch_npu.get_npu_format(made) is torch_npu.Format.ND


@pytest.mark.parametrize(("made", "scale_dtype", "bias_dtype", "per_token"), [
    (BF16, BF16, None, True), (BF16, torch.float32, torch.int32, True), (BF16, torch.float32, BF16, False),
    (torch.float16, torch.float32, None, False), (torch.float16, torch.float32, torch.float32, True),
])
def test_quant_matmul_is_the_formula(torch_npu, made, scale_dtype, bias_dtype, per_token):
    a, b, scale, each = int8(4, 64), int8(64, 5), torch.rand(5).to(scale_dtype) / 500, torch.rand(4) + 0.5
    bias = None if bias_dtype is None else (torch.randn(5) * 1000).to(bias_dtype)
    call = dict(x1=a, x2=b, scale=scale, pertoken_scale=each if per_token else None, bias=bias, output_dtype=made)
    y = torch_npu.npu_quant_matmul(**npu(call))
    early, late = (bias, 0) if bias_dtype == torch.int32 else (0, 0 if bias is None else bias.double())
    want = (a.double() @ b.double() + early) * scale.double() * (each[:, None].double() if per_token else 1) + late
    assert y.dtype == made
    torch.testing.assert_close(y.cpu().double(), want, rtol=2**-8, atol=1e-5)


def test_quant_matmul_without_an_output_dtype_makes_int8(torch_npu):
    a, b, scale = int8(4, 64), int8(64, 5), torch.rand(5) / 500
    y = torch_npu.npu_quant_matmul(a.npu(), b.npu(), scale.npu())
    want = (a.double() @ b.double() * scale.double()).clamp(-128, 127)
    assert y.dtype == torch.int8 and ((y.cpu().double() - want).abs() <= 0.501).all()


@pytest.mark.parametrize(("change", "message"), [
    (dict(x1=torch.ones(4, 64)), "x1.dtype"), (dict(x2=int8(5, 64)), "x2.shape"), (dict(scale=torch.ones(4)), "scale.shape"),
    (dict(scale=torch.ones(5).half()), "scale.dtype"),
    (dict(scale=torch.ones(5).to(BF16), output_dtype=torch.float16), "scale.dtype"),
    (dict(pertoken_scale=torch.ones(4, 1)), "pertoken_scale.shape"), (dict(bias=torch.ones(5).half()), "bias.dtype"),
    (dict(pertoken_scale=torch.ones(4), output_dtype=None), "pertoken_scale is given"),
    (dict(x1=int8(0, 64)), "no empty tensor"),
    (dict(bias=torch.ones(5), output_dtype=torch.float16), "bias.dtype"), (dict(output_dtype=torch.float32), "output_dtype is"),
    (dict(offset=torch.ones(5)), "offset is given"), (dict(x1=int8(2, 4, 64)), r"x1.dim\(\) is 3"),
])
def test_quant_matmul_limits(torch_npu, change, message):
    call = dict(x1=int8(4, 64), x2=int8(64, 5), scale=torch.ones(5), output_dtype=BF16) | change
    with pytest.raises(RuntimeError, match=f"npu_quant_matmul: .*{message}"):
        torch_npu.npu_quant_matmul(**npu(call))
