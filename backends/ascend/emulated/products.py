"""What the products A2 and A3, which are imitated here, have for all calls."""

import enum

import torch

from porthal.backends.torch.emulation.stand_in import garbage, need

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)
EVERY_TOKEN = 2**63 - 1


class Format(enum.IntEnum):
    """Storage formats, of those that the package names. Source: npu_format_cast page."""

    ND = 2
    FRACTAL_NZ = 29


def format_of(x: torch.Tensor) -> Format:
    """The storage format, which a tensor carries: npu_format_cast writes it, and no other operation keeps it."""
    return getattr(x, "npu_format", Format.ND)


def need_nz(op: str, name: str, x: torch.Tensor) -> None:
    found = format_of(x)
    need(found == Format.FRACTAL_NZ, op, f"{name}'s format", found.name, "FRACTAL_NZ (npu_format_cast to 29)")


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 numbers as the chip leaves them between two steps."""
    return x.to(dtype).float()


def normed(x: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(mean(x^2) + epsilon) * gamma over gamma's dimensions, and the reciprocal root, both in float32."""
    axes = list(range(-gamma.dim(), 0))
    length = torch.linalg.vector_norm(x, dim=axes, keepdim=True)
    rstd = (length * length / gamma.numel() + epsilon) ** -0.5
    return x * rstd * gamma.float(), rstd


def rotated_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Pairs (0, 1), (2, 3) ... of the last dimension rotated; their first numbers come back before all second ones."""
    x, cos, sin = x.float(), cos.float(), sin.float()
    first, second = x[..., ::2], x[..., 1::2]
    return torch.cat([first, second], -1) * cos + torch.cat([-second, first], -1) * sin


def per_row_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 numbers and their float32 scale max |row| / 127; numbers of a row of zeros, whose scale is 0, are undefined."""
    scale = x.abs().amax(-1) / 127
    q = (x / scale[..., None]).round().clamp(-128, 127)
    return torch.where(scale[..., None] == 0, garbage(x.shape, torch.int8), q.nan_to_num().to(torch.int8)), scale


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate * sigmoid(gate) * up of float32 numbers."""
    return gate / (1 + (-gate).exp()) * up
