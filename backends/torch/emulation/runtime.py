"""`torch.npu`, `torch.musa`, `torch.mlu`: the part of the vendors' common interface that programs call, emulated.

Work has finished when its call returns, so there is one stream, events hold the host's clock and waiting does nothing.
"""

import contextlib
import os
import time
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

PLACE = "emulated device"


class Ordinals:
    """How many devices the vendor has here and which one is current."""

    def __init__(self, count: int) -> None:
        self.count, self.current = count, 0

    def index(self, device: torch.device | int | str | None = None) -> int:
        index = device if isinstance(device, int) or device is None else torch.device(device).index
        index = self.current if index is None else index
        if not 0 <= index < self.count:
            raise RuntimeError(f"device ordinal {index} does not exist: {self.count} emulated device(s).")
        return index

    def set(self, device: torch.device | int | str) -> None:
        self.current = self.index(device)

    @contextlib.contextmanager
    def use(self, device: torch.device | int | str) -> Iterator[None]:
        before = self.current
        self.set(device)
        try:
            yield
        finally:
            self.current = before


class Event:
    def __init__(self, device=None, *, enable_timing=False, blocking=False, interprocess=False) -> None:
        self._time = 0.0

    def record(self, stream=None) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return (end._time - self._time) * 1e3

    def synchronize(self) -> None: ...

    def wait(self, stream=None) -> None: ...

    def query(self) -> bool:
        return True


class Stream:
    def __init__(self, device=None, priority=0) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, stream) -> None: ...

    def wait_event(self, event) -> None: ...

    def record_event(self, event=None) -> Event:
        event = event or Event()
        event.record()
        return event

    def query(self) -> bool:
        return True


class Memory:
    """Bytes of the tensors that a device holds, and the most that it held; as much as the host has, or a part of it."""

    def __init__(self) -> None:
        self.total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.fraction = 1.0
        self.held: Counter[int] = Counter()
        self.peak: Counter[int] = Counter()

    def take(self, storage: torch.UntypedStorage, index: int) -> None:
        size = storage.nbytes()
        if self.held[index] + size > self.total * self.fraction:
            raise torch.OutOfMemoryError(
                f"out of memory: tried to allocate {size} bytes on emulated device {index}, which has "
                f"{int(self.total * self.fraction)} and holds {self.held[index]}."
            )
        self.held[index] += size
        self.peak[index] = max(self.peak[index], self.held[index])
        weakref.finalize(storage, self._give_back, index, size).atexit = False

    def _give_back(self, index: int, size: int) -> None:
        self.held[index] -= size

    def functions(self, ordinals: Ordinals) -> dict[str, Callable[..., Any]]:
        def of(counts: Counter[int]) -> Callable[..., int]:
            return lambda device=None: counts[ordinals.index(device)]

        def stats(device: Any = None) -> dict[str, int]:
            held, peak = of(self.held)(device), of(self.peak)(device)
            return {"allocated_bytes.all.current": held, "allocated_bytes.all.peak": peak,
                    "reserved_bytes.all.current": held, "reserved_bytes.all.peak": peak}

        def reset(device: Any = None) -> None:
            index = ordinals.index(device)
            self.peak[index] = self.held[index]

        def limit(fraction: float, device: Any = None) -> None:
            self.fraction = fraction

        def info(device: Any = None) -> tuple[int, int]:
            return self.total - of(self.held)(device), self.total

        held, peak = of(self.held), of(self.peak)
        return {"memory_allocated": held, "max_memory_allocated": peak, "memory_reserved": held, "max_memory_reserved": peak,
                "memory_stats": stats, "reset_peak_memory_stats": reset, "mem_get_info": info,
                "set_per_process_memory_fraction": limit}


def visible(count: int, variable: str) -> int:
    """How many of `count` devices a process sees: all, or those that the vendor's variable lists, renumbered from 0."""
    listed = os.environ.get(variable)
    if listed is None:
        return count
    ids = [x.strip() for x in listed.split(",") if x.strip()]
    wrong = [x for x in ids if not x.isdigit() or int(x) >= count or ids.count(x) > 1]
    if wrong:
        raise RuntimeError(f"{variable} is {listed!r}: expected distinct numbers from 0 to {count - 1}, separated by commas.")
    return len(ids)


def make_module(name: str, ordinals: Ordinals, memory: Memory) -> types.ModuleType:
    """The module `torch.<name>`; its memory is the host's."""
    module = types.ModuleType(f"torch.{name}", f"{PLACE}: {name}")
    random = torch.default_generator
    module.__dict__.update(
        Event=Event, Stream=Stream, device=ordinals.use, set_device=ordinals.set,
        device_count=lambda: ordinals.count, current_device=lambda: ordinals.current,
        **memory.functions(ordinals),
        is_available=lambda: ordinals.count > 0, is_initialized=lambda: True, is_bf16_supported=lambda: True,
        synchronize=lambda device=None: None, empty_cache=lambda: None,
        current_stream=lambda device=None: Stream(), default_stream=lambda device=None: Stream(),
        stream=contextlib.nullcontext,
        get_device_name=lambda device=None: f"emulated {name}",
        get_device_properties=lambda device=None: types.SimpleNamespace(name=f"emulated {name}", total_memory=memory.total),
        manual_seed=random.manual_seed, manual_seed_all=random.manual_seed,
        get_rng_state=lambda device=None: random.get_state(),
        set_rng_state=lambda state, device=None: random.set_state(state),
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16, torch.float32],
        _is_in_bad_fork=lambda: False, _lazy_init=lambda: None,
    )
    return module
