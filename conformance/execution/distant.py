"""A call whose cache or experts end behind 2^31 elements: what is in use lies at the far end, all before it is 0.

Pages and experts are numbered from there, so the results are those of the near call, which the reference computes and
the judge sees. Memory that is allocated and not written costs nothing; the reference would copy it, so it is left out.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from porthal.conformance.cases.domain import per_expert
from porthal.conformance.cases.inputs import Inputs
from porthal.hal import Batch, Binding, NotClaimed, Pages, Weight
from porthal.hal.contract import Contract

ELEMENTS = 2**31  # before what is in use


class Distant:
    def __init__(self, binding: Binding, inputs: Inputs) -> None:
        op = inputs.contract.name
        if binding.choices[op].owner == "reference":
            raise NotClaimed(f"{op} behind 2^31 elements does not run on the reference, which would copy them")
        if binding.backend.place != "hardware":
            raise NotClaimed(f"2^31 elements are for hardware: the place of {binding.backend} is {binding.backend.place}")
        self.binding, self.contract = binding, inputs.contract
        self.counts = per_expert(inputs.contract)
        self.counted = self._counted(inputs.contract)
        self.pages = self.experts = 0
        for name, value in inputs.operands.items():
            if isinstance(value, Pages):
                self.pages = -(-ELEMENTS // (value.spec.block_size * max(width for _, width in value.spec.fields)))
                self.near_spec = value.spec
            elif name in self.counted:
                self.experts = max(self.experts, -(-ELEMENTS // prod(value.spec.shape[1:])))

    def _counted(self, contract: Contract) -> set[str]:
        """The weights that hold experts: those whose rows are counted."""
        signature = contract.signature
        return {o.name for o in signature.of_kind("Weight") if self.counts and o.dims[:1] == signature[self.counts].dims}

    def moved(self, name: str, value: Any) -> Any:
        """An operand that counts pages or experts, counting from the far end."""
        if isinstance(value, Batch):
            table = np.where(value.block_table < 0, -1, value.block_table + self.pages)
            return replace(value, block_table=table.astype(np.int32))
        if self.contract.ranges.get(name, ("", ""))[1] == "P":
            return value + self.pages
        if name == self.counts:
            return np.concatenate([np.zeros(self.experts, value.dtype), value])
        return value

    def placed(self, value: Pages | Weight) -> Pages | Weight:
        """A cache or experts' weights with what is in use at the far end; any other weight as it is."""
        if isinstance(value, Weight) and value.spec.operand not in self.counted:
            placed: Weight = value.place(self.binding)
            return placed
        try:
            if isinstance(value, Weight):
                shape = value.spec.shape
                far = np.zeros((self.experts + shape[0], *shape[1:]), value.native.dtype)
                far[self.experts :] = value.native
                return self.binding.prepare(replace(value.spec, shape=far.shape), lambda index: far[index])
            spec = value.spec
            whole = self.binding.alloc_pages(replace(spec, n_blocks=self.pages + spec.n_blocks))
        except (MemoryError, RuntimeError) as error:
            raise NotClaimed(f"2^31 elements do not fit on {self.binding.backend}: {error}") from None
        self.binding.from_logical(spec, {n: a.copy() for n, a in value.native.items()}, self.near(whole))
        return whole

    def near(self, value: Any) -> Any:
        """What is in use of a cache; anything else as it is."""
        if not isinstance(value, Pages):
            return value
        first = value.spec.slots - self.near_spec.slots
        return Pages(self.near_spec, {n: value[n][first:] for n, _ in self.near_spec.fields})
