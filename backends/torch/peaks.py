"""A PyTorch device: its name, and its limits: what a large matrix product, and a large and a small copy, reach on it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from porthal.hal import Backend, Peak

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGE = 2**28  # bytes that are copied from memory
HELD = 2**25  # bytes of a cache, where the device does not say
DRIVER = Path("/proc/driver/nvidia/version")


class Measured(Backend):
    """What a PyTorch device is, and how long it takes."""

    def describe(self) -> str:
        return described(torch.device(self.device)) or super().describe()

    def timed(self, run: Callable[[], Any], clock: Callable[[], float] = perf_counter) -> float:
        device = torch.device(self.device)
        return super().timed(run, clock) if device.type == "cpu" else by_events(device, run)

    def peaks(self) -> Mapping[str, Peak]:
        return peaks(torch.device(self.device))


def described(device: torch.device) -> str:
    """A device's name and its driver; "" of a CPU, and where PyTorch has no name."""
    named = getattr(getattr(torch, device.type, None), "get_device_name", None)
    if device.type == "cpu" or named is None:
        return ""
    driver = ""
    if device.type == "cuda" and DRIVER.exists():  # of other vendors, the device's name says enough
        driver = "".join(re.findall(r"Module +(?:for \S+ +)?([\d.]+)", DRIVER.read_text(encoding="utf-8"))[:1])
    return f"{named(device)}, driver {driver}" if driver else str(named(device))


def peaks(device: torch.device) -> Mapping[str, Peak]:
    """Products of square matrices per dtype; a copy counts what it reads and what it writes."""
    side, cache = (1024, 0) if device.type == "cpu" else (8192, _cache(device))
    found = {name: Peak(_product(side, kind, device)) for name, kind in DTYPES.items()}
    large = _copy(LARGE, device)
    found |= {"dram": Peak(large), "copy": Peak(large)}
    return found | ({"l2": Peak(_copy(cache // 4, device), cache)} if cache else {})


def _cache(device: torch.device) -> int:
    properties = getattr(getattr(torch, device.type), "get_device_properties", lambda device: None)(device)
    return int(getattr(properties, "L2_cache_size", HELD))


def _product(side: int, kind: torch.dtype, device: torch.device) -> Callable[[], float]:
    held: list[torch.Tensor] = []

    def work() -> float:
        if not held:  # memory is taken by what is measured alone
            held.extend(torch.randn(side, side, device=device).to(kind) for _ in range(2))
        torch.mm(*held)
        return 2.0 * side**3

    return work


def _copy(size: int, device: torch.device) -> Callable[[], float]:
    held: list[torch.Tensor] = []

    def work() -> float:
        if not held:
            held.extend(torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
        held[0].copy_(held[1])
        return 2.0 * size

    return work


def by_events(device: torch.device, run: Callable[[], Any]) -> float:
    """Seconds between two events on the device's stream, around all that `run` gives it."""
    module = getattr(torch, device.type)
    start, end = (module.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
