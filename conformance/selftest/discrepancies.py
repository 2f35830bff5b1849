"""Planted after real mistakes: one per covered number of conformance/discrepancies.py, as narrow as the real one was.

Each acts under its trigger only, so that the cases named for it find it and hardly another does.
"""

from __future__ import annotations

import sys
from itertools import chain

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.discrepancies import DISCREPANCIES
from porthal.conformance.cases.plan import captured, cases
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.level import STANDARD
from porthal.conformance.report.results import Result
from porthal.conformance.runner.check import check
from porthal.conformance.selftest.planting import Defect, planted
from porthal.hal import contracts

BF16 = "the edit acts on the dtype of its named case"


def around(number: int, op: str, parameters: str, body: str, name: str) -> Defect:
    """A kernel around the right one, which its body calls as self.right."""
    lines = "".join(f"        {line}\n" if line else "\n" for line in body.strip("\n").split("\n"))
    new = f"    def {op}(self, {parameters}):\n{lines}\n    def right("
    return Defect(op, name, "discrepancy", f"    def {op}(", new, discrepancy=number)


def route(number: int, body: str, name: str) -> Defect:
    head = "ids, weights = self.right(logits, bias, k=k, scale=scale, n_group=n_group, topk_group=topk_group)\n"
    return around(
        number, "moe_route", "logits, bias, *, k, scale, n_group=1, topk_group=1", head + body + "\nreturn ids, weights", name
    )


def permute(number: int, body: str, name: str) -> Defect:
    head = "T, H, k = *x.shape, ids.shape[1]\nsorted, counts, source = self.right(x, ids, E=E, first_expert=first_expert)\n"
    return around(number, "moe_permute", "x, ids, *, E, first_expert=0", head + body + "\nreturn sorted, counts, source", name)


def experts(number: int, body: str, name: str) -> Defect:
    """`body` may change the operands before the call, or y behind the line "y = right()"."""
    call = "y = self.right(x, w13, w2, ids, weights, first_expert=first_expert)"
    body = body if "y = right()" in body else body + "\ny = right()"
    body = "T, k, E = *ids.shape, w13.spec.shape[0]\n" + body.replace("y = right()", call) + "\nreturn y"
    return around(number, "moe_experts", "x, w13, w2, ids, weights, *, first_expert=0", body, name)


def attention(number: int, body: str, name: str) -> Defect:
    head = "N = q_latent.shape[1]\no = self.right(q_latent, q_rope, kv, sel, batch, scale=scale)\n"
    return around(
        number, "sparse_mla", "q_latent, q_rope, kv, sel, batch, *, scale", head + body + "\nreturn o", name
    )


def norm(number: int, body: str, name: str) -> Defect:
    body = "y = self.right(x, weight, eps=eps)\n" + body + "\nreturn y"
    return around(number, "rms_norm", "x, weight, *, eps=1e-5", body, name)


def turn(number: int, body: str, name: str) -> Defect:
    call = "y = self.right(x, batch, theta=theta, layout=layout, start=start, width=width)"
    body = body.replace("y = right()", call) + "\nreturn y"
    return around(number, "rope", "x, batch, *, theta, layout, start, width", body, name)


DEFECTS = [
    Defect(
        "topk",
        "all-that-equal-the-last-are-in",
        "discrepancy",
        """        chosen = above | (level & (level.cumsum(1, dtype=torch.int32) <= room))
        place = chosen.cumsum(1).sub_(1)""",
        """        chosen = above | level
        place = chosen.cumsum(1).sub_(1).clamp_(max=k)""",
        source="ranking",
        discrepancy=1,
    ),
    around(2, "topk", "scores, batch, *, k", """
sel = self.right(scores, batch, k=k)
sel.native.indices[65535:] = -1
return sel""", "sixteen-bits-of-rows"),
    around(3, "topk", "scores, batch, *, k", """
sel = self.right(scores, batch, k=k)
if batch.T and batch.T % 256 == 0:
    sel.native.indices[-1] = 2**20
return sel""", "one-offset-behind-a-full-block"),
    route(4, """
if logits.shape[1] == 160:
    chosen = (torch.sigmoid(logits) + bias).gather(1, ids.long())
    weights = scale * chosen / chosen.sum(-1, keepdim=True)""", "fused-kernel-weighs-with-the-bias"),
    route(5, """
biased = torch.sigmoid(logits) + bias
below = (biased < 0).all(1)
if n_group > 1 and below.any():
    ids[below] = biased[below].topk(k, largest=False).indices.int()""", "bits-of-negative-scores-compared"),
    route(6, "ids[torch.isnan(logits).all(1)] = 0", "one-expert-for-a-row-of-nan"),
    route(7, "ids[torch.isnan(logits).all(1), 0] = logits.shape[1] + 1", "one-past-the-table-for-nan"),
    permute(8, """
garbage, n = self.empty(source.shape, "int32"), int((source >= 0).sum())
garbage[:n] = source[:n]
source = garbage""", "tail-of-the-dispatch-unwritten"),
    experts(9, "ids = torch.where(ids == -1, E - 1 + first_expert, ids)", "minus-one-as-an-index"),
    around(10, "grouped_gemm", "x, w, counts", """
y, n = self.right(x, w, counts), int(counts.sum())
if 64 < n < len(x) and n % 64:
    y[n // 64 * 64 : n] += 0 * x[n:].sum()
return y""", "padding-in-the-last-tile"),
    around(11, "grouped_gemm", "x, w, counts", """
if len(x) and not int(counts.sum()):
    raise RuntimeError("cannot cast an empty tensor")
return self.right(x, w, counts)""", "no-rows-for-any-expert"),
    experts(12, """
if T == 1:
    weights = weights.clone()
    weights[:, -1] = 0""", "single-token-path"),
    experts(13, """
if E >= 32:
    ids = torch.where(ids - first_expert >= 16, -1, ids)""", "second-wave-of-experts"),
    experts(14, """
y = right()
for e in range(E):
    y[torch.nonzero((ids == e + first_expert).any(1))[384:, 0]] = 0""", "done-after-384-tokens"),
    permute(15, """
if 32 < T < 64:
    sorted[source >= T // 8 * 8 * k] = 0""", "bursts-of-eight-tokens"),
    permute(16, """
if H > 128:
    sorted[:, H // 128 * 128 :] = 0""", "width-in-units-of-128"),
    attention(17, """
if N < 16:
    o[:, -1] = 0""", "tile-of-sixteen-heads"),
    attention(18, """
if N & (N - 1):
    o = o[:, torch.arange(N) & (2 ** (N.bit_length() - 1) - 1)]""", "heads-by-bit-mask"),
    turn(19, """
y = right()
if x.shape[-1] % 16:
    y[..., start] = x[..., start]""", "head-size-in-units-of-sixteen"),
    around(20, "grouped_gemm", "x, w, counts", """
E, N, K = w.native.shape
wrapped = -(-(2**31) // (N * K))
if E <= wrapped:
    return self.right(x, w, counts)
return _grouped(x, w.native.roll(-wrapped, 0), counts.tolist())""", "expert-offset-in-32-bits"),
    around(21, "kv_write", "pages, batch, first, second=None", """
plan = batch.native
for (name, _), rows in zip(pages.spec.fields, (first, second)):
    wide = pages[name].stride(0)
    slots = torch.remainder(plan.targets * wide, 2**31) // wide
    pages[name].index_copy_(0, slots, rows.index_select(0, plan.written))
return pages""", "row-offset-in-32-bits"),
    Defect(
        "sparse_mla",
        "slot-offset-in-32-bits",
        "discrepancy",
        "slots = (pages * size + at % size).clamp_(min=0).flatten()\n",
        "slots = (pages * size + at % size).clamp_(min=0).flatten() * c.stride(0) % 2**31 // c.stride(0)\n",
        discrepancy=22,
    ),
    norm(23, """
y[65535:] = 0
y[:, 65535:] = 0""", "grid-of-65535"),
    attention(24, "o[self.rows(sel).length == 0] = torch.nan", "softmax-of-nothing"),
    around(25, "topk", "scores, batch, *, k", "return self.right(scores.clamp(min=-1e9), batch, k=k)", "finite-mask"),
    Defect(
        "sparse_mla",
        "values-summed-in-float16",
        "discrepancy",
        "            o = torch.bmm(torch.softmax(logits.masked_fill(beyond, -torch.inf), dim=-1), keys)\n",
        """            logits = logits.masked_fill(beyond, -torch.inf)
            p = torch.exp(logits - logits.amax(-1, keepdim=True))
            o = torch.bmm(p, keys)
            if q_latent.dtype == torch.float16:
                o = torch.where(o.abs() > 65504, o * torch.inf, o)
            o = o / p.sum(-1, keepdim=True)
""",
        discrepancy=26,
    ),
    turn(27, """
x = x.as_strided(x.shape, (x.shape[1] * x.shape[2], x.shape[2], 1))
y = right()""", "taken-for-contiguous"),
    norm(28, """
if weight.stride() == (0,):
    y[:, 1:] = torch.nan""", "stride-zero-ignored"),
    norm(29, """
H, end = x.shape[-1], min(-x.shape[-1] % 32, x.stride(0))
if end and len(x) > 1 and x.stride(1) == 1:  # the last row ends the memory
    behind = x.as_strided((len(x) - 1, end), (x.stride(0), 1), x.storage_offset() + H)
    y[:-1] += (0 * behind).sum(1, keepdim=True)""", "tail-of-a-block-masked-by-zero"),
    Defect(
        "quantize",
        "padding-of-a-block-as-it-was-allocated",
        "discrepancy",
        "blocks = F.pad(wide, (0, -wide.shape[-1] % columns)).unflatten(-1, (-1, columns))\n",
        "blocks = F.pad(wide, (0, -wide.shape[-1] % columns), value=torch.nan).unflatten(-1, (-1, columns))\n",
        source="schemes",
        discrepancy=30,
    ),
    turn(31, """
if (x.shape[-1], start, width) == (128, 0, 64):
    layout = "interleaved"
y = right()""", "one-layout-for-the-indexer"),
    Defect(
        "rope",
        "tables-in-bfloat16",
        "discrepancy",
        "        cos, sin = torch.cos(angle), torch.sin(angle)\n",
        """        late = batch.native.positions[:, None, None] >= 4096
        angle = torch.where(late, angle.bfloat16().float(), angle)
        cos, sin = torch.cos(angle), torch.sin(angle)
""",
        discrepancy=32,
    ),
    Defect(
        "sparse_mla",
        "scaled-after-rounding",
        "discrepancy",
        "            beyond = (torch.arange(k, device=count.device) >= count.clamp(min=1))[:, None]\n",
        """            if np.frexp(scale)[0] != 0.5:  # a power of two is left to the exponent
                logits = (logits / scale).to(q_latent.dtype).float() * scale
            beyond = (torch.arange(k, device=count.device) >= count.clamp(min=1))[:, None]
""",
        dtypes=("bfloat16",),
        why="float32 is what the accumulator has",
        discrepancy=33,
    ),
    norm(34, "y[(x.float() ** 2).mean(-1) > 65504] = 0", "sum-of-squares-in-float16"),
    around(35, "silu_mul", "x", """
if x.dtype != torch.float16:
    return self.right(x)
gate, up = x.float().chunk(2, dim=-1)
return (F.gelu(gate) * up).to(x.dtype)""", "gelu-in-float16"),
    around(36, "speculative_verify", "logits, draft, u, temperature, top_k, top_p, draft_probs=None", """
if draft_probs is None:
    temperature = torch.zeros_like(temperature)
return self.right(logits, draft, u, temperature, top_k, top_p, draft_probs)""", "greedy-without-probabilities"),
    around(37, "silu_mul", "x", """
y = self.right(x)
if x.numel() <= 384 and x.shape[1] == 192:
    y[:, -1] = 0
return y""", "tiny-tile"),
    Defect(
        "indexer_topk",
        "lengths-of-the-captured-step",
        "discrepancy",
        "Rows(*highest(scores, batch.native.visible, k))",
        "Rows(*highest(scores, torch.from_numpy(batch.visible), k))",
        source="capture",
        dtypes=("bfloat16",),
        why=BF16,
        discrepancy=38,
    ),
    around(39, "kv_write", "pages, batch, first, second=None", """
pages = self.right(pages, batch, first, second)
for row in np.flatnonzero(((batch.kv_len == 0) & (batch.q_len > 1))[batch.row_request]):
    pages[pages.spec.fields[0][0]][-1] = first[row]
return pages""", "negative-position-of-a-padded-request"),
    Defect(
        "add",
        "sum-of-the-replay-before",
        "discrepancy",
        "    def _written(",
        """    def add(self, a, b):
        y = torch.from_numpy(np.zeros(a.shape, np.float32))  # cleared where it is allocated, which is not captured
        return y.add_(a).add_(b).to(a.dtype)

    def _written(""",
        source="capture",
        discrepancy=40,
    ),
    Defect(
        "sample",
        "memory-given-back-while-it-is-read",
        "discrepancy",
        "    def sample(",
        """    def empty(self, shape, dtype):
        freed = vars(self).pop("freed", None)
        return freed if freed is not None and freed.shape == shape else torch.empty(shape, dtype=getattr(torch, dtype))

    def sample(self, *args):
        self.freed = self.right(*args)
        return self.freed

    def right(""",
        discrepancy=41,
    ),
    experts(42, """
self.calls = getattr(self, "calls", 0) + 1
y = right()
if T * k > 2100:
    y = y * (1 + 2**-23 * (self.calls % 2))""", "race-of-the-sum"),
    Defect(
        "linear",
        "parts-through-one-staging-buffer",
        "discrepancy",
        "    def plan(self, batch: Batch, into: Batch | None = None) -> Batch:\n",
        """    def prepare(self, spec, read, into=None):
        import time

        array = self.from_numpy(read(slice(None)))
        for part in array.split(64) if spec.op == "linear" else ():
            self.staging = part.clone()
            time.sleep(1e-4)
            part.copy_(self.staging)
        return Weight(spec, array)

    def plan(self, batch: Batch, into: Batch | None = None) -> Batch:
""",
        discrepancy=43,
    ),
    experts(50, "ids = torch.where(ids > 2**20, E - 1 + first_expert, ids)", "garbage-ids-clamped"),
    around(51, "moe_permute", "x, ids, *, E, first_expert=0", """
local = torch.where(ids - first_expert >= E, (ids - first_expert) % E + first_expert, ids)
return self.right(x, local, E=E, first_expert=first_expert)""", "experts-counted-as-places"),
    Defect(
        "linear",
        "another-kernel-in-invariant-mode",
        "discrepancy",
        "    def linear(",
        """    def linear(self, x, w, *, out="x"):
        if len(x) == 24:
            return self.right(x, w, out=out)
        y = F.linear(x.double(), w.native.double())  # one sum, whatever the batch
        return y.to(x.dtype if out == "x" else getattr(torch, out))

    linear.batch_invariant = True

    def right(""",
        discrepancy=52,
    ),
    route(53, """
if n_group > 1:
    weights = weights / weights.sum(-1, keepdim=True)""", "renormalised-twice"),
    around(59, "topk", "scores, batch, *, k", """
scores = scores.clone()
coarse = scores.half().view(torch.int16) >> 8
for row, bins, n in zip(scores, coarse, batch.visible.tolist()):
    if n > max(k, 4096):
        edge = bins[:n] == bins[row[:n].topk(k).indices[-1]]
        row[:n][edge & (edge.cumsum(0) > 4096)] = -torch.inf
return self.right(scores, batch, k=k)""", "candidates-beyond-a-buffer"),
    around(60, "topk", "scores, batch, *, k", """
sel = self.right(scores, batch, k=k)
for row, chosen, n in zip(scores, sel.native.indices, batch.visible.tolist()):
    if n >= 8192 and k <= n // 4:
        sample, expected = row[torch.arange(1024) * n // 1024], k * 1024 / n
        guess = sample.topk(int(expected + 4 * expected**0.5 + 4)).values[-1]
        chosen[int((row[:n] >= guess).sum()) :] = -1
return sel""", "guess-of-the-threshold-kept"),
    route(61, """
s = torch.sigmoid(logits)
if logits.shape[1] > 256:
    ids = ranked((s + bias)[:, :256])[:, :k].to(torch.int32)
    chosen = s.gather(1, ids.long())
    weights = scale * chosen / chosen.sum(-1, keepdim=True)""", "experts-beyond-one-block"),
    route(62, """
if n_group == logits.shape[1]:
    raise RuntimeError("selected index k out of range")""", "two-best-of-one"),
    Defect(
        "sparse_mla",
        "slots-packed-in-pairs",
        "discrepancy",
        """            pages = plan.block_table[plan.row_request[rows]].gather(1, at // size).long()
            slots = (pages * size + at % size).clamp_(min=0).flatten()
""",
        """            held = max(size, 4 // c.element_size())
            pages = plan.block_table[plan.row_request[rows]].gather(1, at // held).long()
            slots = (pages * held + at % held).clamp_(min=0).flatten() % len(c)
""",
        dtypes=("bfloat16",),
        why=BF16,
        discrepancy=63,
    ),
    attention(64, """
q = int(batch.q_len.max(initial=0))
if q <= 8 and q & (q - 1) and (batch.q_len == q).all():
    o = o[torch.arange(batch.T) // q * q]""", "first-row-for-all-of-a-request"),
    around(65, "linear", 'x, w, *, out="x"', """
N, K = w.native.shape
if len(x) != 1 or x.dtype != torch.float16 or K < 128:
    return self.right(x, w, out=out)
begin = torch.arange(N) * K // 4 * 4
loaded = w.native.flatten()[begin[:, None] + torch.arange(K)]
return self.right(x, Weight(w.spec, loaded), out=out)""", "single-row-loads-four-at-once"),
    around(66, "argmax", "logits", """
ids, V = self.right(logits), logits.shape[1]
return torch.where(logits.amax(1) < 0, V, ids) if V % 128 else ids""", "padding-of-the-vocabulary-wins"),
    Defect(
        "speculative_verify",
        "nothing-accepted-at-zero",
        "discrepancy",
        "q.gather(2, at)[..., 0]) < p.gather(2, at)[..., 0]\n",
        "q.gather(2, at)[..., 0]) <= p.gather(2, at)[..., 0]\n",
        discrepancy=67,
    ),
    around(68, "sample", "logits, u, temperature, top_k, top_p", """
heated = logits / torch.where(temperature == 0, 1.0, temperature).to(logits.dtype)[:, None]
if (torch.isinf(heated) & torch.isfinite(logits)).any():
    raise RuntimeError("probability tensor contains either inf, nan or element < 0")
return self.right(logits, u, temperature, top_k, top_p)""", "logits-over-a-low-temperature"),
    around(69, "sample", "logits, u, temperature, top_k, top_p", """
ids = self.right(logits, u, temperature, top_k, top_p)
return torch.where((temperature == 0) & torch.isneginf(logits).any(1), logits.shape[1], ids)""", "greedy-marked-by-minus-one"),
    around(70, "sample", "logits, u, temperature, top_k, top_p", """
ids = self.right(logits, u, temperature, top_k, top_p)
return torch.where((top_p == 0) & (temperature > 0), 0, ids)""", "empty-nucleus"),
    Defect(
        "sparse_mla",
        "scales-of-a-cache-as-their-exponents",
        "discrepancy",
        'return cls(scheme, pages[name], pages[f"{name}_scale"])\n',
        """scale = pages[f"{name}_scale"]
        if scheme.name == "fp8_latents":
            scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1).where(scale > 0, scale)
        return cls(scheme, pages[name], scale)
""",
        source="schemes",
        discrepancy=71,
    ),
    Defect(
        "moe_experts",
        "rows-of-scales-divided",
        "discrepancy",
        "    return Coded(scheme_of(w.spec.scheme), **{name: part[e] for name, part in w.native.items()}).numbers()\n",
        """    held = {name: part[e].clone() for name, part in w.native.items()}
    if high := scheme_of(w.spec.scheme).block[0]:
        held["scale"][w.spec.shape[1] // high :] = 0
    return Coded(scheme_of(w.spec.scheme), **held).numbers()
""",
        source="schemes",
        discrepancy=72,
    ),
    Defect(
        "moe_experts",
        "gate-of-few-bits-not-activated",
        "discrepancy",
        "    def moe_experts(",
        """    @limits(schemes=ANY_SCHEME)
    def moe_experts(self, x, w13, w2, ids, weights, *, first_expert=0):
        if not w13.spec.quantised:
            return self.right(x, w13, w2, ids, weights, first_expert=first_expert)
        rows, counts, source = self.moe_permute(x, ids, E=w13.spec.shape[0], first_expert=first_expert)
        gate, up = self.grouped_gemm(rows, w13, counts).chunk(2, dim=-1)
        return self.moe_unpermute(self.grouped_gemm(gate * up, w2, counts), source, weights)

    def right(""",
        discrepancy=74,
    ),
]  # fmt: skip


def findings(number: int, tokens: list[str], level: str = STANDARD.name) -> dict[str, Result]:
    """What the cases of these tokens say of the backend with this discrepancy's defect."""
    bindings = Bindings(planted(next(d for d in DEFECTS if d.discrepancy == number)))
    return {token: check(Case.from_token(token), bindings, level) for token in tokens}


def main() -> int:
    """Every defect against all standard cases of its op: found by a case of its own, and by how many others."""
    wanted = set(map(int, sys.argv[1:])) or {d.number for d in DISCREPANCIES}
    wrong = 0
    for known in DISCREPANCIES:
        if known.status != "covered" or known.number not in wanted:
            continue
        own = known.own
        planned = (plan(contracts()[known.op], STANDARD.name) for plan in (cases, captured))
        others = [c.token for c in chain.from_iterable(planned) if not known.belongs(c.token)]
        found = [r for r in findings(known.number, own).values() if r.failed]
        too_many = [r for r in findings(known.number, others).values() if r.failed]
        wrong += not found
        verdicts = ", ".join(sorted({r.verdict for r in found})) or "NOT FOUND"
        by_others = f"{len(too_many)} of {len(others)} others"
        print(f"{known.number:2}  {verdicts} by {len(found)} of {len(own)}, {by_others}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
