"""`torch.npu`, `torch.musa`, `torch.mlu`: the part of the vendors' common interface that programs call, emulated.

Work has finished when its call returns, so there is one stream, events hold the host's clock and waiting does nothing.
"""

import contextlib
import os
import time
import types
from collections.abc import Iterator

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


def make_module(name: str, ordinals: Ordinals) -> types.ModuleType:
    """The module `torch.<name>`; its memory is the host's."""
    module = types.ModuleType(f"torch.{name}", f"{PLACE}: {name}")
    random = torch.default_generator
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    module.__dict__.update(
        Event=Event, Stream=Stream, device=ordinals.use, set_device=ordinals.set,
        device_count=lambda: ordinals.count, current_device=lambda: ordinals.current,
        is_available=lambda: True, is_initialized=lambda: True, is_bf16_supported=lambda: True,
        synchronize=lambda device=None: None, empty_cache=lambda: None,
        current_stream=lambda device=None: Stream(), default_stream=lambda device=None: Stream(),
        stream=contextlib.nullcontext,
        get_device_name=lambda device=None: f"emulated {name}",
        get_device_properties=lambda device=None: types.SimpleNamespace(name=f"emulated {name}", total_memory=memory),
        manual_seed=random.manual_seed, manual_seed_all=random.manual_seed,
        get_rng_state=lambda device=None: random.get_state(),
        set_rng_state=lambda state, device=None: random.set_state(state),
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16, torch.float32],
        _is_in_bad_fork=lambda: False, _lazy_init=lambda: None,
    )
    return module
