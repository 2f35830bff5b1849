"""Benchmark files as `porthal bench --json` writes them, with times drawn around a roofline."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from porthal.conformance.report.receipt import receipt, seal

LIMITS = {"fp32": 119e9, "bf16": 238e9, "int8": 470e9, "dram": 25e9, "l3": 48e9, "l2": 95e9, "copy": 10e9}
CONTEXTS = {"1k": 1024, "8k": 8192, "32k": 32768, "128k": 131072}
# Per row of the step: operations and bytes, with c the context; bytes of weights are read once per step; calls per step.
OPS = {
    "rms_norm": (lambda c: 4 * 6144, lambda c: 4 * 6144, 0, 24),
    "linear": (lambda c: 2 * 6144 * 2048, lambda c: 16384, 2 * 6144 * 2048, 40),
    "indexer_topk": (lambda c: 2 * 32 * 128 * c, lambda c: 256 * c, 0, 8),
    "sparse_mla": (lambda c: 4 * 64 * 576 * min(c, 2048), lambda c: 1152 * min(c, 2048), 0, 8),
    "moe_experts": (lambda c: 6 * 8 * 6144 * 256, lambda c: 24576, 8 * 6 * 6144 * 256, 7),
    "rope": (lambda c: 6 * 64 * 64, lambda c: 4 * 64 * 64, 0, 16),
    "silu_mul": (lambda c: 5 * 2048, lambda c: 6 * 2048, 0, 8),
    "take_rows": (lambda c: 0, lambda c: 4 * 6144, 0, 1),
    "sample": (lambda c: 5 * 154880, lambda c: 4 * 154880, 0, 1),
}


def benchmark_file(
    speed: Mapping[str, float],
    *,
    rows: tuple[int, ...] = (1, 8),
    contexts: tuple[str, ...] = tuple(CONTEXTS),
    only: tuple[str, ...] = tuple(OPS),
    noise: float = 0.03,
    spread: float = 0.01,
    seed: int = 0,
    machine: str = "AMD EPYC 9R14",
    **facts: Any,
) -> dict[str, Any]:
    """One of backends whose times are those of the roofline over `speed`; `facts` are put over those of each backend."""
    draw = random.Random(seed)
    found = []
    for group, step, n, context in _groups(rows, contexts):
        for op in only:
            operations, traffic, weights, calls = OPS[op]
            flops, size = n * operations(context), n * traffic(context) + weights
            limit, bound = max((flops / LIMITS["bf16"], "bf16"), (size / LIMITS["dram"], "dram"))
            for backend, fast in speed.items():
                time = limit / fast * draw.uniform(1 - spread, 1 + spread)
                found.append(
                    {
                        "group": group,
                        "name": f"{op}[T={n}] {backend}",
                        "fullname": f"{group}/{op}[T={n}] {backend}",
                        "params": None,
                        "param": None,
                        "stats": {"min": time * 0.98, "max": time * 1.3, "mean": time, "median": time, "rounds": 31},
                        "extra_info": {
                            "op": op,
                            "backend": backend,
                            "token": f"{op},T={n},S={context},x:bf16,0",
                            "step": step,
                            "calls": calls,
                            "dtype": "bfloat16",
                            "flops": float(flops),
                            "bytes": float(size),
                            "cache": "cold",
                            "bound": bound,
                            "limit_s": limit,
                            "share": limit / time,
                            "p10": time * 0.99,
                            "ci95": [time * (1 - spread), time * (1 + spread)],
                            "limit_noise": 0.05,
                            "noise": noise,
                            "verdict": "PASS",
                            "scaled": "16 of 256 experts" if op == "moe_experts" else "",
                            "kernel": "own",
                            "provider": "",
                        },
                    }
                )
    return sealed({
        "machine_info": {"node": "box", "machine": "x86_64", "cpu": {"brand_raw": machine, "count": 2}},
        "commit_info": {"id": "0" * 40, "dirty": False},
        "benchmarks": found,
        "datetime": "2026-11-28T01:00:00+00:00",
        "version": "5.3.1",
        "porthal": {
            "schema": 1,
            "place": "hardware",
            "command": "porthal bench --json F",
            "load": 0.1,
            "limits": {backend: dict(LIMITS) for backend in speed},
            "backends": {backend: _backend(backend) | facts for backend in speed},
            "workload": {"name": "glm5", "config": "glm-5", "scale": {"moe_experts": "16 of 256 experts"}},
            "steps": {backend: {"1": {"seconds": 0.036, "host_s": 337e-6, "calls": 35}} for backend in speed},
            "unmeasured": [],
        },
    })


def sealed(data: dict[str, Any]) -> dict[str, Any]:
    """A report of either kind with the receipt of what it says now, and the seal of its mark."""
    ours = data.get("porthal", data)
    ours["receipt"] = receipt(data)
    if isinstance(mark := ours.get("reproduced"), dict) and mark:
        mark["seal"] = seal(data, mark)
    return data


def unmeasured(data: dict[str, Any], n: int, why: str) -> dict[str, Any]:
    """Take the n-th time out of a file; what was measured there, and why it has none now."""
    entry = data["benchmarks"].pop(n)
    gone = {name: entry["extra_info"][name] for name in ("op", "token", "backend")} | {"group": entry["group"], "why": why}
    data["porthal"]["unmeasured"].append(gone)
    return gone


def _backend(name: str) -> dict[str, Any]:
    return {
        "version": "0.1",
        "digest": {"porthal": "a1b2c3"},
        "device": "AMD EPYC 9R14, AVX-512",
        "place": "hardware",
        "environment": {"porthal": "0.1", "numpy": "2.3"},
        "threads": 1,
        "clock": "thread_time",
    }


def _groups(rows: tuple[int, ...], contexts: tuple[str, ...]) -> list[tuple[str, str, int, int]]:
    plural = {n: f"{n} request{'s' * (n > 1)}" for n in rows}
    return [(f"decode, {plural[n]}, context {c}", "decode", n, CONTEXTS[c]) for n in rows for c in contexts]
