"""What Moore Threads' build of PyTorch adds: a fused rms_norm behind torch's name, swish_glu and rope."""

import torch

from porthal.backends.torch.emulation.stand_in import need, need_dtype, need_rank, need_shape

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def rms_norm(input, normalized_shape, weight=None, eps=None):
    """input / sqrt(mean(input^2) + eps) * weight. The fused kernel wants weight in input's dtype."""
    op, shape = "rms_norm", list(normalized_shape)
    need_dtype(op, "input", input, *_FLOATS)
    need(bool(shape) and list(input.shape[-len(shape) :]) == shape, op, "normalized_shape", shape,
         f"the end of input.shape, {list(input.shape)}")
    need(eps is not None, op, "eps", eps, "a number (the fused kernel's default is not published)")
    x = input.float()
    y = x * torch.rsqrt(x.square().mean(list(range(-len(shape), 0)), keepdim=True) + eps)
    if weight is not None:
        need_dtype(op, "weight", weight, input.dtype)
        need_shape(op, "weight", weight, shape)
        y = y * weight.float()
    return y.to(input.dtype)


def swish_glu(input):
    """silu of the first half of the last axis, times the second."""
    op = "swish_glu"
    need_dtype(op, "input", input, *_FLOATS)
    need(input.dim() > 0 and input.shape[-1] % 2 == 0, op, "input.shape[-1]", list(input.shape)[-1:], "an even number")
    gate, up = input.float().chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(input.dtype)


def rope(input, freq_cis, rotary_interleaved, batch_first, multi_latent_attention=False):
    """Rotate input[S, B, H, D] by the angles freq_cis[S, D]: halves, or with multi_latent_attention even against odd.

    With it the result is in another order: what came of the even elements first, what came of the odd ones behind.
    Source: torch_musa, tests/unittest/operator/test_rope_apply.py, whose calls leave both flags False.
    """
    op = "rope"
    need_dtype(op, "input", input, *_FLOATS)
    need_dtype(op, "freq_cis", freq_cis, input.dtype)
    need_rank(op, "input", input, 4)
    need(not rotary_interleaved, op, "rotary_interleaved", rotary_interleaved, "False (what True does is not published)")
    need(not batch_first, op, "batch_first", batch_first, "False (what True does is not published)")
    need_shape(op, "freq_cis", freq_cis, [input.shape[0], input.shape[-1]])
    need(input.shape[-1] % 2 == 0, op, "input.shape[-1]", input.shape[-1], "an even number")
    x, angle = input.float(), freq_cis.float()[:, None, None]
    if multi_latent_attention:
        x = torch.cat([x[..., 0::2], x[..., 1::2]], -1)
    left, right = x.chunk(2, -1)
    return (x * angle.cos() + torch.cat([-right, left], -1) * angle.sin()).to(input.dtype)
