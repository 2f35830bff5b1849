"""Every instruction set passes bring-up, and no kernel of the cpu backend reads or writes outside its operands there; an
allocation that fails is a MemoryError, after which the kernel computes as before.

Operands and results end at a page that nobody may touch, or begin behind one. In a process of its own, as it may die.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
from math import prod

import numpy as np
import pytest

try:
    from porthal.backends.cpu import _native as native
except ImportError as error:
    pytest.skip(f"the native module is not built ({error}); run `pip install .`", allow_module_level=True)

from porthal.conformance.cases.copies import build
from porthal.conformance.cases.legal import FAR, PAST_2G, THREADS, elements
from porthal.conformance.cases.plan import cases
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.execution.call import logical
from porthal.conformance.execution.outcome import Outcome, difference, named
from porthal.conformance.execution.placing import place
from porthal.conformance.judgement.call import judge
from porthal.hal import Pages, bind, contracts, create, numpy_dtype, running

FEW, FEWER = 12, 4  # cases of an op, the smallest; FEWER where each is called many times
FILL = 0xA5
PLACES = [(end, apart) for end in (True, False) for apart in (False, True)]
LIBC = ctypes.CDLL(None, use_errno=True)


class Memory:
    """Arrays that end at a page that nobody may touch (`end`) or begin behind one, their rows dense or one element `apart`."""

    def __init__(self):
        self.end, self.apart = True, False
        self.given = []

    def like(self, x, apart=None):
        x = np.asarray(x)
        apart = self.apart if apart is None else apart
        shape = (*x.shape[:-1], x.shape[-1] + 1) if apart and x.ndim > 1 else x.shape
        size = prod(shape) * x.itemsize
        inner = max(-(-size // mmap.PAGESIZE), 1) * mmap.PAGESIZE
        memory = mmap.mmap(-1, inner + 2 * mmap.PAGESIZE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (base, base + mmap.PAGESIZE + inner):
            if LIBC.mprotect(ctypes.c_void_p(guard), mmap.PAGESIZE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        inside = np.frombuffer(memory, np.uint8)[mmap.PAGESIZE : mmap.PAGESIZE + inner]
        inside[...] = FILL
        start = inner - size if self.end else 0
        self.given.append((inside, start, start + size))
        array = inside[start : start + size].view(x.dtype).reshape(shape)
        if shape != x.shape:
            array = array[..., 1:] if self.end else array[..., :-1]
        array[...] = x
        return array

    def pages(self, spec):
        width = sum(width for _, width in spec.fields)
        slots, ends = self.like(np.zeros((spec.slots, width), numpy_dtype(spec.dtype))), np.cumsum([w for _, w in spec.fields])
        return Pages(spec, {name: slots[:, end - w : end] for (name, w), end in zip(spec.fields, ends.tolist())})

    def check(self):
        for inside, start, stop in self.given:
            assert (inside[:start] == FILL).all(), "written before an array"
            assert (inside[stop:] == FILL).all(), "written behind an array"
        self.given.clear()


AFAR = (FAR, PAST_2G, THREADS)


def small(op):
    able = [c for c in cases(contracts()[op]) if not (c.fault or c.seq or c.capture or c.view in AFAR)]
    plain = [c for c in able if not c.schemes] or able  # dequantize takes nothing else
    return sorted(plain, key=elements)[:FEW]


def walk(ops):
    backend, memory = create("cpu"), Memory()
    backend.from_numpy, backend.alloc_pages = memory.like, memory.pages
    backend.empty = lambda shape, dtype: memory.like(np.empty(shape, numpy_dtype(dtype)), apart=False)
    bindings, calls = Bindings(backend), 0
    with running(backend):
        for op in ops:
            for i, case in enumerate(small(op)):
                inputs = build(case)
                binding = bindings.bound(inputs).binding
                passed = []
                for n, isa in enumerate(native.isas()):
                    native.set_isa(isa)
                    memory.end, memory.apart = PLACES[(i + n) % len(PLACES)]
                    print(f"{isa}, end={memory.end}, apart={memory.apart}: {case.token}", flush=True)
                    operands = [place(binding, name, value, case.view)[0] for name, value in inputs.operands.items()]
                    held = named(binding, inputs.contract, getattr(binding, op)(*operands, **inputs.attrs))
                    memory.check()
                    calls += 1
                    results = logical(binding, inputs, held)
                    if all(difference(results, other) for other in passed):
                        judgement = judge(inputs, Outcome(results, results))
                        assert judgement.verdict == "PASS", judgement
                        passed.append(results)
    print(calls)


FAILING = """#include <cstdlib>
#include <new>
extern "C" {
long left = -1;  // allocations until one fails
}
static void* given(void* memory) {
  if (left >= 0 && left-- == 0) throw std::bad_alloc();
  return memory;
}
void* operator new(std::size_t n) { return given(std::malloc(n)); }
void* operator new(std::size_t n, std::align_val_t a) { return given(std::aligned_alloc(std::size_t(a), n)); }
"""


def fail(library, ops):
    """Each allocation of each call fails once, in a thread of its own: what threads keep is allocated anew."""
    left = ctypes.c_long.in_dll(ctypes.CDLL(library), "left")
    backend, failures = create("cpu"), 0
    bindings = Bindings(backend)

    def call():
        try:
            found.append(getattr(binding, op)(*operands, **inputs.attrs))
        except MemoryError as error:
            found.append(error)
        finally:
            found.append(left.value)
            left.value = -1

    with running(backend):
        for op in ops:
            for case in small(op)[:FEWER]:
                inputs = build(case)
                binding = bindings.bound(inputs).binding
                expected = None
                for n in range(-1, 1000):
                    print(f"allocation {n}: {case.token}", flush=True)
                    operands = [place(binding, name, value, case.view)[0] for name, value in inputs.operands.items()]
                    found, left.value = [], n
                    thread = threading.Thread(target=call)
                    thread.start()
                    thread.join()
                    result, rest = found
                    if n >= 0 and rest == -1:
                        assert isinstance(result, MemoryError), "no MemoryError"
                        failures += 1
                        continue
                    results = logical(binding, inputs, named(binding, inputs.contract, result))
                    expected = expected or results
                    assert not difference(results, expected), "other results after a failure"
                    if n >= 0:
                        break
    print(failures)


def run(*arguments, **environment):
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    return done.returncode, done.stdout.splitlines()[-1:], done.stderr


def own():
    return [op for op, choice in bind("cpu", overrides={}).choices.items() if choice.status == "own"]


def test_the_page_behind_an_array_cannot_be_read():
    assert run("beyond")[0] == -signal.SIGSEGV


def test_every_instruction_set_conforms_and_stays_within_its_operands():
    code, last, said = run("walk", *own())
    assert code == 0, f"{last}: {said}"
    assert int(last[0]) == FEW * len(own()) * len(native.isas())


def test_an_allocation_that_fails_is_a_memory_error(tmp_path):
    if not (compiler := shutil.which("c++")):
        pytest.skip("there is no C++ compiler c++")
    library = tmp_path / "failing.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", library], input=FAILING, text=True, check=True)
    code, last, said = run("fail", library, *own(), LD_PRELOAD=str(library), PORTHAL_THREADS="1")
    assert code == 0, f"{last}: {said}"
    assert int(last[0]) > len(own())
    with pytest.raises(MemoryError):
        native.Packed(2**10, 2**20, 2**30, np.float32)


if __name__ == "__main__":
    task, *arguments = sys.argv[1:]
    if task == "beyond":
        array = Memory().like(np.zeros(3, np.float32))
        ctypes.string_at(array.ctypes.data + array.nbytes, 1)
    elif task == "walk":
        walk(arguments)
    else:
        fail(*arguments[:1], arguments[1:])
