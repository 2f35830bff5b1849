"""Planted in what is computed row by row: norms, rope, activation, sums, copies, log-softmax."""

# ruff: noqa: E501, since a snippet is quoted on one line as it stands in its source
# fmt: off
from __future__ import annotations

from functools import partial

from porthal.conformance.selftest.planting import Defect

rms = partial(Defect, "rms_norm", old="return _rms_norm(x.float(), weight, eps).to(x.dtype)\n")
formula = "return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight.float()\n"
added = partial(Defect, "add_rms_norm", old="r = x.float() + residual.float()\n")
layer = partial(Defect, "layer_norm")
rope = partial(Defect, "rope")
silu = partial(Defect, "silu_mul", old="return (F.silu(gate) * up).to(x.dtype)\n")
add = partial(Defect, "add", old="return a + b\n")
cast = partial(Defect, "cast", old="return x.to(getattr(torch, to), copy=True)\n")
concat = partial(Defect, "concat", old="return torch.cat([a, b], dim=-1)\n")
take = partial(Defect, "take_rows", old="return _rows_or_zero(x, rows)\n")
embed = partial(Defect, "embedding", old="return F.embedding(ids, table.native)\n")
logs = partial(
    Defect, "log_softmax", old="def log_softmax(self, logits: Tensor) -> Tensor:\n        return torch.log_softmax(logits.float(), dim=-1)\n"
)
gather = partial(
    Defect, "gather_logprob", old="return torch.log_softmax(logits.float(), dim=-1).gather(1, ids[:, None].long())[:, 0]\n"
)
select = partial(Defect, "select_rows", old="Rows(*(x.index_select(0, rows) for x in self.rows(sel)))\n")

DEFECTS = [
    rms("eps-missing", "eps", new="return _rms_norm(x.float(), weight, 0.0).to(x.dtype)\n"),
    rms("eps-hard-coded", "eps", new="return _rms_norm(x.float(), weight, 1e-5).to(x.dtype)\n", discrepancy=36),
    rms(
        "eps-outside-the-root",
        "eps",
        old=formula,
        new="return x / (torch.sqrt((x * x).mean(-1, keepdim=True)) + eps) * weight.float()\n",
    ),
    rms(
        "squares-in-float16",
        "accumulator",
        old=formula,
        new="return x / torch.sqrt((x * x).half().float().mean(-1, keepdim=True) + eps) * weight.float()\n",
        discrepancy=34,
    ),
    rms(
        "squares-summed-in-bfloat16",
        "accumulator",
        old=formula,
        new="""total = x.new_zeros((len(x), 1))
    for p in x.split(32, -1):
        total = (total + (p * p).sum(-1, keepdim=True)).bfloat16().float()
    return x / torch.sqrt(total / x.shape[-1] + eps) * weight.float()\n""",
    ),
    rms(
        "mean-over-the-padded-width",
        "off by one",
        old=formula,
        new="""n = -(-x.shape[-1] // 16) * 16
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / n + eps) * weight.float()\n""",
        discrepancy=16,
    ),
    rms("weight-plus-one", "formula", old=formula, new=formula.replace("weight.float()", "(1 + weight.float())")),
    rms(
        "weight-in-the-dtype-of-x",
        "rounding",
        new="return _rms_norm(x.float(), weight.to(x.dtype), eps).to(x.dtype)\n",
        dtypes=("bfloat16",),
        why="in float32 a weight is float32 anyway",
    ),
    rms("truncates", "rounding", new="""y = _rms_norm(x.float(), weight, eps)
        return (y.view(torch.int32) & -65536).view(torch.float32).to(x.dtype) if x.dtype == torch.bfloat16 else y\n""",
        dtypes=("bfloat16",), why="the edit leaves float32 as it is"),
    rms("tail-unwritten", "unwritten", new="""y, n = self.empty(x.shape, str(x.dtype)[6:]), x.shape[1] // 16 * 16
        y[:, :n] = _rms_norm(x.float(), weight, eps)[:, :n].to(x.dtype)
        return y\n""", discrepancy=37),
    rms("grid-of-256-rows", "overflow", new="""y = _rms_norm(x.float(), weight, eps).to(x.dtype)
        y[256:] = 0
        return y\n""", discrepancy=3),
    rms("onto-the-input", "mutation", new="return x.copy_(_rms_norm(x.float(), weight, eps).to(x.dtype))\n", discrepancy=40),
    rms("into-the-gaps-of-a-view", "outside", new="""y = _rms_norm(x.float(), weight, eps).to(x.dtype)
        if x.dim() == 2 and x.stride(0) > x.shape[1] and x.stride(1) == 1 and len(x) > 1:
            x.as_strided((len(x) - 1, 1), x.stride(), x.storage_offset() + x.shape[1]).fill_(1)
        return y\n""", discrepancy=27),
    rms("neighbouring-rows-share-a-sum", "rows", old=formula, new="""square = (x * x).mean(-1, keepdim=True)
    if len(x) % 2 == 0:
        square = square.unflatten(0, (-1, 2)).nanmean(1, keepdim=True).expand(-1, 2, -1).flatten(0, 1)
    return x / torch.sqrt(square + eps) * weight.float()\n""", discrepancy=52),
    added("residual-dropped", "formula", new="r = x.float()\n"),
    added("residual-twice", "formula", new="r = x.float() + 2 * residual.float()\n", discrepancy=44),
    added("residual-not-normalised", "formula", old="_rms_norm(r, weight, eps).to(x.dtype), r.to(x.dtype)",
          new="_rms_norm(x.float(), weight, eps).to(x.dtype), r.to(x.dtype)"),
    added("x-returned", "formula", old="_rms_norm(r, weight, eps).to(x.dtype), r.to(x.dtype)",
          new="_rms_norm(r, weight, eps).to(x.dtype), x.clone()"),
    added("sum-in-bfloat16", "rounding", new="r = (x.bfloat16() + residual.bfloat16()).float()\n", dtypes=("float32",),
          why="in bfloat16 the contract lets the norm be taken of the rounded sum"),
    added("onto-the-residual", "mutation", new="r = residual.add_(x).float()\n", discrepancy=40),
    added("eps-missing", "eps", old="_rms_norm(r, weight, eps).to(x.dtype), r.to(x.dtype)",
          new="_rms_norm(r, weight, 0.0).to(x.dtype), r.to(x.dtype)"),
    layer("variance-by-difference", "formula", old="variance = (centred * centred).mean(-1, keepdim=True)\n",
          new="variance = ((wide * wide).mean(-1, keepdim=True) - wide.mean(-1, keepdim=True) ** 2).clamp(min=0)\n"),
    layer("sample-variance", "formula", old="variance = (centred * centred).mean(-1, keepdim=True)\n",
          new="variance = (centred * centred).sum(-1, keepdim=True) / max(x.shape[1] - 1, 1)\n"),
    layer("eps-missing", "eps", old="torch.sqrt(variance + eps)", new="torch.sqrt(variance)"),
    layer("eps-hard-coded", "eps", old="torch.sqrt(variance + eps)", new="torch.sqrt(variance + 1e-6)", discrepancy=36),
    layer("bias-missing", "formula", old="* weight.float() + bias.float())", new="* weight.float())"),
    layer("bias-before-the-weight", "order", old="(centred / torch.sqrt(variance + eps) * weight.float() + bias.float())",
          new="((centred / torch.sqrt(variance + eps) + bias.float()) * weight.float())"),
    layer("not-centred", "formula", old="centred = wide - wide.mean(-1, keepdim=True)\n", new="centred = wide\n"),
    layer("mean-in-bfloat16", "accumulator", old="centred = wide - wide.mean(-1, keepdim=True)\n",
          new="centred = wide - wide.bfloat16().mean(-1, keepdim=True).float()\n"),
    rope("layouts-swapped", "rope", old='if layout == "interleaved":\n', new='if layout != "interleaved":\n', discrepancy=31),
    rope("always-interleaved", "rope", old="part = x[..., start : start + width].float()\n",
         new='part, layout = x[..., start : start + width].float(), "interleaved"\n', discrepancy=31),
    rope("slice-at-the-start", "rope", old="part = x[..., start : start + width].float()\n",
         new="part, start = x[..., :width].float(), 0\n"),
    rope("slice-not-copied-back", "rope", old="[x[..., :start], y.to(x.dtype), x[..., start + width :]]",
         new="[torch.zeros_like(x[..., :start]), y.to(x.dtype), x[..., start + width :]]"),
    rope("position-off-by-one", "off by one", old="angle = batch.native.positions.float()[:, None, None]",
         new="angle = (batch.native.positions + 1).float()[:, None, None]"),
    rope("rows-as-positions", "rows", old="angle = batch.native.positions.float()[:, None, None]",
         new="angle = torch.arange(len(x)).float()[:, None, None]"),
    rope("tables-in-bfloat16", "rounding", old="cos, sin = torch.cos(angle), torch.sin(angle)\n",
         new="cos, sin = torch.cos(angle).bfloat16().float(), torch.sin(angle).bfloat16().float()\n", discrepancy=32),
    rope("angles-in-bfloat16", "rounding", old="cos, sin = torch.cos(angle), torch.sin(angle)\n",
         new="angle = angle.bfloat16().float()\n        cos, sin = torch.cos(angle), torch.sin(angle)\n", discrepancy=32),
    rope("positions-in-int16", "overflow", old="batch.native.positions.float()[:, None, None]",
         new="batch.native.positions.to(torch.int16).float()[:, None, None]", discrepancy=20),
    rope("theta-hard-coded", "attribute", old="* theta ** (-half / width)", new="* 1e6 ** (-half / width)"),
    rope("frequencies-over-the-head", "formula", old="* theta ** (-half / width)", new="* theta ** (-half / x.shape[-1])"),
    rope("turned-backwards", "formula", old="turned = (first * cos - second * sin, second * cos + first * sin)",
         new="turned = (first * cos + second * sin, second * cos - first * sin)"),
    rope("head-0-only", "heads", old="[x[..., :start], y.to(x.dtype), x[..., start + width :]], dim=-1)\n",
         new="[x[..., :start], y.to(x.dtype), x[..., start + width :]], dim=-1)[:, :1].expand(x.shape)\n", discrepancy=18),
    silu("halves-swapped", "order", new="return (F.silu(up) * gate).to(x.dtype)\n"),
    silu("gelu", "formula", new="return (F.gelu(gate) * up).to(x.dtype)\n", discrepancy=35),
    silu("sigmoid-only", "formula", new="return (torch.sigmoid(gate) * up).to(x.dtype)\n"),
    silu("exp-overflows", "overflow", new="""e = torch.exp(gate)
    return (gate * (e / (1 + e)) * up).to(x.dtype)\n"""),
    silu("activation-in-float16", "rounding", new="return (F.silu(gate).half().float() * up).to(x.dtype)\n", discrepancy=34),
    silu("neighbours-as-halves", "order", old="gate, up = x.float().chunk(2, dim=-1)\n",
         new="gate, up = x.float()[:, 0::2], x.float()[:, 1::2]\n"),
    silu("clamped", "formula", new="return (F.silu(gate).clamp(max=10) * up).to(x.dtype)\n", discrepancy=36),
    add("onto-the-input", "mutation", new="return a.add_(b)\n", discrepancy=40),
    add("in-bfloat16", "rounding", new="return (a.bfloat16() + b.bfloat16()).to(a.dtype)\n", dtypes=("float32",),
        why="in bfloat16 it is what is asked for"),
    add("truncates", "rounding", new="""y = a.double() + b.double()
        z = y.to(a.dtype)
        return torch.where(z.double().abs() > y.abs(), torch.nextafter(z, torch.zeros_like(z)), z)\n""", dtypes=("bfloat16",),
        why="in float32 sums of most values are exact, and those of many rows that are not are planned as copies of few"),
    add("saturates", "special", new="return torch.clamp(a + b, -3e38, 3e38)\n"),
    add("nan-to-zero", "special", new="return torch.nan_to_num(a + b, nan=0.0, posinf=torch.inf, neginf=-torch.inf)\n"),
    add("into-workspace-kept", "aliasing", new="""if getattr(self, "kept", None) is None or self.kept.shape != a.shape or self.kept.dtype != a.dtype:
            self.kept = torch.empty_like(a)
        return torch.add(a, b, out=self.kept)\n"""),
    add("strides-ignored", "strides", new="return a + b.as_strided(b.shape, (b.shape[1], 1))\n", discrepancy=28),
    cast("truncates", "rounding", new="""wide = x.float().contiguous().view(torch.int32)
        if to == "bfloat16":
            return (wide & -65536).view(torch.float32).bfloat16()
        return x.to(getattr(torch, to))\n""", dtypes=("float32",), why="bfloat16 to bfloat16 rounds nothing"),
    cast("through-float16", "rounding", new="return x.half().to(getattr(torch, to))\n"),
    cast("denormals-flushed", "special", new="""y = x.to(getattr(torch, to))
        return torch.where(y.abs() < torch.finfo(y.dtype).tiny, 0, y)\n"""),
    cast("negative-zero-lost", "special", new="return x.to(getattr(torch, to)) + 0.0\n"),
    cast("saturates", "special", new="""y = getattr(torch, to)
        return x.clamp(torch.finfo(y).min, torch.finfo(y).max).to(y)\n"""),
    cast("dtype-ignored", "dtype", new="return x.clone()\n"),
    cast("same-dtype-is-the-input", "aliasing", new="return x.to(getattr(torch, to))\n", dtypes=("bfloat16",),
         why="nothing is cast from float32 to float32"),
    concat("swapped", "order", new="return torch.cat([b, a], dim=-1)\n"),
    concat("tail-unwritten", "unwritten", new="""y = self.empty((len(a), a.shape[1] + b.shape[1]), str(a.dtype)[6:])
        y[:, : a.shape[1]], y[:, a.shape[1] : -1] = a, b[:, :-1]
        return y\n"""),
    concat("through-float16", "rounding", new="return torch.cat([a, b], dim=-1).half().to(a.dtype)\n"),
    concat("denormals-flushed", "special", new="""y = torch.cat([a, b], dim=-1)
        return torch.where(y.abs() < torch.finfo(y.dtype).tiny, 0, y) if y.is_floating_point() else y\n"""),
    take("minus-one-is-the-last-row", "-1", new="return x[rows.long()]\n", discrepancy=9),
    take("minus-one-is-the-first-row", "-1", old="return torch.where(rows[:, None] >= 0, x.index_select(0, rows.clamp(min=0)), 0)\n",
         new="return x.index_select(0, rows.clamp(min=0))\n"),
    take("last-row-out-of-reach", "off by one", new="return _rows_or_zero(x, rows.clamp(max=max(len(x) - 2, 0)))\n"),
    take("nan-masked-by-zero", "special", old="return torch.where(rows[:, None] >= 0, x.index_select(0, rows.clamp(min=0)), 0)\n",
         new="return x.index_select(0, rows.clamp(min=0)) * (rows[:, None] >= 0).to(x.dtype)\n", discrepancy=29),
    take("first-rows-as-a-view", "aliasing", new="""n = min(len(x), len(rows))
        there = n == len(rows) and torch.equal(rows, torch.arange(n, dtype=rows.dtype))
        return x[:n] if there else _rows_or_zero(x, rows)\n"""),
    take("rows-in-int8", "overflow", new="return _rows_or_zero(x, rows.to(torch.int8).int())\n", discrepancy=20),
    embed("last-row-out-of-reach", "off by one", new="return F.embedding(ids.clamp(max=max(len(table.native) - 2, 0)), table.native)\n"),
    embed("ids-in-uint16", "overflow", new="return F.embedding(ids % 65536, table.native)\n", discrepancy=21),
    embed("through-float16", "rounding", new="return F.embedding(ids, table.native).half().to(table.native.dtype)\n"),
    embed("table-prepared-by-halves", "preparation", old="def plan(self, batch: Batch, into: Batch | None = None) -> Batch:\n",
          new="""def prepare(self, spec, read, into=None):
        array = self.from_numpy(read(slice(None)))
        return Weight(spec, torch.cat([array[: len(array) // 2], array[: len(array) - len(array) // 2]]))

    def plan(self, batch: Batch, into: Batch | None = None) -> Batch:\n"""),
    logs("no-maximum-taken", "overflow", new="""def log_softmax(self, logits: Tensor) -> Tensor:
        return logits.float() - torch.log(torch.exp(logits.float()).sum(-1, keepdim=True))\n""", discrepancy=25),
    logs("in-bfloat16", "rounding", new="""def log_softmax(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits.bfloat16(), dim=-1).float()\n"""),
    logs("base-2", "formula", new="""def log_softmax(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits.float(), dim=-1) / 0.6931471805599453\n"""),
    logs("last-column-dropped", "dropped", new="""def log_softmax(self, logits: Tensor) -> Tensor:
        return logits.float() - torch.logsumexp(logits.float()[:, :-1], -1, keepdim=True)\n"""),
    logs("in-the-dtype-of-the-logits", "dtype", new="""def log_softmax(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits.float(), dim=-1).to(logits.dtype)\n""",
        dtypes=("bfloat16",), why="in float32 it is the result's"),
    gather("no-maximum-taken", "overflow", new="""wide = logits.float()
        return wide.gather(1, ids[:, None].long())[:, 0] - torch.exp(wide).sum(-1).log()\n""", discrepancy=25),
    gather("id-off-by-one", "off by one",
           new="return torch.log_softmax(logits.float(), dim=-1).gather(1, (ids[:, None].long() - 1).clamp(min=0))[:, 0]\n"),
    gather("ids-in-int16", "overflow",
           new="return torch.log_softmax(logits.float(), dim=-1).gather(1, ids[:, None].long() % 65536)[:, 0]\n", discrepancy=21),
    gather("not-normalised", "formula", new="""wide = logits.float()
        return wide.gather(1, ids[:, None].long())[:, 0] - wide.amax(-1)\n"""),
    select("rows-ignored", "rows", new="Rows(*(x[: len(rows)].clone() for x in self.rows(sel)))\n"),
    select("lengths-not-taken", "rows", new="Rows(self.rows(sel)[0].index_select(0, rows), self.rows(sel)[1][: len(rows)].clone())\n"),
    select("last-column-dropped", "dropped", new="Rows(self.rows(sel)[0].index_select(0, rows), self.rows(sel)[1].index_select(0, rows))\n        picked.indices[:, -1:] = -1\n"),
]
