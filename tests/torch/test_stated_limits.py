"""Limits that real kernels have, stated with `@limits`: what is refused is what the kernel refuses, the rest conforms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from porthal.backends.torch.backend import Torch
from porthal.conformance import replay
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.hal import at_least, bind, limits, multiple_of_bytes


class Grouped(Torch):
    name = "grouped"

    @limits(provider="torch.grouped_mm", dtypes={"x": "bfloat16"}, M=at_least(1), K=multiple_of_bytes(16, of="x"))
    def grouped_gemm(self, x: Any, w: Any, counts: Any) -> Any:
        return F.grouped_mm(x.contiguous(), w.native.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))


@pytest.mark.parametrize(
    ("sizes", "refused"),
    [
        ("M=33,K=96,N=96", ""),
        ("M=1,K=8,N=12", ""),
        ("M=33,K=7,N=96", "K = 7, the kernel takes a multiple of 16 bytes of x (x is bfloat16)"),
        ("M=33,K=12,N=96", "K = 12, the kernel takes a multiple of 16 bytes of x (x is bfloat16)"),
    ],
)
def test_rows_of_whole_blocks_of_16_bytes(sizes: str, refused: str) -> None:
    case, chip = Case.from_token(f"grouped_gemm,{sizes},E=3,x:bf16,0"), Grouped()
    inputs = build(case)
    choice = bind(backend=chip, profile={"grouped_gemm": [inputs.spec]}, overrides={}).choices["grouped_gemm"]
    assert (choice.status, choice.reason) == (("inherited", f"grouped: {refused}") if refused else ("own", ""))
    result = replay(case.token, chip)
    assert (result.verdict, result.status) == ("PASS", choice.status)
    if refused:
        values = (v.place(chip) if n == "w" else chip.from_numpy(v) for n, v in inputs.operands.items())
        with pytest.raises(RuntimeError, match="16 bytes"):
            chip.grouped_gemm(*values)
