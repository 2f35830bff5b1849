"""The limits of the host's processor: arithmetic from registers, memory level by level."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from porthal.backends.cpu import _native
from porthal.hal import Peak

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
USUAL = {2: 2**20, 3: 2**25}  # bytes, where the system does not say
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
WINDOW = 2**26  # bytes of memory that one measurement reads or copies
CHUNK = 2**18
PASSES = 32  # over a part of L2, so that it is read from there


def peaks(caches: Path = CACHES) -> Mapping[str, Peak]:
    """What all threads reach together. L2 is each core's own; L3 is read in a quarter, since others use it as well."""
    sizes = cache_sizes(caches)
    inner, outer = (max(CHUNK, size // CHUNK * CHUNK) for size in (sizes[2] // 2, sizes[3] // 4))
    held = max(4 * WINDOW, 4 * sizes[3] // WINDOW * WINDOW)
    cores = _native.num_threads()
    return {
        **{dtype: Peak(partial(_native.compute, dtype)) for dtype in _native.arithmetic()},
        "dram": Peak(partial(_native.read, held, WINDOW, 4 * CHUNK)),
        "l3": Peak(partial(_native.read, outer, outer, CHUNK), sizes[3]),
        "l2": Peak(partial(_native.read, cores * inner, cores * inner, inner, PASSES), cores * sizes[2]),
        "copy": Peak(partial(_native.copy, held, WINDOW, 4 * CHUNK)),
    }


def cache_sizes(caches: Path) -> dict[int, int]:
    """Bytes of L2 and L3 as the system states them."""
    found = dict(USUAL)
    for index in caches.glob("index*"):
        with suppress(OSError, ValueError, KeyError):
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            if kind == "Unified":
                found[int(level)] = int(size[:-1]) * UNITS[size[-1]] if size[-1] in UNITS else int(size)
    return found
