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

    launched, patched = interpreter.GridExecutor.__call__, interpreter._patch_lang
    known: set[str] = set()  # modules whose names of Triton are the interpreter's, in this launch

    def once(function: Any) -> Any:
        """It looks through all of Triton at each call of a helper, which took half of the time."""
        if function.__module__ not in known:
            known.add(function.__module__)
            return patched(function)

    @wraps(launched)
    def one_at_a_time(*args: Any, **kwargs: Any) -> None:
        """As a stream takes launches. The interpreter keeps its state in modules; and a trace of its lines never ends."""
        trace = sys.gettrace()
        with _turn:
            sys.settrace(None)
            known.clear()
            try:
                launched(*args, **kwargs)
            finally:
                sys.settrace(trace)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = one_at_a_time, once
