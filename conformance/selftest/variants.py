"""Honest variants: other orders of summation, other permitted roundings, other structure; the suite must accept them all.

Like defects they are edits of kernel sources, so that what is accepted and what is refused differ by a snippet.
"""

# ruff: noqa: E501, since a snippet is quoted on one line as it stands in its source
# fmt: off
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

from porthal.conformance.selftest import attention, composites, dense, experts, rows, state, tokens
from porthal.conformance.selftest.planting import plant, plantable
from porthal.hal import Backend, contracts, create, probe

Edit = tuple[str, str]


@dataclass(frozen=True)
class Variant:
    """One honest kernel, or a whole backend; the cpu one with so many threads, in one of its instruction sets."""

    op: str
    name: str
    edits: tuple[Edit, ...] = ()
    source: str = "backend"
    backend: str = ""
    threads: int = 0
    isa: str = ""

    @property
    def key(self) -> str:
        return f"{self.op}/{self.name}"

    def make(self) -> Backend:
        return create(self.backend) if self.backend else plant(self.key, self.source, *self.edits)

    def settle(self) -> None:
        """Set what is the process's own and not the backend's, before every trial."""
        if self.threads:
            from porthal.backends.cpu import _native  # type: ignore[attr-defined]  # C++

            _native.set_num_threads(self.threads)
            _native.set_isa(self.isa)


def _edit(op: str, name: str, *edits: Edit, source: str = "backend") -> Variant:
    return Variant(op, name, edits, source)


@cache
def variants() -> tuple[Variant, ...]:
    """The edited kernels, the correct backends, and the mutants that are said to be equivalent."""
    same = (Variant(d.op, f"equivalent: {d.name}", ((d.old, d.new),), d.source) for d in plantable() if d.equivalent)
    return (*EDITED, *_whole(), *same)


def _whole() -> Iterator[Variant]:
    """The correct backends, and the composites in one kernel each."""
    for op, contract in contracts().items():
        yield Variant(op, "torch", backend="torch")
        yield Variant(op, "reference", backend="reference")
        if contract.decomposition and op not in ("indexer_topk", "moe_experts"):
            yield Variant(op, "fused", source="fused")
    if probe("cpu").state == "available":
        from porthal.backends.cpu import _native  # type: ignore[attr-defined]  # C++

        *others, best = _native.isas()
        for op in ("rms_norm", "topk", "moe_experts", "moe_layer", "indexer_topk"):
            for threads in (1, 2):
                yield Variant(op, f"cpu with {threads} threads", backend="cpu", threads=threads, isa=best)
        for op, isa in product(("rms_norm", "topk", "moe_experts"), others):
            yield Variant(op, f"cpu in {isa}", backend="cpu", threads=2, isa=isa)


linear = partial(_edit, "linear")
LINEAR = "return F.linear(x, w.native)\n"
HEAD = "return torch.bmm(x.transpose(0, 1), w.native.transpose(1, 2)).transpose(0, 1)\n"
RMS = rows.rms.keywords["old"]
LOGS = rows.logs.keywords["old"]
LOG = LOGS.partition("        ")[0] + "        "
LAYER = "return (centred / torch.sqrt(variance + eps) * weight.float() + bias.float()).to(x.dtype)\n"
PRODUCT = "return F.linear(x.float(), w.native.float())\n"


def _products(product: str) -> Edit:
    return dense.sliced, f"products = [{product} for rows, weight in zip(parts, w.unbind()) if len(rows)]\n"


EDITED = (
    linear("split in two halves of the depth", (LINEAR, """k = x.shape[1] // 2
            a, b = x.float(), w.native.float()
            return (F.linear(a[:, :k], b[:, :k]) + F.linear(a[:, k:], b[:, k:])).to(target)\n""")),
    linear("summed from the end", (LINEAR, "return F.linear(x.float().flip(1), w.native.float().flip(1)).to(target)\n")),
    linear("in chunks of 64", (LINEAR, """y = torch.zeros((len(x), len(w.native)))
            for a, b in zip(x.float().split(64, 1), w.native.float().split(64, 1)):
                y = y + F.linear(a, b)
            return y.to(target)\n""")),
    linear("one column after the other", (LINEAR, """y = torch.zeros((len(x), len(w.native)))
            for k in range(x.shape[1]):
                y = y + x[:, k : k + 1].float() * w.native[:, k].float()
            return y.to(target)\n""")),
    linear("in float64", (LINEAR, "return F.linear(x.double(), w.native.double()).to(target)\n")),
    linear("rows padded to 16", (LINEAR, "return F.linear(F.pad(x, (0, 0, 0, -len(x) % 16)), w.native)[: len(x)]\n")),
    _edit("head_linear", "split in two halves of the depth", (HEAD, """k = x.shape[2] // 2
        a, b = x.float(), w.native.float()
        parts = [torch.einsum("tnk,nmk->tnm", a[..., s], b[..., s]) for s in (slice(None, k), slice(k, None))]
        return (parts[0] + parts[1]).to(x.dtype)\n""")),
    _edit("head_linear", "summed from the end", (HEAD, 'return torch.einsum("tnk,nmk->tnm", x.float().flip(2), w.native.float().flip(2)).to(x.dtype)\n')),
    _edit("head_linear", "in float64", (HEAD, 'return torch.einsum("tnk,nmk->tnm", x.double(), w.native.double()).to(x.dtype)\n')),
    _edit("head_linear", "heads padded to 16", (HEAD, """n = x.shape[1]
        a, b = F.pad(x, (0, 0, 0, -n % 16)), F.pad(w.native, (0, 0, 0, 0, 0, -n % 16))
        return torch.bmm(a.transpose(0, 1), b.transpose(1, 2)).transpose(0, 1)[:, :n]\n""")),
    _edit("grouped_gemm", "in float64", _products("F.linear(rows.double(), weight.double()).to(x.dtype)")),
    _edit("grouped_gemm", "summed from the end", _products("F.linear(rows.float().flip(1), weight.float().flip(1)).to(x.dtype)")),
    _edit("grouped_gemm", "padding with whatever is there", ("return torch.cat([*products, x.new_zeros((tail, w.shape[1]))])\n",
          "return torch.cat([*products, x.new_full((tail, w.shape[1]), torch.nan)])\n")),
    _edit("grouped_gemm", "split in two halves of the depth", _products(
        "(F.linear(rows[:, : len(weight[0]) // 2].float(), weight[:, : len(weight[0]) // 2].float())"
        " + F.linear(rows[:, len(weight[0]) // 2 :].float(), weight[:, len(weight[0]) // 2 :].float())).to(x.dtype)")),
    _edit("rms_norm", "rounded before the weight", (RMS, """wide = x.float()
        normed = (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)).to(x.dtype).float()
        return (normed * weight.float()).to(x.dtype)\n""")),
    _edit("rms_norm", "by the root's reciprocal", (rows.formula, "return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight.float()\n")),
    _edit("rms_norm", "weight first", (rows.formula, "return x * weight.float() * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)\n")),
    _edit("rms_norm", "in float64", (RMS, "return _rms_norm(x.double(), weight.double(), eps).to(x.dtype)\n"),
          (rows.formula, rows.formula.replace("weight.float()", "weight"))),
    _edit("rms_norm", "squares one after the other", (rows.formula,
          "return x / torch.sqrt((x * x).cumsum(-1)[:, -1:] / x.shape[-1] + eps) * weight.float()\n")),
    _edit("add_rms_norm", "norm of the rounded sum", (rows.added.keywords["old"], "r = (x.float() + residual.float()).to(x.dtype).float()\n")),
    _edit("add_rms_norm", "by the root's reciprocal", (rows.formula, "return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight.float()\n")),
    _edit("add_rms_norm", "rounded before the weight", ("_rms_norm(r, weight, eps).to(x.dtype), r.to(x.dtype)",
          "(_rms_norm(r, torch.ones_like(weight), eps).to(x.dtype).float() * weight.float()).to(x.dtype), r.to(x.dtype)")),
    _edit("layer_norm", "of the library", (LAYER, "return F.layer_norm(wide, wide.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)\n")),
    _edit("layer_norm", "rounded before the weight", (LAYER,
          "return ((centred / torch.sqrt(variance + eps)).to(x.dtype).float() * weight.float() + bias.float()).to(x.dtype)\n")),
    _edit("layer_norm", "in float64", ("centred = wide - wide.mean(-1, keepdim=True)\n", "wide = x.double()\n        centred = wide - wide.mean(-1, keepdim=True)\n")),
    _edit("rope", "frequencies inverted", ("* theta ** (-half / width)", "* (1.0 / (theta ** (half / width)))")),
    _edit("rope", "tables in float64", ("angle = batch.native.positions.float()[:, None, None] * theta ** (-half / width)\n",
          "angle = batch.native.positions.double()[:, None, None] * theta ** (-half.double() / width)\n"),
          ("cos, sin = torch.cos(angle), torch.sin(angle)\n", "cos, sin = torch.cos(angle).float(), torch.sin(angle).float()\n")),
    _edit("rope", "by addmul", ("turned = (first * cos - second * sin, second * cos + first * sin)",
          "turned = (torch.addcmul(-second * sin, first, cos), torch.addcmul(first * sin, second, cos))")),
    _edit("silu_mul", "activation rounded", (rows.silu.keywords["old"], "return (F.silu(gate).to(x.dtype).float() * up).to(x.dtype)\n")),
    _edit("silu_mul", "by the exponential", (rows.silu.keywords["old"], "return (gate / (1 + torch.exp(-gate)) * up).to(x.dtype)\n")),
    _edit("silu_mul", "in float64", (rows.silu.keywords["old"], "return (F.silu(gate.double()) * up.double()).to(x.dtype)\n")),
    _edit("add", "in float64", (rows.add.keywords["old"], "return (a.double() + b.double()).to(a.dtype)\n")),
    _edit("add", "of copies", (rows.add.keywords["old"], "return torch.stack([b, a]).sum(0, dtype=torch.float32).to(a.dtype)\n")),
    _edit("concat", "into allocated memory", (rows.concat.keywords["old"], """y = self.empty((len(a), a.shape[1] + b.shape[1]), str(a.dtype)[6:])
        y[:, : a.shape[1]], y[:, a.shape[1] :] = a, b
        return y\n""")),
    _edit("take_rows", "row by row", (rows.take.keywords["old"], """y = x.new_zeros((len(rows), x.shape[1]))
        for m, r in enumerate(rows.tolist()):
            if r >= 0:
                y[m] = x[r]
        return y\n""")),
    _edit("embedding", "by index", (rows.embed.keywords["old"], "return table.native.index_select(0, ids)\n")),
    _edit("log_softmax", "by logsumexp", (LOGS, LOG + "return logits.float() - torch.logsumexp(logits.float(), -1, keepdim=True)\n")),
    _edit("log_softmax", "in float64", (LOGS, LOG + "return torch.log_softmax(logits.double(), dim=-1).float()\n")),
    _edit("log_softmax", "one after the other", (LOGS, LOG + """wide = logits.float()
        wide = wide - wide.amax(-1, keepdim=True)
        return wide - torch.log(torch.exp(wide).cumsum(-1)[:, -1:])\n""")),
    _edit("gather_logprob", "by logsumexp", (rows.gather.keywords["old"],
          "return logits.float().gather(1, ids[:, None].long())[:, 0] - torch.logsumexp(logits.float(), -1)\n")),
    _edit("gather_logprob", "in float64", (rows.gather.keywords["old"],
          "return torch.log_softmax(logits.double(), dim=-1).gather(1, ids[:, None].long())[:, 0].float()\n")),
    _edit("moe_route", "sigmoid by the exponential", ("s = torch.sigmoid(logits)\n", "s = 1 / (1 + torch.exp(-logits))\n")),
    _edit("moe_route", "sigmoid in float64", ("s = torch.sigmoid(logits)\n", "s = torch.sigmoid(logits.double()).float()\n")),
    _edit("moe_route", "scaled before dividing", (experts.to_weights, """total = chosen.flip(1).cumsum(1)[:, -1:] + 1e-20
        return ids.to(torch.int32), chosen * (scale / total)\n""")),
    _edit("moe_permute", "into allocated memory", ("return _rows_or_zero(x, _row_of(source, ids.shape[1])), counts, source\n",
          """y = self.empty((len(source), x.shape[1]), str(x.dtype)[6:])
        y.copy_(_rows_or_zero(x, _row_of(source, ids.shape[1])))
        return y, counts, source\n""")),
    _edit("moe_unpermute", "last choice first", ("for j in range(k):\n", "for j in reversed(range(k)):\n")),
    _edit("moe_unpermute", "in float64", ("y = torch.zeros((T, sorted.shape[1]), dtype=torch.float32", "y = torch.zeros((T, sorted.shape[1]), dtype=torch.float64")),
    _edit("moe_experts", "composed", ("    def moe_experts(\n", "    def _other(\n"), ("    moe_experts.capturable = False\n", "    moe_experts = None\n")),
    _edit("moe_experts", "last choice first", ("for j in range(k):\n", "for j in reversed(range(k)):\n")),
    _edit("moe_experts", "products unrounded", (experts.h, """wide = [F.linear(r.float(), m.float()) for r, m in zip(rows.split(counts), w13.native.unbind())]
        h = _silu_mul(torch.cat(wide)).to(x.dtype)\n""")),
    _edit("moe_experts", "nothing rounded inside", (experts.h, """parts = zip(rows.float().split(counts), w13.native.unbind(), w2.native.unbind())
        outs = [F.linear(_silu_mul(F.linear(r, a.float())), b.float()) for r, a, b in parts]\n"""),
          (experts.out, "return _combine(torch.cat(outs), source, weights).to(x.dtype)\n")),
    _edit("moe_experts", "activation rounded twice", ("return (F.silu(gate) * up).to(x.dtype)\n", "return (F.silu(gate).to(x.dtype).float() * up).to(x.dtype)\n")),
    _edit("moe_experts", "in float64", (experts.h, """parts = zip(rows.double().split(counts), w13.native.unbind(), w2.native.unbind())
        outs = []
        for r, a, b in parts:
            gate, up = F.linear(r, a.double()).chunk(2, -1)
            outs.append(F.linear(F.silu(gate) * up, b.double()))\n"""),
          (experts.out, "return _combine(torch.cat(outs), source, weights.double()).to(x.dtype)\n")),
    _edit("kv_write", "row by row", ("pages[name].index_copy_(0, plan.targets, rows)\n",
          """for slot, row in zip(plan.targets.tolist(), rows):
                pages[name][slot] = row\n""")),
    _edit("page_copy", "page by page", ("blocks.index_copy_(0, target.long(), blocks.index_select(0, source))\n",
          """before = blocks.clone()
            for a, b in zip(source.tolist(), target.tolist()):
                blocks[b] = before[a]\n""")),
    _edit("select_rows", "row by row", (rows.select.keywords["old"], "Rows(*(torch.stack([x[r] for r in rows.tolist()]) if len(rows) else x[:0] for x in self.rows(sel)))\n")),
    _edit("indexer_scores", "in float64", ("return scale * torch.bmm(weight, products)[:, 0]\n", "return (scale * torch.bmm(weight.double(), products.double())[:, 0]).float()\n")),
    _edit("indexer_scores", "scaled before", ("return scale * torch.bmm(weight, products)[:, 0]\n", "return torch.bmm(weight * scale, products)[:, 0]\n")),
    _edit("indexer_scores", "last head first", ("return scale * torch.bmm(weight, products)[:, 0]\n", "return scale * torch.bmm(weight.flip(-1), products.flip(1))[:, 0]\n")),
    _edit("indexer_scores", "one page at a time", ("split(max(1, KEY_BLOCK // size))", "split(1)")),
    _edit("indexer_topk", "composed", ("    @limits(schemes=ANY_SCHEME)\n    @torch.no_grad()\n    def indexer_topk(",
          "    def _other("), ("    indexer_topk.capturable = False\n", "    indexer_topk = None\n")),
    _edit("indexer_topk", "last head first", ("return scale * torch.bmm(weight, products)[:, 0]\n", "return scale * torch.bmm(weight.flip(-1), products.flip(1))[:, 0]\n")),
    _edit("indexer_topk", "unscaled", ("return scale * torch.bmm(weight, products)[:, 0]\n", "return torch.bmm(weight, products)[:, 0]\n")),
    _edit("topk", "highest position first", (attention.ended, """place = torch.where(position[:k] < length[:, None], length[:, None] - 1 - position[:k], position[:k])
    return torch.where(position[:k] < length[:, None], found.gather(1, place.long()), -1), length\n"""), source="ranking"),
    _edit("topk", "by sorting", ("if n <= k:\n", "if n > k:\n        found = ranked(torch.where(position >= visible[:, None], -torch.inf, comparable(scores)))[:, :k].to(torch.int32)\n    elif n <= k:\n"), source="ranking"),
    _edit("sparse_mla", "probabilities rounded", (attention.sums, """p = torch.exp(logits.masked_fill(beyond, -torch.inf) - logits.masked_fill(beyond, -torch.inf).amax(-1, keepdim=True))
            o = torch.bmm(p.to(q_latent.dtype).float(), keys) / p.sum(-1, keepdim=True)\n""")),
    _edit("sparse_mla", "in two halves of the keys", (attention.sums, """parts, logits = [], logits.masked_fill(beyond, -torch.inf)
            for some, held in zip(logits.split(-(-k // 2), 2), keys.split(-(-k // 2), 1)):
                top = some.amax(-1, keepdim=True).clamp(min=-1e30)
                p = torch.exp(some - top)
                parts.append((top, p.sum(-1, keepdim=True), torch.bmm(p, held)))
            top = torch.stack([t for t, _, _ in parts]).amax(0)
            total = sum(torch.exp(t - top) * s for t, s, _ in parts)
            o = sum(torch.exp(t - top) * v for t, _, v in parts) / total\n""")),
    _edit("sparse_mla", "in float64", (attention.sums, "o = torch.bmm(torch.softmax(logits.double().masked_fill(beyond, -torch.inf), dim=-1), keys.double())\n")),
    _edit("sparse_mla", "query scaled first", (attention.by_rope, attention.by_rope.replace("q_rope[rows].float()", "scale * q_rope[rows].float()")),
          (attention.by_latent, attention.by_latent.replace("q_latent[rows].float()", "scale * q_latent[rows].float()").replace("beta=scale, alpha=scale", "beta=1.0, alpha=1.0"))),
    _edit("sparse_mla", "keys from the end", (attention.sums, """logits, keys = logits.masked_fill(beyond, -torch.inf).flip(2), keys.flip(1)
            o = torch.bmm(torch.softmax(logits, dim=-1), keys)\n""")),
    _edit("argmax", "by flipping", (tokens.best.keywords["old"], tokens.ARGMAX + "return torch.sort(comparable(logits), dim=-1, descending=True, stable=True).indices[:, 0].to(torch.int32)\n")),
    _edit("check_finite", "every logit looked at", ("~torch.isfinite(logits.amax(-1))", "(((logits != logits) | (logits == torch.inf)).any(-1) | (logits == -torch.inf).all(-1))")),
    _edit("sample", "in float64", (tokens.widened, tokens.widened.replace(".float()", ".double()"))),
    _edit("sample", "mass not normalised before", (tokens.summed, "cumulated = shares.mul(3).cumsum(-1)\n")),
    _edit("sample", "sums in blocks of 64", (tokens.summed, """n = len(place)
    blocks = F.pad(shares, (0, -n % 64)).unflatten(1, (-1, 64)).cumsum(-1)
    cumulated = (blocks + F.pad(blocks[..., -1].cumsum(-1), (1, -1))[..., None]).flatten(1)[:, :n]\n""")),
    _edit("speculative_verify", "in float64", (tokens.widened, tokens.widened.replace(".float()", ".double()"))),
    _edit("speculative_verify", "divided", (tokens.passed, "passed = u < p.gather(2, at)[..., 0] / (1.0 if q is None else q.gather(2, at)[..., 0])\n")),
    _edit("mla_prolog", "fused, everything rounded", (PRODUCT, "return F.linear(x.float(), w.native.float()).to(w.native.dtype).float()\n"), source="fused"),
    _edit("mla_prolog", "fused, in float64", (PRODUCT, "return F.linear(x.double(), w.native.double()).float()\n"), source="fused"),
    _edit("index_prolog", "fused, key rounded before the turn", (composites.key, composites.key.rstrip("\n") + ".to(h.dtype).float()\n"), source="fused"),
    _edit("index_prolog", "fused, in float64", (PRODUCT, "return F.linear(x.double(), w.native.double()).float()\n"), source="fused"),
    _edit("moe_experts", "captured, summed in one product", ("y + weights[:, j, None] * parts[:, j].float()", "torch.einsum('tk,tkh->th', weights, parts.float())"), source="capture"),
    _edit("sparse_mla", "captured behind a call to warm up", ("        with _NoCopies(), recorder:\n", "        run()\n        with _NoCopies(), recorder:\n"), source="capture"),
    _edit("mla_output", "fused, in float64", (composites.values, composites.values.replace(".float()", ".double()")), (PRODUCT, "return F.linear(x.double(), w.native.double())\n"), source="fused"),
    _edit("mla_output", "fused, values rounded", (composites.values, composites.values.rstrip("\n") + ".to(o.dtype).float()\n"), source="fused"),
    _edit("mtp_input", "fused, norms rounded", (composites.halves, "halves = _rms_norm(e.float(), enorm, eps).to(e.dtype), _rms_norm(g.float(), hnorm, eps).to(e.dtype)\n"), source="fused"),
    _edit("mtp_input", "fused, summed from the end", (PRODUCT, "return F.linear(x.float().flip(1), w.native.float().flip(1))\n"), source="fused"),
    _edit("moe_layer", "fused, shared rounded", (composites.shared, composites.shared.rstrip("\n") + "\n        y = y.to(x.dtype).float()\n"), source="fused"),
    _edit("moe_layer", "fused, in float64", ("y = _gated(x.float(), shared13.native) @ shared2.native.float().T\n", "y = (_gated(x.float(), shared13.native).double() @ shared2.native.double().T).float()\n"), source="fused"),
    _edit("head_linear", "packed in a second form, renewed by prepare", state.methods(*state.PACK,
          "return Weight(spec, {'w': w.native, 'turned': w.native.transpose(1, 2).contiguous()})", *state.PACKED,
          "def head_linear(self, x, w):", "return super().head_linear(x, Weight(w.spec, w.native['turned'].transpose(1, 2)))"), source="kept"),
    _edit("linear", "prepared in new memory each time", state.methods("def prepare(self, spec, read, into=None):", "return super().prepare(spec, read)",
          f"{state.LINEAR}:", state.PLAIN.strip()), source="kept"),
    _edit("rope", "table kept in the plan by all that it depends on", state.methods("def rope(self, x, batch, *, theta, layout, **attrs):",
          "memo = vars(batch).setdefault('_tables', {})", "theta, layout = memo.setdefault((theta, layout, *attrs.items()), (theta, layout))",
          "return super().rope(x, batch, theta=theta, layout=layout, **attrs)"), source="kept"),
    _edit("topk", "plans kept by their object", state.methods("def topk(self, scores, batch, *, k):", "held = self._mine().setdefault(id(batch), batch)",
          "[self._mine().pop(first, None) for first in list(self._mine())[:-8]]", "return super().topk(scores, held if held is batch else batch, k=k)"), source="kept"),
    _edit("add", "memory used again when nobody holds it", state.methods("def add(self, a, b):", "y = super().add(a, b)",
          "pool = self._mine().setdefault((threading.get_ident(), y.shape, y.dtype), [])", "free = next((n for n in range(len(pool)) if sys.getrefcount(pool[n]) == 2), None)",
          "if free is None or y.numel() > 2**18:", "    pool += [y] * (y.numel() <= 2**18)", "    return y", "return pool[free].copy_(y)"), source="kept"),
    _edit("sparse_mla", "of a dense copy of the pages", state.methods(f"{state.ATTEND}:", "native = {name: kv[name].clone() for name, _ in kv.spec.fields}",
          "return super().sparse_mla(q_latent, q_rope, Pages(kv.spec, native), sel, batch, scale=scale)"), source="kept"),
)
