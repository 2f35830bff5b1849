"""Every kernel in every configuration, compiled without a GPU: `python -m porthal.backends.cuda.aot [TARGET ...]`.

Each operator is called on tensors that have shapes and no memory, at GLM-5's sizes and at odd ones, and instead of a launch
its kernels are compiled for a target whose limits decide the configuration, as a device's would. What a program takes of
shared memory and registers, and what it spills, is read from the machine code. Prints one line of JSON per kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from porthal.backends.cuda.own import Own
from porthal.hal import Batch, Pages, PagesSpec, Rows, Selection, SelectionSpec, Weight, WeightSpec


class Chip(NamedTuple):
    """What the vendor's pages state of a chip: shared memory of a program, processors, registers of a thread."""

    target: GPUTarget
    shared: int
    processors: int
    registers: int = 255


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 << 10, 108),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 << 10, 132),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 << 10, 148),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 << 10, 304, 512),
}


SPILLED = 32  # bytes of a thread: what is put aside once, outside a loop


@dataclass(frozen=True)
class Compiled:
    """A kernel in one configuration on one chip; spilled is in bytes of a thread."""

    chip: str
    kernel: str
    configuration: str
    shared: int
    registers: int
    spilled: int

    def breach(self) -> str | None:
        """What it takes more of than the chip has, or None."""
        chip = CHIPS[self.chip]
        if self.shared > chip.shared:
            return f"{self.shared} bytes of shared memory, expected at most {chip.shared}"
        if self.registers > chip.registers:
            return f"{self.registers} registers, expected at most {chip.registers}"
        if self.spilled > SPILLED:
            return f"{self.spilled} bytes of spilled registers, expected at most {SPILLED}"
        return None


class _Absent(DriverBase):
    """The driver of a chip that is not here. Each has a number of its own, by which Triton keeps what it compiled."""

    def __init__(self, target: GPUTarget, number: int) -> None:
        self.target, self.number = target, number

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


class _Shapes(Own):
    """The backend with tensors that have no memory."""

    def __init__(self, chip: Chip) -> None:
        self.device, self.emulated = "meta", True  # no device to make current
        self.processors, self.shared = chip.processors, chip.shared


def compiled(name: str) -> Iterator[Compiled]:
    """What the calls of `calls` compile for a chip, each configuration once."""
    chip, seen = CHIPS[name], set()
    triton.runtime.driver.set_active(_Absent(chip.target, list(CHIPS).index(name)))
    found: list[Compiled] = []
    launched = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        kernel = launched(self, *args, grid=grid, warmup=True, **constants)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            configuration = " ".join(f"{k}={v}" for k, v in constants.items())
            dtypes = "/".join(dict.fromkeys(str(a.dtype).removeprefix("torch.") for a in args if isinstance(a, torch.Tensor)))
            registers, spilled = _resources(kernel, chip.target)
            found.append(
                Compiled(name, self.__name__, f"{dtypes} {configuration}", kernel.metadata.shared, registers, spilled)
            )
        return kernel

    JITFunction.run = run
    try:
        for _ in calls(_Shapes(chip)):
            yield from found
            found.clear()
    finally:
        JITFunction.run = launched


def _resources(kernel: Any, target: GPUTarget) -> tuple[int, int]:
    """Registers of a thread, and bytes of them that it spills."""
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        return _number(r"\.vgpr_count: +(\d+)", text), 4 * _number(r"\.vgpr_spill_count: +(\d+)", text)
    tools, ptx = triton.knobs.nvidia, kernel.asm["ptx"]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel"
        file.write_bytes(kernel.asm["cubin"])
        text = _printed(tools.cuobjdump.path, "--dump-resource-usage", file)
        if _number(r"STACK:(\d+)", text) == 0:
            return _number(r"REG:(\d+)", text), 0
        file.write_text(ptx)  # a frame may be for calls as well: only the assembler tells what is spilled
        assembler = tools.ptxas_blackwell if target.arch >= 100 else tools.ptxas
        architecture = _named(r"\.target (\w+)", ptx)
        text = _printed(assembler.path, "-v", f"--gpu-name={architecture}", "-o", Path(folder) / "cubin", file)
    return _number(r"Used (\d+) registers", text), _number(r"(\d+) bytes spill stores", text)


def _printed(*command: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _named(pattern: str, text: str) -> str:
    [name] = set(re.findall(pattern, text))
    return name


def _number(pattern: str, text: str) -> int:
    return max(map(int, re.findall(pattern, text)))


def calls(b: Own) -> Iterator[Any]:
    """Every operator as GLM-5 calls it in decode and prefill, and at sizes that fill no tile, 1 among them."""
    for kind in ("bfloat16", "float32", "float16"):
        for T, requests, wide in ((8, 8, True), (4096, 1, True), (5, 2, False)):
            yield from _rows(b, kind, T, wide)
            yield from _experts(b, kind, T, wide)
            yield from _attention(b, kind, T, requests, wide)
            logits, of_row, k = b.empty((T, 154880 if wide else 7), kind), b.empty((T,), "float32"), b.empty((T,), "int32")
            yield b.argmax(logits)
            yield b.sample(logits, of_row, of_row, k, of_row)
    yield from _ones(b, "bfloat16")


def _rows(b: Own, kind: str, T: int, wide: bool) -> Iterator[Any]:
    H = 6144 if wide else 97
    x, weight = b.empty((T, H), kind), b.empty((H,), kind)
    yield b.rms_norm(x, weight)
    yield b.add_rms_norm(x, x, b.empty((H,), "float32"))
    yield b.silu_mul(b.empty((T, 2 * (2048 if wide else 7)), kind))


def _experts(b: Own, kind: str, T: int, wide: bool) -> Iterator[Any]:
    E, H, I, k = (256, 6144, 2048, 8) if wide else (3, 97, 33, 2)
    x, ids, weights = b.empty((T, H), kind), b.empty((T, k), "int32"), b.empty((T, k), "float32")
    yield b.moe_route(b.empty((T, E), "float32"), b.empty((E,), "float32"), k=k, scale=2.5)
    yield b.moe_route(b.empty((T, 256), "float32"), b.empty((256,), "float32"), k=8, scale=2.5, n_group=8, topk_group=4)
    rows, counts, source = b.moe_permute(x, ids, E=E)
    yield b.moe_unpermute(rows, source, weights)
    w13, w2 = (_weight(b, shape, kind) for shape in ((E, 2 * I, H), (E, H, I)))
    yield b.grouped_gemm(rows, w13, counts)
    yield b.moe_experts(x, w13, w2, ids, weights)


def _attention(b: Own, kind: str, T: int, requests: int, wide: bool) -> Iterator[Any]:
    (C, R, D), N, G, k = (512, 64, 128) if wide else (24, 24, 24), 64 if wide else 3, 32 if wide else 5, 2048 if wide else 16
    pages = 131072 // 64
    table = np.zeros((requests, pages), np.int32)
    rows = np.linspace(0, T, requests + 1).astype(np.int32)
    batch = b.plan(Batch(rows, np.full(requests, pages * 64, np.int32), table, 64))
    kv, keys = (_pages(b, widths, kind) for widths in ((C, R), (D,)))
    yield b.kv_write(kv, batch, b.empty((T, C), kind), b.empty((T, R), kind))
    yield b.kv_write(keys, batch, b.empty((T, D), kind))
    for layout, start in (("interleaved", 0), ("half", 0)):
        yield b.rope(b.empty((T, N, C), kind), batch, theta=1e6, layout=layout, start=start, width=R)
    iq, w = b.empty((T, G, D), kind), b.empty((T, G), "float32")
    yield b.indexer_scores(iq, w, keys, batch, scale=0.0156)
    sel = b.indexer_topk(iq, w, keys, batch, k=k, scale=0.0156)
    yield b.topk(b.empty((T, batch.max_kv), "float32"), batch, k=k)
    for heads in (N, 8):
        q, qr = b.empty((T, heads, C), kind), b.empty((T, heads, R), kind)
        yield b.sparse_mla(q, qr, kv, Selection(SelectionSpec(T, k), Rows(*sel.native)), batch, scale=0.0625)


def _ones(b: Own, kind: str) -> Iterator[Any]:
    """Every size is 1, which Triton makes a constant of."""
    x, heads, floats, ints = b.empty((1, 1), kind), b.empty((1, 1, 1), kind), b.empty((1,), "float32"), b.empty((1,), "int32")
    weight, ids, weights = b.empty((1,), kind), b.empty((1, 1), "int32"), b.empty((1, 1), "float32")
    yield b.rms_norm(x, weight)
    yield b.add_rms_norm(x, x, weight)
    yield b.silu_mul(b.empty((1, 2), kind))
    yield b.moe_route(weights, floats, k=1, scale=1.0)
    rows, counts, source = b.moe_permute(x, ids, E=1, first_expert=1)
    yield b.moe_unpermute(rows, source, weights)
    w13, w2 = _weight(b, (1, 2, 1), kind), _weight(b, (1, 1, 1), kind)
    yield b.grouped_gemm(x, w2, counts)
    yield b.moe_experts(x, w13, w2, ids, weights, first_expert=1)
    batch = b.plan(Batch(np.array([0, 1], np.int32), np.array([1], np.int32), np.zeros((1, 1), np.int32), 1))
    kv, keys = (_pages(b, widths, kind, 1, 1) for widths in ((1, 1), (1,)))
    yield b.kv_write(kv, batch, x, x)
    yield b.rope(b.empty((1, 1, 3), kind), batch, theta=10.0, layout="half", start=1, width=2)
    yield b.indexer_scores(heads, weights, keys, batch, scale=1.0)
    sel = b.topk(weights, batch, k=1)
    yield b.sparse_mla(heads, heads, kv, sel, batch, scale=1.0)
    yield b.argmax(x)
    yield b.sample(x, floats, floats, ints, floats)


def _weight(b: Own, shape: tuple[int, ...], kind: str) -> Weight:
    return Weight(WeightSpec("grouped_gemm", "w", shape, kind), b.empty(shape, kind))


def _pages(b: Own, widths: tuple[int, ...], kind: str, blocks: int = 2048, size: int = 64) -> Pages:
    spec = PagesSpec(tuple((f"field{i}", width) for i, width in enumerate(widths)), kind, blocks, size)
    return Pages(spec, {name: b.empty((spec.slots, width), kind) for name, width in spec.fields})


if __name__ == "__main__":
    if unknown := [chip for chip in sys.argv[1:] if chip not in CHIPS]:
        print(f"no chip is named {unknown[0]!r}: expected one of {', '.join(CHIPS)}", file=sys.stderr)
        sys.exit(2)
    for chip in sys.argv[1:] or CHIPS:
        for kernel in compiled(chip):
            print(json.dumps({**asdict(kernel), "breach": kernel.breach()}), flush=True)
