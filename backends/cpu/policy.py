"""Which instruction set and how many threads the kernels use: by the environment, read here alone."""

from __future__ import annotations

import os
from typing import Any

from porthal.hal import UsageError

MOST = 1024  # threads
# Instruction sets whose products of bfloat16 (matrices, scores and values of attention) read subnormals as zero, and give zero
# for them: vdpbf16ps and tiles do, whatever the processor's mode is. All else keeps them, in any dtype.
FLUSHING = {"avx512bf16", "amx"}


def settings(native: Any) -> tuple[str, int]:
    """The instruction set and the number of threads of the native module.

    PORTHAL_ISA       one of those that this processor runs; default: the best
    PORTHAL_THREADS   default: OMP_NUM_THREADS, else the processors that this process may run on
    """
    isa = os.environ.get("PORTHAL_ISA", "") or native.isa()
    if isa not in native.isas():
        raise UsageError(f"PORTHAL_ISA is {isa!r}: expected one of {', '.join(native.isas())}, which this processor runs")
    for name in ("PORTHAL_THREADS", "OMP_NUM_THREADS"):
        if text := os.environ.get(name, "").strip():
            first = text.partition(",")[0] if name == "OMP_NUM_THREADS" else text  # OpenMP's has one number per nesting level
            if not (first.isascii() and first.isdigit() and len(first) < 9 and 1 <= int(first) <= MOST):
                raise UsageError(f"{name} is {text!r}: expected a number of threads from 1 to {MOST}")
            return isa, int(first)
    return isa, native.num_threads()


def apply(native: Any) -> None:
    """Make its kernels use them."""
    isa, threads = settings(native)
    native.set_isa(isa)
    native.set_num_threads(threads)


def flushes(native: Any) -> bool:
    """Whether products of bfloat16 read subnormals as zero now."""
    return settings(native)[0] in FLUSHING


def text(native: Any) -> str:
    """What is in use, in words: "avx512, 2 threads"."""
    isa, threads = settings(native)
    return f"{isa}, {threads} thread{'s' * (threads > 1)}"
