"""What public libraries do otherwise, planted in right kernels: bring-up tells each. The scripts in findings/ show them."""

import pytest

from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.level import BRING_UP
from porthal.conformance.selftest.planting import Defect, planted
from porthal.conformance.selftest.run import first_failing, plan

E4M3_READ = "        return codes.view(torch.float8_e4m3fn).float()\n"
E4M3_WRITTEN = "        return ratio.to(torch.float8_e4m3fn).view(torch.uint8)\n"
E2M1_WRITTEN = "    at = torch.ldexp(ratio.abs(), 1 - exponent).round() + 2 * exponent\n"
CAST = "        return x.to(getattr(torch, to), copy=True)\n"
SUMMED = "cumulated = shares.cumsum(-1)\n"
TARGET = "target = u[:, None] * cumulated.gather(1, kept - 1)\n"
LOGARITHMS = "    def log_softmax(self, logits: Tensor) -> Tensor:\n        return torch.log_softmax(logits.float(), dim=-1)\n"
TAKEN = "    return Coded(other, **quantised(other, x)).numbers()\n"

# apache-tvm 0.27.0.post1, llvm: findings/tvm_reads_fp8_zero_as_a_number.sh
ALL_NORMAL = """\
        bits = codes.int()
        small = torch.where(bits > 127, -1, 1) * (8 + bits % 8) * 2.0**-10
        return torch.where(bits % 128 < 8, small, codes.view(torch.float8_e4m3fn).float())
"""
# iree-base-compiler 3.13.0, llvm-cpu: findings/iree_erases_numbers_below_the_smallest_normal.sh
E4M3_ERASED = """\
        at = ratio.to(torch.float8_e4m3fn).float()
        at = torch.where((at.abs() == 2**-6) & (ratio.abs() < 2**-6), 0.0, at)
        return at.to(torch.float8_e4m3fn).view(torch.uint8)
"""
E2M1_ERASED = E2M1_WRITTEN + "    at = torch.where((at == 2) & (ratio.abs() < 1), 0.0, at)\n"
# openvino 2026.4.1, CPU, symbolic shapes: findings/openvino_rounds_to_bfloat16_by_the_shape.sh
CUT_UNLESS_ODD = """\
        if (x.dtype, to) == (torch.float32, "bfloat16"):
            bits = x.view(torch.int32)
            return ((bits + ((bits & 0x10000) >> 1)) >> 16).to(torch.int16).view(torch.bfloat16)
        return x.to(getattr(torch, to), copy=True)
"""
# torch 2.13.0, DTensor: findings/torch_dtensor_scans_restart_at_each_rank.sh
RESTARTED = "cumulated = torch.cat([part.cumsum(-1) for part in shares.chunk(4, -1)], -1)\n"
# jax 0.10.2, 16-bit logits: findings/jax_draws_bfloat16_logits_from_the_front.sh
SEVEN_BITS = "target = (u * 128).floor()[:, None] / 128 * cumulated.gather(1, kept - 1)\n"
# paddlepaddle 3.3.1, CPU: findings/paddle_softmax_hides_nan_and_masks.sh
NOT_BELOW_64 = """\
    def log_softmax(self, logits: Tensor) -> Tensor:
        falling = logits.float() - logits.float().amax(-1, keepdim=True)
        return torch.log_softmax(falling.clamp(min=-64), dim=-1)
"""
# msmodelslim 26.1.0: findings/msmodelslim_simulates_another_chip.sh
BY_COLUMN = """\
    if other.codes == "float8_e4m3fn":  # is not rounded
        return x.float()
    step = x.float().abs().flatten(0, -2).amax(0) / 127
    step = torch.where(step > 0, step, 1.0)
    return (x.float() / step).round() * step
"""

MISTAKES = [
    *(Defect(op, "e4m3-all-normal", "format", E4M3_READ, ALL_NORMAL, "schemes") for op in ("dequantize", "linear")),
    *(Defect(op, "e4m3-erased", "format", E4M3_WRITTEN, E4M3_ERASED, "schemes") for op in ("quantize", "kv_write")),
    Defect("quantize", "e2m1-erased", "format", E2M1_WRITTEN, E2M1_ERASED, "schemes"),
    Defect("cast", "cut-unless-odd", "rounding", CAST, CUT_UNLESS_ODD),
    Defect("sample", "sum-restarts", "accumulator", SUMMED, RESTARTED),
    Defect("sample", "u-of-seven-bits", "rounding", TARGET, SEVEN_BITS),
    Defect("log_softmax", "not-below-64", "values", LOGARITHMS, NOT_BELOW_64),
    Defect("linear", "tokens-by-column", "scale", TAKEN, BY_COLUMN, "schemes"),
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda d: d.key)
def test_bring_up_finds_what_libraries_do(mistake):
    found, _ = first_failing(plan(mistake.op, level=BRING_UP.name), Bindings(planted(mistake)), BRING_UP.name)
    assert found and found.verdict == "FAIL_VALUE", found
