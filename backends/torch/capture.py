"""PyTorch on the CPU with an emulated graph capture, `torch:capture`: for captured calls where there is no chip.

What a capture freezes on a chip is frozen here: the ATen operations that kernels issue, with their memory, their shapes and
all Python numbers among them. A replay issues exactly these again. As on a chip, nothing in them may wait for a value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from porthal.backends.torch.backend import Plan, Torch, _blocks, _chunks, _silu_mul
from porthal.backends.torch.ranking import highest
from porthal.backends.torch.schemes import stored
from porthal.hal import ANY_SCHEME, Batch, Pages, Rows, Selection, SelectionSpec, UsageError, Weight, limits

# What copies between host and device. On the CPU some of it is no operation of ATen, and is seen only above that.
COPIES = {"__array__", "__bool__", "__float__", "__index__", "__int__", "as_tensor", "cpu", "item", "numpy", "tensor", "tolist"}
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}  # memory stays as it was
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Capturing(Torch):
    """Its own kernels are those that the base computes with numbers of the host: lengths, and how many rows are written.

    What a captured call may vary in are values, so these compute as much as the planned batch has room for."""

    name = "torch:capture"

    def __init__(self, device: str = "") -> None:
        super().__init__("cpu")

    def __str__(self) -> str:
        return self.name

    def describe(self) -> str:
        return f"graph capture emulated on {super().describe()}"

    @torch.no_grad()
    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        recorder = _Recorder()
        with _NoCopies(), recorder:
            results = run()

        @torch.no_grad()
        def replay() -> Any:
            for function, args, kwargs, held in recorder.calls:
                for old, new in zip(held, tree_leaves(function(*args, **kwargs))):
                    old.copy_(new)
            return results

        return replay

    def _written(self, batch: Batch) -> np.ndarray[Any, Any]:
        """As many rows as the batch has: for one that is not written, the first that is, twice."""
        written = batch.slots >= 0
        return np.where(written, np.arange(batch.T), np.argmax(written) if batch.T else 0)

    @limits(schemes=ANY_SCHEME)
    def kv_write(self, pages: Pages, batch: Batch, first: Tensor, second: Tensor | None = None) -> Pages:
        """Where no row is written at all, slot 0 keeps what it has."""
        plan: Plan = batch.native
        targets = plan.targets.clamp(min=0)
        kept = plan.targets[:, None] >= 0
        for (name, _), rows in zip(pages.spec.fields, (first, second)):
            for field, value in stored(pages, name, rows.index_select(0, plan.written)).items():
                held = pages[field].index_select(0, targets)
                pages[field].index_copy_(0, targets, torch.where(kept, value, held))
        return pages

    def indexer_scores(self, iq: Tensor, w: Tensor, keys: Pages, batch: Batch, *, scale: float) -> Tensor:
        return self._scores(iq, w, keys, batch, scale)[:, : batch.max_kv]

    @torch.no_grad()
    def indexer_topk(self, iq: Tensor, w: Tensor, keys: Pages, batch: Batch, *, k: int, scale: float) -> Selection:
        scores = self._scores(iq, w, keys, batch, scale)
        return Selection(SelectionSpec(batch.T, k), Rows(*highest(scores, batch.native.visible, k)))

    def _scores(self, iq: Tensor, w: Tensor, keys: Pages, batch: Batch, scale: float) -> Tensor:
        """float32 [T, S], where S is the slots of the planned table."""
        plan: Plan = batch.native
        [(name, width)] = keys.spec.fields
        size = plan.block_table.shape[1] * keys.spec.block_size
        position = torch.arange(size, device=iq.device)
        parts = [iq.new_empty((0, size), dtype=torch.float32)]
        for rows in _chunks(0, batch.T, 4 * size * (2 * width + 2 * iq.shape[1])):
            table = plan.block_table.index_select(0, plan.row_request[rows]).clamp(min=0)
            key = _blocks(keys, name).index_select(0, table.flatten()).reshape(len(table), size, width).float()
            products = torch.relu(torch.bmm(iq[rows].float(), key.transpose(1, 2)))
            scores = scale * torch.bmm(w[rows].float()[:, None], products)[:, 0]
            parts.append(scores.masked_fill(position >= plan.visible[rows, None], -torch.inf))
        return torch.cat(parts)

    def moe_experts(
        self, x: Tensor, w13: Weight, w2: Weight, ids: Tensor, weights: Tensor, *, first_expert: int = 0
    ) -> Tensor:
        """Every expert for every row, since only the device knows which of them count."""
        parts = x.new_zeros((*ids.shape, x.shape[1]))
        for e, (up, down) in enumerate(zip(w13.native.unbind(), w2.native.unbind())):
            made = F.linear(_silu_mul(F.linear(x, up)), down)
            parts = torch.where((ids == e + first_expert)[..., None], made[:, None], parts)
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for j in range(ids.shape[1]):
            y = y + weights[:, j, None] * parts[:, j].float()
        return y.to(x.dtype)


class _NoCopies(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = getattr(func, "__name__", ""), (*args[1:], *(kwargs or {}).values())
        if name in COPIES or (name == "to" and any(str(x) == "cpu" for x in given if isinstance(x, (str, torch.device)))):
            raise _refusal(name)
        return func(*args, **kwargs or {})


class _Recorder(TorchDispatchMode):
    """The operations that change memory, each with what it returns in new memory: there a replay leaves its results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, schema = func.overloadpacket.__name__, func._schema
        if (WAITS & set(func.tags) and name != "index") or _masked(schema, args):
            raise _refusal(f"aten.{name}")
        out = func(*args, **kwargs or {})
        aliases = [r.alias_info for r in schema.returns if r.alias_info]
        if name not in EMPTY and all(alias.is_write for alias in aliases):  # views stay what they are
            self.calls.append((func, args, kwargs or {}, [] if aliases else tree_leaves(out)))
        return out


def _masked(schema: Any, args: Any) -> bool:
    """Whether an operation takes a mask for an index: how many elements that chooses is read on the host."""
    given = [x for a, x in zip(schema.arguments, args) if a.name == "indices"]
    return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(given))


def _refusal(what: str) -> UsageError:
    return UsageError(
        f"{what} copies between host and device, or waits for a value there, which a captured graph cannot repeat: keep it on "
        "the device, or declare the kernel's capturable = False"
    )
