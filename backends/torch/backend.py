"""Every kernel in plain PyTorch, on any device; vendors of the torch family inherit what they do not write themselves.

Arithmetic between the points at which a contract permits rounding is float32. Kernels differentiate by autograd where
the formula does. Nothing waits for the device except `to_numpy` and, in expert layers, the counts per expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from porthal.backends.torch.collectives import Collectives
from porthal.backends.torch.peaks import Measured
from porthal.backends.torch.ranking import comparable, first_highest, highest, ranked
from porthal.backends.torch.schemes import Coded, Quantising, by_expert, by_head, coded_rows, product, taken
from porthal.hal import (
    ANY_SCHEME,
    Backend,
    Batch,
    Pages,
    PagesSpec,
    Rows,
    Selection,
    SelectionSpec,
    Unavailable,
    Weight,
    dtype,
    limits,
    numpy_dtype,
)

# What a kernel over cached keys may hold at a time besides its results: gathered keys, logits, what is computed from them.
CHUNK_BYTES = 32 << 20
KEY_BLOCK = 2048  # keys that the indexer multiplies at once


class Plan(NamedTuple):
    """A batch on the device, unpacked from one transfer. `block_table` has at least one column."""

    slots: Tensor  # int64 [T], -1 is not written
    written: Tensor  # int64 [W]: the rows that are
    targets: Tensor  # int64 [W]: and their slots
    positions: Tensor  # int32 [T]
    visible: Tensor  # int32 [T]
    row_request: Tensor  # int32 [T]
    cu_q: Tensor  # int32 [R+1]
    kv_len: Tensor  # int32 [R]
    block_table: Tensor  # int32 [R, max(B, 1)]


class Torch(Collectives, Quantising, Measured):
    """A vendor's subclass overrides what its chip does differently: kernels by name; `rows` for a selection form of its
    own; `alloc_pages` for a cache layout of its own, with every field a [slots, width] view, of which nothing else is
    asked; `prepare` for packed weights."""

    def __new__(cls, device: str = "") -> Torch:
        if device == "capture" and cls is Torch:
            from porthal.backends.torch.capture import Capturing

            return Backend.__new__(Capturing)
        return super().__new__(cls, device)

    def __init__(self, device: str = "") -> None:
        super().__init__(device or "cpu")
        try:
            found = torch.empty(1, device=self.device)
            found.cpu()
            if torch.device(self.device).index not in (None, found.device.index):  # PyTorch takes cpu:7 for the CPU
                raise ValueError(f"it is {found.device} without a number")
        except Exception as error:  # of many kinds, by the name of the device
            raise Unavailable(f"torch has no device {self.device!r} here: {str(error).splitlines()[0]}") from None

    # -- arrays ------------------------------------------------------------------------------------------------------

    def from_numpy(self, x: np.ndarray[Any, Any]) -> Tensor:
        own = np.array(x, order="C")  # never an alias of the caller's memory
        if dtype(own) == "bfloat16":
            return torch.from_numpy(own.view(np.int16)).view(torch.bfloat16).to(self.device)
        return torch.from_numpy(own).to(self.device)

    def to_numpy(self, x: Tensor) -> np.ndarray[Any, Any]:
        self.host_copies += 1
        host = x.detach().to("cpu", copy=True)
        if host.dtype == torch.bfloat16:
            return host.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
        return host.numpy()

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)

    def write(self, into: Tensor, value: Tensor) -> Tensor:
        with torch.no_grad():
            return into.copy_(value)

    def expand(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return x.expand(shape)

    def refuses_array(self, x: Any) -> str | None:
        if not isinstance(x, Tensor):
            return f"{type(x).__name__}, expected a torch tensor"
        wanted = torch.device(self.device)
        there = x.device.type == wanted.type and wanted.index in (None, x.device.index)
        return None if there else f"on {x.device}, expected a tensor on {wanted}"

    # -- operands ----------------------------------------------------------------------------------------------------

    def plan(self, batch: Batch, into: Batch | None = None) -> Batch:
        table = batch.block_table if batch.block_table.shape[1] else np.full((batch.R, 1), -1, np.int32)
        written = self._written(batch)
        long = (batch.slots, written, batch.slots[written])
        short = (batch.positions, batch.visible, batch.row_request, batch.cu_q, batch.kv_len, table.reshape(-1))
        words = [np.asarray(a, np.int64).view(np.int32) for a in long] + [np.asarray(a, np.int32) for a in short]
        packed = self.from_numpy(np.concatenate(words)).split([len(w) for w in words])
        wide = [p.view(torch.int64) for p in packed[: len(long)]]
        plan = Plan(*wide, *packed[len(long) : -1], packed[-1].view(table.shape))
        return batch.with_native(plan if into is None else Plan(*map(self.write, into.native, plan)))

    def _written(self, batch: Batch) -> np.ndarray[Any, Any]:
        return np.flatnonzero(batch.slots >= 0)

    def alloc_pages(self, spec: PagesSpec) -> Pages:
        return Pages(spec, {name: self._zeros(*form) for name, form in Pages.form(spec).items()})

    def _zeros(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        if torch.device(self.device).type != "cpu":
            return self.empty(shape, dtype).zero_()
        # NumPy's zeros are the system's and take no memory before they are written; PyTorch writes its own.
        width = shape[1] * numpy_dtype(dtype).itemsize
        return torch.from_numpy(np.zeros((shape[0], width), np.uint8)).view(getattr(torch, dtype))

    def from_logical(self, spec: Any, arrays: dict[str, np.ndarray[Any, Any]], into: Any = None) -> Any:
        if isinstance(spec, PagesSpec):
            into = into or self.alloc_pages(spec)  # in the layout of a vendor's cache
        return super().from_logical(spec, arrays, into)

    # -- matrix products ---------------------------------------------------------------------------------------------

    @limits(schemes=ANY_SCHEME)
    def linear(self, x: Tensor, w: Weight, *, out: str = "x") -> Tensor:
        target = x.dtype if out == "x" else getattr(torch, out)
        if w.spec.quantised:
            return product(x, w, target, CHUNK_BYTES)
        if target == x.dtype:
            return F.linear(x, w.native)
        wide = x.float()
        rows = max(1, CHUNK_BYTES // (4 * w.native.shape[1] or 1))
        return torch.cat([F.linear(wide, part.float()).to(target) for part in w.native.split(rows)], dim=-1)

    @limits(schemes=ANY_SCHEME)
    def head_linear(self, x: Tensor, w: Weight) -> Tensor:
        if w.spec.quantised:
            return by_head(x, w)
        return torch.bmm(x.transpose(0, 1), w.native.transpose(1, 2)).transpose(0, 1)

    @limits(schemes=ANY_SCHEME)
    def grouped_gemm(self, x: Tensor, w: Weight, counts: Tensor) -> Tensor:
        if w.spec.quantised:
            return by_expert(x, w, counts.tolist())
        return _grouped(x, w.native, counts.tolist())

    grouped_gemm.capturable = False

    # -- row by row --------------------------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
        return _rms_norm(x.float(), weight, eps).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
        r = x.float() + residual.float()
        return _rms_norm(r, weight, eps).to(x.dtype), r.to(x.dtype)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
        wide = x.float()
        centred = wide - wide.mean(-1, keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True)
        return (centred / torch.sqrt(variance + eps) * weight.float() + bias.float()).to(x.dtype)

    def rope(self, x: Tensor, batch: Batch, *, theta: float, layout: str, start: int, width: int) -> Tensor:
        half = torch.arange(0, width, 2, dtype=torch.float32, device=x.device)
        angle = batch.native.positions.float()[:, None, None] * theta ** (-half / width)
        cos, sin = torch.cos(angle), torch.sin(angle)
        part = x[..., start : start + width].float()
        if layout == "interleaved":
            first, second = part[..., 0::2], part[..., 1::2]
        else:
            first, second = part.chunk(2, dim=-1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        y = torch.stack(turned, dim=-1).flatten(-2) if layout == "interleaved" else torch.cat(turned, dim=-1)
        return torch.cat([x[..., :start], y.to(x.dtype), x[..., start + width :]], dim=-1)

    def silu_mul(self, x: Tensor) -> Tensor:
        return _silu_mul(x)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def cast(self, x: Tensor, *, to: str) -> Tensor:
        return x.to(getattr(torch, to), copy=True)

    def concat(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], dim=-1)

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        return _rows_or_zero(x, rows)

    def embedding(self, ids: Tensor, table: Weight) -> Tensor:
        return F.embedding(ids, table.native)

    def log_softmax(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits.float(), dim=-1)

    def gather_logprob(self, logits: Tensor, ids: Tensor) -> Tensor:
        return torch.log_softmax(logits.float(), dim=-1).gather(1, ids[:, None].long())[:, 0]

    # -- experts -----------------------------------------------------------------------------------------------------

    def moe_route(
        self, logits: Tensor, bias: Tensor, *, k: int, scale: float, n_group: int = 1, topk_group: int = 1
    ) -> tuple[Tensor, Tensor]:
        s = torch.sigmoid(logits)
        biased = s + bias
        if n_group > 1:
            groups = comparable(biased).unflatten(1, (n_group, -1))
            best_two = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
            kept = torch.zeros_like(best_two, dtype=torch.bool).scatter_(1, ranked(best_two)[:, :topk_group], True)
            biased = torch.where(kept[..., None], groups, -torch.inf).flatten(1)
        ids = ranked(biased)[:, :k]
        chosen = s.gather(1, ids)
        return ids.to(torch.int32), scale * chosen / (chosen.sum(-1, keepdim=True) + 1e-20)

    def moe_permute(self, x: Tensor, ids: Tensor, *, E: int, first_expert: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        counts, source = _sorted_by_expert(ids, E, first_expert)
        return _rows_or_zero(x, _row_of(source, ids.shape[1])), counts, source

    def moe_unpermute(self, sorted: Tensor, source: Tensor, weights: Tensor) -> Tensor:
        return _combine(sorted, source, weights)

    def moe_experts(
        self, x: Tensor, w13: Weight, w2: Weight, ids: Tensor, weights: Tensor, *, first_expert: int = 0
    ) -> Tensor:
        per_expert, source = _sorted_by_expert(ids, w13.native.shape[0], first_expert)
        counts = per_expert.tolist()
        source = source[: sum(counts)]
        rows = x.index_select(0, _row_of(source, ids.shape[1]))
        h = _silu_mul(_grouped(rows, w13.native, counts))
        return _combine(_grouped(h, w2.native, counts), source, weights)

    moe_experts.capturable = False

    # -- paged cache -------------------------------------------------------------------------------------------------

    @limits(schemes=ANY_SCHEME)
    def kv_write(self, pages: Pages, batch: Batch, first: Tensor, second: Tensor | None = None) -> Pages:
        plan: Plan = batch.native
        for (name, _), rows in zip(pages.spec.fields, (first, second)):
            if len(plan.written) < batch.T:
                rows = rows.index_select(0, plan.written)
            rows = coded_rows(pages, name, plan.targets, rows)
            pages[name].index_copy_(0, plan.targets, rows)
        return pages

    kv_write.capturable = False

    @limits(schemes=ANY_SCHEME)
    def page_copy(self, pages: Pages, source: Tensor, target: Tensor) -> Pages:
        for name in pages.form(pages.spec):
            blocks = _blocks(pages, name)
            blocks.index_copy_(0, target.long(), blocks.index_select(0, source))
        return pages

    # -- sparse attention --------------------------------------------------------------------------------------------

    @limits(schemes=ANY_SCHEME)
    def indexer_scores(self, iq: Tensor, w: Tensor, keys: Pages, batch: Batch, *, scale: float) -> Tensor:
        parts = [iq.new_empty((0, batch.max_kv), dtype=torch.float32)]
        for request, rows, seen in _query_rows(batch, _indexer_row_bytes(iq, batch)):
            per_key = _indexer_scores(iq[rows], w[rows], keys, batch.native.block_table[request], seen, scale)
            hidden = torch.arange(seen, device=iq.device) >= batch.native.visible[rows, None]
            per_key = per_key.masked_fill(hidden, -torch.inf)
            parts.append(F.pad(per_key, (0, batch.max_kv - seen), value=-torch.inf))
        return torch.cat(parts)

    indexer_scores.capturable = False

    def topk(self, scores: Tensor, batch: Batch, *, k: int) -> Selection:
        return Selection(SelectionSpec(batch.T, k), Rows(*highest(scores, batch.native.visible, k)))

    @limits(schemes=ANY_SCHEME)
    @torch.no_grad()
    def indexer_topk(self, iq: Tensor, w: Tensor, keys: Pages, batch: Batch, *, k: int, scale: float) -> Selection:
        indices, length = [self.empty((0, k), "int32")], [self.empty((0,), "int32")]
        for request, rows, seen in _query_rows(batch, _indexer_row_bytes(iq, batch)):
            if seen > k:
                scores = _indexer_scores(iq[rows], w[rows], keys, batch.native.block_table[request], seen, scale)
            else:  # every row sees at most k: it takes all it sees
                scores = iq.new_empty((rows.stop - rows.start, seen), dtype=torch.float32)
            for parts, found in zip((indices, length), highest(scores, batch.native.visible[rows], k)):
                parts.append(found)
        return Selection(SelectionSpec(batch.T, k), Rows(torch.cat(indices), torch.cat(length)))

    indexer_topk.capturable = False

    def select_rows(self, sel: Selection, rows: Tensor) -> Selection:
        picked = Rows(*(x.index_select(0, rows) for x in self.rows(sel)))
        return Selection(SelectionSpec(len(rows), sel.spec.k), picked)

    @limits(schemes=ANY_SCHEME)
    def sparse_mla(
        self, q_latent: Tensor, q_rope: Tensor, kv: Pages, sel: Selection, batch: Batch, *, scale: float
    ) -> Tensor:
        plan: Plan = batch.native
        indices, length = self.rows(sel)
        c, kp = (kv[name] for name, _ in kv.spec.fields)
        heads, size = q_latent.shape[1], kv.spec.block_size
        k = min(sel.spec.k, batch.block_table.shape[1] * size)
        stored = c.element_size() if c.dtype != torch.float32 else 0  # gathered as stored, then widened
        c = Coded.cached(kv) if kv.spec.quantised else c
        per_row = k * ((c.shape[1] + kp.shape[1]) * (4 + stored) + heads * 3 * 4 + 3 * 8)

        def attend(rows: slice) -> Tensor:
            count = length[rows, None]
            # Behind the end of a row stands its first selected position, so that nothing else is ever read.
            at = torch.where(torch.arange(k, device=count.device) < count, indices[rows, :k], indices[rows, :1])
            at = at.clamp(min=0).long()
            pages = plan.block_table[plan.row_request[rows]].gather(1, at // size).long()
            slots = (pages * size + at % size).clamp_(min=0).flatten()
            keys, rope_keys = (x.index_select(0, slots).unflatten(0, at.shape).float() for x in (c, kp))
            logits = torch.bmm(q_rope[rows].float(), rope_keys.transpose(1, 2))
            logits = torch.baddbmm(logits, q_latent[rows].float(), keys.transpose(1, 2), beta=scale, alpha=scale)
            beyond = (torch.arange(k, device=count.device) >= count.clamp(min=1))[:, None]
            o = torch.bmm(torch.softmax(logits.masked_fill(beyond, -torch.inf), dim=-1), keys)
            return torch.where(count[..., None] > 0, o, 0.0).to(q_latent.dtype)

        if k == 0:
            return torch.zeros_like(q_latent)
        o = q_latent.new_empty(q_latent.shape)  # first: small results between large temporaries would hold the heap in pieces
        for rows in _chunks(0, batch.T, per_row):
            o[rows] = attend(rows)
        return o

    # -- next token --------------------------------------------------------------------------------------------------

    def argmax(self, logits: Tensor) -> Tensor:
        return first_highest(logits)

    def check_finite(self, logits: Tensor, ids: Tensor) -> Tensor:
        return torch.where((ids >= 0) & ~torch.isfinite(logits.amax(-1)), -2, ids)

    def sample(self, logits: Tensor, u: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
        order, _, cumulated, kept = _candidates(logits, temperature, top_k, top_p)
        target = u[:, None] * cumulated.gather(1, kept - 1)
        drawn = torch.minimum((cumulated <= target).sum(1, keepdim=True), kept - 1)
        return order.gather(1, drawn)[:, 0].to(torch.int32)

    def speculative_verify(
        self,
        logits: Tensor,
        draft: Tensor,
        u: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        draft_probs: Tensor | None = None,
    ) -> Tensor:
        n = draft.shape[1]
        per_row = (x.repeat_interleave(n + 1) for x in (temperature, top_k, top_p))
        order, shares, cumulated, count = _candidates(logits.flatten(0, 1), *per_row)
        shares = torch.where(torch.arange(shares.shape[1], device=u.device) < count, shares, 0.0)
        p = torch.empty_like(shares).scatter_(1, order, shares / cumulated.gather(1, count - 1)).view(logits.shape)
        q = None if draft_probs is None else F.pad(draft_probs, (0, 0, 0, 1))  # 0 in the row behind the last draft
        drafts = F.pad(draft.long(), (0, 1))
        at = drafts[..., None]
        passed = u * (1.0 if q is None else q.gather(2, at)[..., 0]) < p.gather(2, at)[..., 0]
        kept = passed[:, :n].long().cumprod(1).sum(1, keepdim=True)

        row = kept[..., None].expand(-1, -1, logits.shape[-1])
        here = p.gather(1, row)[:, 0]
        if q is None:
            left_out = torch.zeros_like(here).scatter_(1, drafts.gather(1, kept), (kept < n).to(here.dtype))
        else:
            left_out = q.gather(1, row)[:, 0]
        rest = (here - left_out).clamp(min=0)
        rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, here)  # p equal to q: any rejection was rounding
        cumulated = rest.cumsum(1)
        token = (cumulated <= u[:, n:] * cumulated[:, -1:]).sum(1, keepdim=True).clamp(max=rest.shape[1] - 1)
        place = torch.arange(n + 1, device=draft.device)
        return torch.where(place < kept, drafts, torch.where(place == kept, token, -1)).to(torch.int32)


# -- parts of several kernels ----------------------------------------------------------------------------------------


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight.float()


def _silu_mul(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def _rows_or_zero(x: Tensor, rows: Tensor) -> Tensor:
    if not x.shape[0]:
        return x.new_zeros((rows.shape[0], *x.shape[1:]))
    return torch.where(rows[:, None] >= 0, x.index_select(0, rows.clamp(min=0)), 0)


def _sorted_by_expert(ids: Tensor, E: int, first_expert: int) -> tuple[Tensor, Tensor]:
    """int32 counts [E] and source [T*k]: local (row, choice) pairs sorted by expert, then -1."""
    flat = ids.reshape(-1) - first_expert
    key, order = torch.sort(torch.where((flat >= 0) & (flat < E), flat, E), stable=True)
    ends = torch.searchsorted(key, torch.arange(E + 1, dtype=key.dtype, device=key.device))
    return ends.diff().to(torch.int32), torch.where(key < E, order, -1).to(torch.int32)


def _row_of(source: Tensor, k: int) -> Tensor:
    return torch.div(source, k, rounding_mode="floor")  # -1 stays -1


def _grouped(x: Tensor, w: Tensor, counts: list[int]) -> Tensor:
    """Rows by expert times w[e]; rows behind the last expert's are zero."""
    tail = x.shape[0] - sum(counts)
    parts = x.split([*counts, tail])
    products = [F.linear(rows, weight) for rows, weight in zip(parts, w.unbind()) if len(rows)]
    return torch.cat([*products, x.new_zeros((tail, w.shape[1]))])


def _combine(sorted: Tensor, source: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum over each row's choices, in their order, in float32; absent choices add nothing."""
    T, k = weights.shape
    M = source.shape[0]
    where = source.new_full((T * k + 1,), -1)
    where[torch.where(source >= 0, source, T * k).long()] = torch.arange(M, dtype=where.dtype, device=where.device)
    places = where[:-1].view(T, k)
    y = torch.zeros((T, sorted.shape[1]), dtype=torch.float32, device=sorted.device)
    for j in range(k):
        y = y + weights[:, j, None] * _rows_or_zero(sorted, places[:, j]).float()
    return y.to(sorted.dtype)


def _blocks(pages: Pages, name: str) -> Tensor:
    """A field as [n_blocks, block_size, width], a view."""
    return pages[name].view(pages.spec.n_blocks, pages.spec.block_size, -1)


def _candidates(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int64 [T, V] ids by falling logit, their probabilities and the sums of these, and int64 [T, 1] how many are kept."""
    order, place = ranked(logits), torch.arange(logits.shape[-1], device=logits.device)
    falling = comparable(logits).float().gather(1, order)
    certain = (temperature == 0)[:, None] | ~torch.isfinite(falling[:, :1])
    falling = torch.where(certain, torch.where(place > 0, -torch.inf, 0.0), falling - falling[:, :1])
    shares = torch.softmax(falling / torch.where(temperature == 0, 1.0, temperature)[:, None], dim=-1)
    cumulated = shares.cumsum(-1)
    limit = torch.where(top_k > 0, top_k, len(place)).long()[:, None]
    reached = cumulated / cumulated.gather(1, limit - 1) < top_p[:, None]
    return order, shares, cumulated, torch.minimum((reached & (place < limit)).sum(1, keepdim=True) + 1, limit)


def _chunks(start: int, stop: int, per_row: int) -> Iterator[slice]:
    """Slices of query rows that need at most CHUNK_BYTES each, or are one row."""
    step = max(1, CHUNK_BYTES // max(1, per_row))
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def _query_rows(batch: Batch, per_row: int) -> Iterator[tuple[int, slice, int]]:
    """A request, a chunk of its query rows, and how many of its keys the last of them sees."""
    for request in range(batch.R):
        for rows in _chunks(int(batch.cu_q[request]), int(batch.cu_q[request + 1]), per_row):
            yield request, rows, int(batch.visible[rows.stop - 1])


def _indexer_row_bytes(iq: Tensor, batch: Batch) -> int:
    """Products before and after the ReLU for one block of keys; scores and what ranks them for all keys."""
    return 2 * 4 * iq.shape[1] * min(KEY_BLOCK, batch.max_kv) + 40 * batch.max_kv


def _indexer_scores(iq: Tensor, w: Tensor, keys: Pages, table: Tensor, seen: int, scale: float) -> Tensor:
    """float32 [rows, seen]: the scores of one request's rows against its first `seen` keys."""
    [(name, _)] = keys.spec.fields
    blocks, size = _blocks(keys, name), keys.spec.block_size
    if keys.spec.quantised:
        iq, blocks = taken(keys.spec.quantised[1], iq), Coded.cached(keys).view(*blocks.shape[:2])
    query, weight = iq.float().flatten(0, 1), w.float()[:, None]

    def score(pages: Tensor) -> Tensor:
        key = blocks.index_select(0, pages).flatten(0, 1).float()
        products = torch.relu(query @ key.T).unflatten(0, iq.shape[:2])
        return scale * torch.bmm(weight, products)[:, 0]

    parts = [score(pages) for pages in table[: -(-seen // size)].split(max(1, KEY_BLOCK // size))]
    return torch.cat(parts, dim=1)[:, :seen]
