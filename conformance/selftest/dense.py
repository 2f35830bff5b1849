"""Planted in matrix products: linear, head_linear, grouped_gemm."""

# ruff: noqa: E501, since a snippet is quoted on one line as it stands in its source
# fmt: off
from __future__ import annotations

from functools import partial

from porthal.conformance.selftest.planting import Defect

BF16_ONLY = "in float32 the edit rounds to the dtype that the value has"
linear = partial(Defect, "linear", old="return F.linear(x, w.native)\n")
head = partial(
    Defect, "head_linear", old="return torch.bmm(x.transpose(0, 1), w.native.transpose(1, 2)).transpose(0, 1)\n"
)
grouped = partial(Defect, "grouped_gemm", old="return _grouped(x, w.native, counts.tolist())\n")
sliced = "products = [F.linear(rows, weight) for rows, weight in zip(parts, w.unbind()) if len(rows)]\n"

DEFECTS = [
    linear(
        "bfloat16-accumulator",
        "accumulator",
        new="""y = 0
            for a, b in zip(x.split(16, 1), w.native.split(16, 1)):
                y = (y + F.linear(a.float(), b.float())).bfloat16()
            return y.to(target)\n""",
    ),
    linear(
        "float16-accumulator",
        "accumulator",
        new="""y = 0
            for a, b in zip(x.split(16, 1), w.native.split(16, 1)):
                y = (y + F.linear(a.float(), b.float())).half()
            return y.to(target)\n""",
        discrepancy=26,
    ),
    linear("last-column-dropped", "dropped", new="return F.linear(x[:, :-1], w.native[:, :-1])\n"),
    linear(
        "depth-tail-dropped",
        "dropped",
        new="""K = x.shape[1] // 32 * 32
            return F.linear(x[:, :K], w.native[:, :K])\n""",
        discrepancy=29,
    ),
    linear(
        "tail-columns-unwritten",
        "unwritten",
        new="""y, N = self.empty((len(x), len(w.native)), str(x.dtype)[6:]), len(w.native) // 8 * 8
            y[:, :N] = F.linear(x, w.native[:N])
            return y\n""",
        discrepancy=37,
    ),
    linear(
        "grid-of-65535-rows",
        "overflow",
        new="""y = F.linear(x, w.native)
            y[65535:] = 0
            return y\n""",
        discrepancy=23,
    ),
    linear(
        "partial-tile-of-rows-dropped",
        "unwritten",
        new="""y = self.empty((len(x), len(w.native)), str(x.dtype)[6:])
            n = len(x) // 16 * 16 if len(x) > 16 else len(x)
            y[:n] = F.linear(x[:n], w.native)
            return y\n""",
    ),
    linear("rows-swapped", "order", new="return F.linear(x, w.native).roll(1, 0)\n"),
    linear(
        "one-element-off",
        "value",
        new="""y = F.linear(x, w.native)
            y[-1:, -1:] *= 1.05
            return y\n""",
    ),
    linear(
        "truncates",
        "rounding",
        new="""y = F.linear(x.float(), w.native.float())
            return (y.view(torch.int32) & -65536).view(torch.float32).to(target) if target == torch.bfloat16 else y\n""",
        dtypes=("bfloat16",),
        why="the edit leaves float32 as it is",
    ),
    linear(
        "through-float16",
        "rounding",
        new="return F.linear(x.float(), w.native.float()).half().to(target)\n",
        discrepancy=34,
    ),
    linear(
        "rounded-before-out",
        "rounding",
        old="F.linear(wide, part.float()).to(target) for",
        new="F.linear(wide, part.float()).to(x.dtype).to(target) for",
        dtypes=("bfloat16",),
        why=BF16_ONLY,
        discrepancy=33,
    ),
    linear("out-ignored", "dtype", old='target = x.dtype if out == "x" else getattr(torch, out)', new="target = x.dtype",
           dtypes=("bfloat16",), why="float32 is what `out` asks for"),
    linear("transposed-result", "shape", new="return F.linear(x, w.native).T.contiguous()\n"),
    linear(
        "stale-workspace",
        "stale",
        new="""held = vars(self).setdefault("held", {})
            key = len(x), len(w.native), target
            if key not in held:
                held[key] = F.linear(x, w.native)
            return held[key]\n""",
        discrepancy=38,
    ),
    linear(
        "result-in-a-shared-workspace",
        "stale",
        new="""y = F.linear(x, w.native)
            held = vars(self).setdefault("held", {})
            return held.setdefault((y.shape, y.dtype), torch.empty_like(y)).copy_(y)\n""",
        discrepancy=41,
    ),
    linear(
        "sum-in-any-order",
        "non-determinism",
        new="""at = torch.randperm(x.shape[1])
            return F.linear(x.float()[:, at], w.native.float()[:, at]).to(target)\n""",
        discrepancy=42,
    ),
    linear(
        "strides-ignored",
        "strides",
        new="return F.linear(x.as_strided(x.shape, (x.shape[1], 1)), w.native)\n",
        discrepancy=27,
    ),
    linear(
        "input-scaled-in-place",
        "mutation",
        new="""y = F.linear(x, w.native)
            x.mul_(0.5)
            return y\n""",
    ),
    linear(
        "writes-past-the-end",
        "outside",
        new="""y = self.empty((len(x), len(w.native)), str(x.dtype)[6:])
            y.copy_(F.linear(x, w.native))
            if y.numel():
                y.as_strided((y.numel() + 4,), (1,))[-4:] = 0
            return y\n""",
    ),
    linear("raises-on-odd-rows", "error", new="""if len(x) % 2 and len(x) > 1:
                raise RuntimeError("aicore exception 507015")
            return F.linear(x, w.native)\n""", discrepancy=15),
    linear("unaligned-depth-misread", "value", new="""if x.shape[1] % 16:
                x = x.roll(1, 1)
            return F.linear(x, w.native)\n""", discrepancy=16),
    head("heads-reversed", "heads", new="return torch.bmm(x.transpose(0, 1), w.native.flip(0).transpose(1, 2)).transpose(0, 1)\n",
         discrepancy=18),
    head("first-head-for-all", "heads", new='return torch.einsum("tnk,mk->tnm", x, w.native[0])\n'),
    head(
        "input-transposed-as-if-contiguous",
        "strides",
        new="""y = torch.bmm(x.reshape(x.shape[1], x.shape[0], x.shape[2]), w.native.transpose(1, 2))
        return y.transpose(0, 1)\n""",
        discrepancy=27,
    ),
    head("bfloat16-accumulator", "accumulator", new="""y = 0
        for a, b in zip(x.split(16, 2), w.native.split(16, 2)):
            y = (y + torch.einsum("tnk,nmk->tnm", a.float(), b.float())).bfloat16()
        return y.to(x.dtype)\n"""),
    head("last-column-dropped", "dropped", new="""x, m = x[..., :-1], w.native[..., :-1]
        return torch.einsum("tnk,nmk->tnm", x, m)\n"""),
    head("eight-heads-at-a-time", "unwritten", new="""y = torch.bmm(x.transpose(0, 1), w.native.transpose(1, 2))
        if len(y) % 8:
            y[len(y) // 8 * 8 :] = 0
        return y.transpose(0, 1)\n""", discrepancy=17),
    head(
        "weights-prepared-in-the-wrong-order",
        "preparation",
        old="def plan(self, batch: Batch, into: Batch | None = None) -> Batch:\n",
        new="""def prepare(self, spec, read, into=None):
        array = self.from_numpy(read(slice(None)))
        return Weight(spec, array.flatten(1).unflatten(1, array.shape[:0:-1]).transpose(1, 2).contiguous())

    def plan(self, batch: Batch, into: Batch | None = None) -> Batch:\n""",
    ),
    grouped(
        "compacted-experts",
        "experts",
        new="""parts = [p for p in x.split([*counts.tolist(), len(x) - int(counts.sum())]) if len(p)]
        products = [F.linear(rows, weight) for rows, weight in zip(parts, w.native.unbind())]
        y = x.new_zeros((len(x), w.native.shape[1]))
        done = torch.cat([y[:0], *products])
        y[: len(done)] = done
        return y\n""",
        discrepancy=11,
    ),
    grouped(
        "padding-leaks",
        "padding",
        new="""ends = counts.cumsum(0)
        where = (torch.arange(len(x))[:, None] < ends) & (torch.arange(len(x))[:, None] >= ends - counts)
        y = torch.einsum("me,enk,mk->mn", where.float(), w.native.float(), x.float())
        return (where.any(1).float().diag() @ y).to(x.dtype)\n""",
        discrepancy=10,
    ),
    grouped("counts-as-ends", "experts", new="""ends = torch.cummax(counts, 0).values.tolist() if len(counts) else []
        return _grouped(x, w.native, [b - a for a, b in zip([0, *ends], ends)])\n"""),
    grouped(
        "at-most-128-rows-of-an-expert",
        "overflow",
        old=sliced,
        new="""products = [
        F.pad(F.linear(rows[:128], weight), (0, 0, 0, max(0, len(rows) - 128)))
        for rows, weight in zip(parts, w.unbind())
        if len(rows)
    ]\n""",
        discrepancy=14,
    ),
    grouped("sixteen-experts", "experts", old=sliced, new=sliced.replace("w.unbind()", "[w[e % 16] for e in range(len(w))]"),
            discrepancy=13),
    grouped("experts-reversed", "preparation", old=sliced, new=sliced.replace("w.unbind()", "w.flip(0).unbind()")),
    grouped("bfloat16-accumulator", "accumulator", old=sliced, new="""def product(a, b):
        y = 0
        for p, q in zip(a.split(16, 1), b.split(16, 1)):
            y = (y + F.linear(p.float(), q.float())).bfloat16()
        return y.to(a.dtype)

    products = [product(rows, weight) for rows, weight in zip(parts, w.unbind()) if len(rows)]\n"""),
    grouped("last-row-of-an-expert-dropped", "off by one", old=sliced, new="""products = [
        torch.cat([F.linear(rows[:-1], weight), x.new_zeros((1, w.shape[1]))])
        for rows, weight in zip(parts, w.unbind())
        if len(rows)
    ]\n"""),
]
