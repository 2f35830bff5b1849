"""How times and rates are written."""

from __future__ import annotations

SIZES = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def time_text(seconds: float) -> str:
    """0.00123 -> "1.23 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def times_text(ratio: float) -> str:
    """2.5312 -> "2.53", 4284.1 -> "4284"."""
    return f"{ratio:.3g}" if ratio < 1000 else f"{ratio:.0f}"


def rate_text(rate: float, unit: str = "") -> str:
    """1234567890 -> "1.23 GB/s"."""
    prefix, size = next(((p, s) for p, s in SIZES if rate >= s), ("", 1.0))
    return f"{rate / size:.3g} {prefix}{unit}".strip()
