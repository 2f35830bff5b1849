"""Planted where a kernel keeps something between calls, or changes what it is handed: right in a call alone.

Each is one more method of `kept.Kept`, which wraps a kernel of torch.
"""

# ruff: noqa: E501, since a kernel stands on one line where it can
# fmt: off
from __future__ import annotations

from functools import partial
from typing import Any

from porthal.conformance.selftest.planting import Defect

BEFORE = "    def _mine(self) -> dict[Any, Any]:\n"
ATTEND = "def sparse_mla(self, q_latent, q_rope, kv, sel, batch, *, scale)"
SCORE = "def indexer_scores(self, iq, w, keys, batch, *, scale)"
SELECT = "def indexer_topk(self, iq, w, keys, batch, *, k, scale)"
CODED = "@limits(schemes=ANY_SCHEME)"
LINEAR = "def linear(self, x, w, *, out='x')"
PLAIN = "        return super().linear(x, w, out=out)\n"
NORM = "def rms_norm(self, x, weight, *, eps=1e-5)"


def methods(*lines: str) -> tuple[str, str]:
    """The edit that adds methods: lines that begin with def, and those of their bodies."""
    text = "".join(f"    {line}\n" if line.startswith(("def ", "@")) else f"        {line}\n" for line in lines)
    return BEFORE, f"{text}\n{BEFORE}"


def method(kind: str, op: str, name: str, *lines: str, **facts: Any) -> Defect:
    return Defect(op, name, kind, *methods(*lines), source="kept", **facts)


weights = partial(method, "weights that change")
plans = partial(method, "plans")
operand = partial(method, "operand changed")
cache = partial(method, "pages that change")
drafts = partial(method, "drafts")
held = partial(method, "results held")
laid = partial(method, "layout")
threads = partial(method, "threads")
PACK = ("def prepare(self, spec, read, into=None):", "if spec.quantised:", "    return super().prepare(spec, read, into)", "w = super().prepare(spec, read, into and Weight(spec, into.native['w']))")
PACKED = ("def to_logical(self, operand):", "plain = isinstance(operand, Weight) and not operand.spec.quantised and isinstance(operand.native, dict)",
          "return super().to_logical(Weight(operand.spec, operand.native['w']) if plain else operand)")

DEFECTS = [
    weights("linear", "packed-by-address", f"{LINEAR}:", "return super().linear(x, Weight(w.spec, self._by_address(w.native)), out=out)"),
    weights("head_linear", "packed-by-address", "def head_linear(self, x, w):", "return super().head_linear(x, Weight(w.spec, self._by_address(w.native)))"),
    weights("grouped_gemm", "packed-by-address", "def grouped_gemm(self, x, w, counts):",
            "return super().grouped_gemm(x, Weight(w.spec, self._by_address(w.native)), counts)"),
    weights("embedding", "table-by-address", "def embedding(self, ids, table):", "return super().embedding(ids, Weight(table.spec, self._by_address(table.native)))"),
    weights("moe_experts", "second-matrix-by-address", "def moe_experts(self, x, w13, w2, ids, weights, *, first_expert=0):",
            "return super().moe_experts(x, w13, Weight(w2.spec, self._by_address(w2.native)), ids, weights, first_expert=first_expert)"),
    weights("linear", "scales-by-address", CODED, f"{LINEAR}:", "scale = {n: self._by_address(v) for n, v in w.native.items() if n != 'codes'} if w.spec.quantised else {}",
            "return super().linear(x, Weight(w.spec, {**w.native, **scale}) if scale else w, out=out)"),
    weights("grouped_gemm", "codes-by-address", CODED, "def grouped_gemm(self, x, w, counts):", "codes = {'codes': self._by_address(w.native['codes'])} if w.spec.quantised else {}",
            "return super().grouped_gemm(x, Weight(w.spec, {**w.native, **codes}) if codes else w, counts)"),
    weights("linear", "prepare-into-ignored", "def prepare(self, spec, read, into=None):", "return into or super().prepare(spec, read)", f"{LINEAR}:", PLAIN.strip()),
    weights("grouped_gemm", "prepare-into-of-the-first-expert", "def prepare(self, spec, read, into=None):", "if into is None:", "    return super().prepare(spec, read)",
            "into.native[:1] = self.from_numpy(np.ascontiguousarray(read(slice(0, 1))))", "return into",
            "def grouped_gemm(self, x, w, counts):", "return super().grouped_gemm(x, w, counts)"),
    weights("head_linear", "turned-once", *PACK,
            "return Weight(spec, {'w': w.native, 'turned': into.native['turned'] if into else w.native.transpose(1, 2).contiguous()})",
            *PACKED, "def head_linear(self, x, w):", "return super().head_linear(x, Weight(w.spec, w.native['turned'].transpose(1, 2)))"),
    weights("linear", "of-another-model", f"{LINEAR}:", "mine = self._mine().setdefault(w.spec, [])", "if w.native.numel() > 2**16:", "    return super().linear(x, w, out=out)",
            "number = next((n for n, seen in enumerate(mine) if seen is w), None)", "if number is None:", "    number = len(mine)", "    mine.append(w)",
            "return super().linear(x, self.known.setdefault((number, w.spec), w), out=out)"),
    weights("rms_norm", "weight-widened-once", f"{NORM}:", "return super().rms_norm(x, self._by_address(weight), eps=eps)"),
    weights("layer_norm", "bias-widened-once", "def layer_norm(self, x, weight, bias, *, eps=1e-6):", "return super().layer_norm(x, weight, self._by_address(bias), eps=eps)"),
    weights("moe_route", "bias-by-address", "def moe_route(self, logits, bias, **attrs):", "return super().moe_route(logits, self._by_address(bias), **attrs)"),
    plans("rope", "angles-for-every-theta", "def rope(self, x, batch, *, theta, **attrs):", "return super().rope(x, batch, theta=vars(batch).setdefault('_theta', theta), **attrs)"),
    plans("rope", "table-of-the-first-layout", "def rope(self, x, batch, *, layout, **attrs):", "return super().rope(x, batch, layout=vars(batch).setdefault('_layout', layout), **attrs)"),
    plans("sparse_mla", "scale-kept-in-the-plan", f"{ATTEND}:", "return super().sparse_mla(q_latent, q_rope, kv, sel, batch, scale=vars(batch).setdefault('_scale', scale))"),
    plans("topk", "lengths-by-shape", "def topk(self, scores, batch, *, k):", "return super().topk(scores, self._mine().setdefault((batch.T, batch.R, batch.max_kv, batch.block_size), batch), k=k)"),
    plans("indexer_scores", "plan-by-rows-and-longest", f"{SCORE}:", "plan = self._mine().setdefault((batch.T, batch.R, batch.max_kv, keys.spec), batch)",
          "return super().indexer_scores(iq, w, keys, plan, scale=scale)"),
    operand("sparse_mla", "table-clamped-in-place", f"{ATTEND}:", "batch.native.block_table.clamp_(min=0)", "return super().sparse_mla(q_latent, q_rope, kv, sel, batch, scale=scale)"),
    operand("kv_write", "padded-slots-moved-in-the-plan", "def kv_write(self, pages, batch, first, second=None):", "batch.native.slots.clamp_(min=0)", "return super().kv_write(pages, batch, first, second)"),
    operand("indexer_topk", "visible-cut-in-place", f"{SELECT}:", "sel = super().indexer_topk(iq, w, keys, batch, k=k, scale=scale)", "batch.native.visible.clamp_(max=k)", "return sel"),
    operand("topk", "lengths-cut-on-the-host", "def topk(self, scores, batch, *, k):", "sel = super().topk(scores, batch, k=k)", "np.minimum(batch.visible, k, out=batch.visible)", "return sel"),
    operand("rope", "positions-counted-on", "def rope(self, x, batch, **attrs):", "y = super().rope(x, batch, **attrs)", "batch.native.positions.add_(1)", "return y"),
    operand("select_rows", "tail-cleared-in-place", "def select_rows(self, sel, rows):", "out = super().select_rows(sel, rows)", "self.rows(sel).indices.clamp_(min=0)", "return out"),
    cache("sparse_mla", "pages-by-address", f"{ATTEND}:", "native = {name: self._by_address(kv[name]) for name, _ in kv.spec.fields}",
          "return super().sparse_mla(q_latent, q_rope, Pages(kv.spec, native), sel, batch, scale=scale)"),
    cache("indexer_scores", "keys-by-address", f"{SCORE}:", "native = {name: self._by_address(keys[name]) for name, _ in keys.spec.fields}",
          "return super().indexer_scores(iq, w, Pages(keys.spec, native), batch, scale=scale)"),
    cache("indexer_topk", "keys-by-address", f"{SELECT}:", "native = {name: self._by_address(keys[name]) for name, _ in keys.spec.fields}",
          "return super().indexer_topk(iq, w, Pages(keys.spec, native), batch, k=k, scale=scale)"),
    cache("sparse_mla", "scales-by-address", CODED, f"{ATTEND}:", "said = {n: self._by_address(v) for n, v in kv.native.items() if n.endswith('_scale')}",
          "return super().sparse_mla(q_latent, q_rope, Pages(kv.spec, {**kv.native, **said}), sel, batch, scale=scale)"),
    cache("kv_write", "from-logical-into-ignored", "def from_logical(self, spec, arrays, into=None):", "return into if isinstance(spec, PagesSpec) and into is not None else super().from_logical(spec, arrays, into)",
          "def kv_write(self, pages, batch, first, second=None):", "return super().kv_write(pages, batch, first, second)"),
    drafts("indexer_scores", "whole-table-read", f"{SCORE}:", "first = keys[keys.spec.fields[0][0]][(batch.native.block_table[batch.native.block_table >= 0].long()) * keys.spec.block_size]",
           "y = super().indexer_scores(iq, w, keys, batch, scale=scale)", "return y + 0 * first.float().sum()"),
    drafts("sparse_mla", "whole-table-read", f"{ATTEND}:", "first = kv[kv.spec.fields[0][0]][(batch.native.block_table[batch.native.block_table >= 0].long()) * kv.spec.block_size]",
           "return super().sparse_mla(q_latent, q_rope, kv, sel, batch, scale=scale) + 0 * first.sum()"),
    drafts("kv_write", "written-behind-the-last-page", "def kv_write(self, pages, batch, first, second=None):", "held = (batch.block_table >= 0).sum(1) - -(-batch.kv_len // batch.block_size)",
           "table = np.stack([np.roll(row, -int(n)) if n > 0 else row for row, n in zip(batch.block_table, held)]) if batch.R else batch.block_table",
           "return super().kv_write(pages, self.plan(Batch(batch.cu_q, batch.kv_len, table.astype(np.int32), batch.block_size)), first, second)"),
    drafts("indexer_topk", "longest-by-the-width-of-the-table", f"{SELECT}:", "kept = self._mine().setdefault((batch.T, batch.R, batch.block_table.tobytes(), batch.cu_q.tobytes()), batch)",
           "return super().indexer_topk(iq, w, keys, kept, k=k, scale=scale)"),
    held("add", "one-buffer-above-64-KiB", "def add(self, a, b):", "return self._in_one_buffer(super().add(a, b), 2**16)"),
    held("sparse_mla", "one-buffer-above-64-KiB", f"{ATTEND}:", "return self._in_one_buffer(super().sparse_mla(q_latent, q_rope, kv, sel, batch, scale=scale), 2**16)"),
    held("rms_norm", "one-buffer-above-1-MiB", f"{NORM}:", "return self._in_one_buffer(super().rms_norm(x, weight, eps=eps), 2**20)"),
    held("silu_mul", "one-buffer-above-16-MiB", "def silu_mul(self, x):", "y = super().silu_mul(x)",
         "return self._in_one_buffer(y, 2**24) if y.dtype == torch.bfloat16 else y", dtypes=("bfloat16",), why="the buffer is for the dtype that is served"),
    held("linear", "two-buffers-in-turn", f"{LINEAR}:", "return self._in_one_buffer(super().linear(x, w, out=out), 2**16, 2)"),
    held("topk", "selection-in-one-buffer", "def topk(self, scores, batch, *, k):", "sel = super().topk(scores, batch, k=k)", "return Selection(sel.spec, Rows(self._in_one_buffer(sel.native.indices, 2**16), sel.native.length))"),
    held("log_softmax", "one-workspace-for-all-shapes", "def log_softmax(self, logits):", "y = super().log_softmax(logits)", "if y.numel() < 2**14:", "    return y",
         "space = self._mine().setdefault(0, torch.empty(2**25))", "place = (1 - self._mine().get('turn', 0)) * y.numel()", "self._mine()['turn'] = 1 - self._mine().get('turn', 0)",
         "return space[place : place + y.numel()].view(y.shape).copy_(y) if place + y.numel() <= 2**25 else y"),
    threads("layer_norm", "workspace-of-all-threads-from-64-rows", "def layer_norm(self, x, weight, bias, *, eps=1e-6):", "if len(x) < 64:", "    return super().layer_norm(x, weight, bias, eps=eps)",
            "space = self._mine().setdefault((x.shape, x.dtype), torch.empty_like(x))", "space.copy_(x)", "return super().layer_norm(space, weight, bias, eps=eps)"),
    laid("rope", "heads-after-one-another", "def rope(self, x, batch, **attrs):", "return super().rope(x if x.stride(0) >= x.stride(1) else x.as_strided(x.shape, (x.stride(1) // x.shape[0] * x.shape[1], x.shape[2], 1)), batch, **attrs)"),
    laid("sparse_mla", "joint-rows-by-the-latents-width", f"{ATTEND}:", "joint = q_rope.data_ptr() == q_latent.data_ptr() + q_latent.shape[2] * q_latent.element_size() and q_latent.shape[1] > 1",
         "q_rope = q_rope.roll(1, 1) if joint else q_rope", "return super().sparse_mla(q_latent, q_rope, kv, sel, batch, scale=scale)",
         dtypes=("float32",), why="joint rows of several heads are planned in float32: dtypes take turns"),
    laid("kv_write", "joint-rows-in-the-wrong-order", "def kv_write(self, pages, batch, first, second=None):", "if second is not None and second.data_ptr() == first.data_ptr() + first.shape[1] * first.element_size():",
         "    second = second.roll(1, 1)", "return super().kv_write(pages, batch, first, second)",
         dtypes=("float32",), why="joint rows are planned in float32: dtypes take turns"),
]
