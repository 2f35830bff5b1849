"""Triton's interpreter on CPU tensors: kernels run program by program in NumPy, in float32 and float16.

It says nothing about bfloat16, whose bit patterns it takes for integers, nor about what a compiler makes of a kernel. Stand-ins
of DeepGEMM and FlashMLA, of which bfloat16 is the dtype, are beside it: see `emulated_libraries`.
"""

import os
import sys
from functools import wraps
from threading import RLock
from typing import Any

from porthal.hal import UsageError

_turn = RLock()


def install() -> None:
    _interpreter()
    from porthal.backends.cuda import emulated_libraries  # with PyTorch, which takes seconds

    emulated_libraries.install()


def _interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and "triton" in sys.modules:
        return
    if "triton" in sys.modules:
        raise UsageError("triton is imported without its interpreter: start porthal with --emulated in a fresh process")
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    launched = interpreter.GridExecutor.__call__

    @wraps(launched)
    def one_at_a_time(*args: Any, **kwargs: Any) -> None:
        """As a stream takes launches. The interpreter keeps its state in modules; and a trace of its lines never ends."""
        trace = sys.gettrace()
        with _turn:
            sys.settrace(None)
            try:
                launched(*args, **kwargs)
            finally:
                sys.settrace(trace)

    interpreter.GridExecutor.__call__ = one_at_a_time
