"""Norms, rotations and activations."""

import torch

from porthal.backends.ascend.emulated.products import HALVES
from porthal.backends.torch.emulation.stand_in import need


def npu_rms_norm(input, gamma, epsilon=1e-6):
    """y = input / sqrt(mean(input^2) + epsilon) * gamma over gamma's dimensions, and the reciprocal root in float32.

    Source: npu_rms_norm page; the second result.shape: aclnnRmsNorm page.
    """
    op = "npu_rms_norm"
    need(input.dtype in (*HALVES, torch.float32), op, "input.dtype", input.dtype,
          "torch.bfloat16, torch.float16 or torch.float32")
    need(gamma.dtype in (input.dtype, torch.float32), op, "gamma.dtype", gamma.dtype,
          f"input's {input.dtype} or torch.float32")
    need(2 <= input.dim() <= 8, op, "input.dim()", input.dim(), "2 to 8")
    kept = input.dim() - gamma.dim()
    need(0 <= kept < input.dim() and gamma.shape == input.shape[kept:], op, "gamma.shape", list(gamma.shape),
          f"the last dimensions of input's {list(input.shape)}")
    axes = list(range(kept, input.dim()))
    x = input.float()
    length = torch.linalg.vector_norm(x, dim=axes, keepdim=True)
    rstd = (length * length / gamma.numel() + epsilon) ** -0.5
    return (x * rstd * gamma.float()).to(input.dtype), rstd
