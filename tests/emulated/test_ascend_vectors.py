"""Ascend's norms, rotations and activations: the documented formulas in float64, and what is refused."""

import pytest
import torch

BF16 = torch.bfloat16


def close(found, wanted, rtol=2**-8, atol=1e-5):
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=rtol, atol=atol)


def turned(x):
    """(-x1, x0, -x3, x2, ...)"""
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def tables(*shape):
    angle = torch.randn(*shape, dtype=torch.float64) * 3
    return angle.cos().to(BF16), angle.sin().to(BF16)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_add_rms_norm_is_the_formula(torch_npu, dtype):
    a, b, gamma = (torch.randn(3, 2, 96).to(dtype), torch.randn(3, 2, 96).to(dtype), torch.randn(96).to(dtype))
    y, rstd, x = torch_npu.npu_add_rms_norm(a.npu(), b.npu(), gamma.npu(), epsilon=1e-3)
    total = a.double() + b.double()
    root = 1 / torch.sqrt((total**2).mean(-1, keepdim=True) + 1e-3)
    rtol = torch.finfo(dtype).eps
    assert y.dtype == x.dtype == dtype and rstd.dtype == torch.float32 and rstd.shape == (3, 2, 1)
    close(x, total, rtol)
    close(rstd, root, 1e-6)
    close(y, total * root * gamma.double(), rtol)


@pytest.mark.parametrize(("change", "message"), [
    (dict(x1=torch.ones(4, 8).double()), "x1.dtype is torch.float64"),
    (dict(x2=torch.ones(4, 8).half()), "x2.dtype is torch.float16"),
    (dict(gamma=torch.ones(8)), "gamma.dtype is torch.float32"),
    (dict(x2=torch.ones(1, 8).to(BF16)), "x2.shape is"),
    (dict(gamma=torch.ones(4).to(BF16)), "gamma.shape is"),
    (dict(x1=torch.ones(0, 8).to(BF16), x2=torch.ones(0, 8).to(BF16)), r"x1.shape is \[0, 8\]; expected no empty"),
])
def test_add_rms_norm_limits(torch_npu, change, message):
    call = dict(x1=torch.ones(4, 8).to(BF16), x2=torch.ones(4, 8).to(BF16), gamma=torch.ones(8).to(BF16)) | change
    with pytest.raises(RuntimeError, match=f"npu_add_rms_norm: {message}"):
        torch_npu.npu_add_rms_norm(**{name: x.npu() for name, x in call.items()})


@pytest.mark.parametrize(("sizes", "table"), [
    ((5, 4, 64), (5, 1, 64)), ((2, 3, 4, 64), (1, 3, 1, 64)), ((2, 3, 4, 64), (1, 1, 4, 64)), ((2, 3, 4, 64), (2, 1, 1, 64)),
])
@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_rotary_mul_is_the_formula(torch_npu, mode, sizes, table):
    x, (cos, sin) = torch.randn(sizes).to(BF16), tables(*table)
    y = torch_npu.npu_rotary_mul(x.npu(), cos.npu(), sin.npu(), mode)
    wide = x.double()
    other = turned(wide) if mode == "interleave" else torch.cat([-wide[..., 32:], wide[..., :32]], -1)
    close(y, wide * cos.double() + other * sin.double())
    assert y.dtype == BF16


@pytest.mark.parametrize(("x", "table", "mode", "message"), [
    ((5, 4, 63), (5, 1, 63), "half", r"input.shape\[-1\] is 63"), ((5, 4, 896), (5, 1, 896), "half", "is 896; expected"),
    ((5, 4), (5, 4), "half", r"input.dim\(\) is 2"), ((5, 4, 64), (1, 1, 64), "half", "r1.shape is"),
    ((5, 4, 64), (5, 4, 64), "interleave", "r1.shape is"), ((5, 1000, 8), (5, 1, 8), "interleave", "r1.shape is"),
    ((2, 3, 4, 64), (1, 1, 1, 64), "half", "r1.shape is"), ((2, 3, 4, 64), (2, 3, 1, 64), "interleave", "r1.shape is"),
    ((2, 3, 4, 64), (1, 3, 4, 64), "half", "r1.shape is"), ((40, 2, 25, 8), (1, 2, 1, 8), "interleave", "r1.shape is"),
    ((5, 4, 64), (5, 1, 64), "quarter", "rotary_mode is 'quarter'"), ((5, 4, 64), (5, 1, 32), "half", "r1.shape is"),
])
def test_rotary_mul_shapes_and_modes(torch_npu, x, table, mode, message):
    ones = torch.ones(table).npu()
    with pytest.raises(RuntimeError, match=f"npu_rotary_mul: .*{message}"):
        torch_npu.npu_rotary_mul(torch.ones(x).npu(), ones, ones, mode)


def test_rotary_mul_takes_tables_of_its_dtype_and_up_to_one(torch_npu):
    x, one = torch.ones(5, 4, 64).to(BF16).npu(), torch.ones(5, 1, 64).to(BF16).npu()
    with pytest.raises(RuntimeError, match=r"r1.dtype is torch.float32; expected torch.bfloat16"):
        torch_npu.npu_rotary_mul(x, one.float(), one)
    with pytest.raises(RuntimeError, match=r"r2\.dtype"):
        torch_npu.npu_rotary_mul(x, one, one.float())
    with pytest.raises(RuntimeError, match="r2 is beyond 1"):
        torch_npu.npu_rotary_mul(x, one, one * 1.01)
    with pytest.raises(RuntimeError, match="rotate is given"):
        torch_npu.npu_rotary_mul(x, one, one, rotate=torch.eye(64).npu())


def test_interleave_rope_permutes_what_it_rotates(torch_npu):
    x, (cos, sin) = torch.randn(2, 3, 4, 64).to(BF16), tables(2, 1, 4, 64)
    y = torch_npu.npu_interleave_rope(x.npu(), cos.npu(), sin.npu())
    first, second = x.double()[..., ::2], x.double()[..., 1::2]
    close(y, torch.cat([first, second], -1) * cos.double() + torch.cat([-second, first], -1) * sin.double())


@pytest.mark.parametrize(("change", "message"), [
    (dict(x=torch.ones(2, 3, 4, 64)), "x.dtype is torch.float32"), (dict(x=torch.ones(2, 3, 64).half()), r"x.dim\(\) is 3"),
    (dict(x=torch.ones(2, 3, 4, 32).half()), r"x.shape\[3\] is 32"),
    (dict(x=torch.ones(2, 3, 64, 4).half().transpose(2, 3)), "x.stride"),
    (dict(cos=torch.ones(2, 3, 4, 64).half()), "cos.shape"), (dict(sin=torch.ones(2, 1, 1, 64).half()), "sin.shape"),
    (dict(cos=torch.ones(2, 1, 4, 64)), "cos.dtype"), (dict(cos=torch.ones(1, 1, 4, 64).half()), "cos.shape"),
])
def test_interleave_rope_limits(torch_npu, change, message):
    table = torch.ones(2, 1, 4, 64).half()
    call = dict(x=torch.ones(2, 3, 4, 64).half(), cos=table, sin=table) | change
    with pytest.raises(RuntimeError, match=f"npu_interleave_rope: {message}"):
        torch_npu.npu_interleave_rope(**{name: x.npu() for name, x in call.items()})


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_swiglu_activates_the_first_half(torch_npu, dim):
    x = torch.randn(4, 6, 8).to(BF16)
    y = torch_npu.npu_swiglu(x.npu(), dim=dim)
    gate, up = x.double().chunk(2, dim)
    close(y, gate * torch.sigmoid(gate) * up)


@pytest.mark.parametrize(("x", "dim", "message"), [
    (torch.ones(4, 7), -1, r"input.shape\[-1\] is 7"), (torch.ones(4, 8), 2, "dim is 2"),
    (torch.ones(4, 8).double(), -1, "input.dtype"), (torch.ones(8, 4).T, -1, "input.stride"),
    (torch.ones(0, 8), -1, r"input.shape is \[0, 8\]"),
])
def test_swiglu_limits(torch_npu, x, dim, message):
    with pytest.raises(RuntimeError, match=f"npu_swiglu: {message}"):
        torch_npu.npu_swiglu(x.npu(), dim=dim)
