"""Cache rows as vendors pack them: the parts of a logical form in one array of bytes, taken apart and put together bit for bit.

A backend allocates `packed` as its native, and translates in `to_logical` and `from_logical`:

    return FLASHMLA.apart(pages.spec, self.to_numpy(pages["packed"]))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from porthal.hal.dtypes import numpy_dtype
from porthal.hal.errors import UsageError
from porthal.hal.operands.operand import Array, Parts
from porthal.hal.operands.pages import Pages

if TYPE_CHECKING:
    from porthal.hal.operands.pages import PagesSpec


@dataclass(frozen=True)
class Layout:
    """Parts in the order in which they lie: of each slot, or of each page all slots' first parts before their second."""

    order: tuple[str, ...]
    by_page: bool = False

    def width(self, spec: PagesSpec) -> int:
        """Bytes of a slot."""
        return sum(_bytes(shape[1], kind) for shape, kind in self._form(spec).values())

    def apart(self, spec: PagesSpec, packed: Array) -> Parts:
        """The logical form of bytes [slots, width], or of what has as many."""
        found, at = {}, 0
        units = self._units(spec, packed)
        for name, (shape, kind) in self._form(spec).items():
            size = _bytes(shape[1], kind) * (spec.block_size if self.by_page else 1)
            part = np.ascontiguousarray(units[:, at : at + size])
            found[name] = part.reshape(-1).view(numpy_dtype(kind)).reshape(shape)
            at += size
        return found

    def together(self, spec: PagesSpec, parts: Mapping[str, Array]) -> Array:
        """uint8 [slots, width]."""
        units = spec.n_blocks if self.by_page else spec.slots
        packed = [np.ascontiguousarray(parts[name]).reshape(-1).view(np.uint8).reshape(units, -1) for name in self._form(spec)]
        return np.concatenate(packed, axis=1).reshape(spec.slots, self.width(spec))

    def _form(self, spec: PagesSpec) -> dict[str, tuple[tuple[int, ...], str]]:
        form = Pages.form(spec)
        if sorted(form) != sorted(self.order):
            raise UsageError(f"a cache of {', '.join(form)} cannot be packed as {', '.join(self.order)}: use another layout")
        return {name: form[name] for name in self.order}

    def _units(self, spec: PagesSpec, packed: Array) -> Array:
        if packed.dtype.itemsize != 1 or packed.size != spec.slots * self.width(spec):
            expected = f"{spec.slots} x {self.width(spec)} bytes"
            raise UsageError(f"a packed cache is {packed.dtype} {list(packed.shape)}, expected {expected}")
        return packed.view(np.uint8).reshape(spec.n_blocks if self.by_page else spec.slots, -1)


def _bytes(count: int, kind: str) -> int:
    return count * numpy_dtype(kind).itemsize


FLASHMLA = Layout(("c", "c_scale", "kp"))  # 512 codes, 4 float32, 64 bfloat16: 656 bytes under fp8_latents
ASCEND = Layout(("c", "kp", "c_scale"))  # the same, scales last; also under int8_tile_latents
DEEPGEMM = Layout(("k", "k_scale"), by_page=True)  # a page's keys, then its scales: 132 bytes a slot under fp8_keys
