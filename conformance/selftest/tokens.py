"""Planted in what chooses the next token: argmax, sample, speculative_verify."""

# ruff: noqa: E501, since a snippet is quoted on one line as it stands in its source
# fmt: off
from __future__ import annotations

from functools import partial

from porthal.conformance.selftest.planting import Defect

best = partial(Defect, "argmax", old="def argmax(self, logits: Tensor) -> Tensor:\n        return first_highest(logits)\n")
sample = partial(Defect, "sample")
verify = partial(Defect, "speculative_verify")
ARGMAX = "def argmax(self, logits: Tensor) -> Tensor:\n        "
reached = "reached = cumulated / cumulated.gather(1, limit - 1) < top_p[:, None]\n"
prefix = "kept = torch.minimum((reached & within).sum(1, keepdim=True) + 1, limit)\n"
greedy = "        kept = torch.where(temperature[:, None] == 0, 1, kept)\n"
target = "target = u[:, None] * cumulated.gather(1, kept - 1)\n"
drawn = "drawn = torch.minimum((cumulated <= target).sum(1, keepdim=True), kept - 1)\n"
passed = "passed = u * (1.0 if q is None else q.gather(2, at)[..., 0]) < p.gather(2, at)[..., 0]\n"
rest = "rest = (here - left_out).clamp(min=0)\n"
inverted = "drawn = (cumulated <= u[:, n:] * cumulated[:, -1:]).sum(1, keepdim=True).clamp(max=rest.shape[1] - 1)\n"
final = "return torch.where(place < kept, drafts, torch.where(place == kept, token, -1)).to(torch.int32)"

DEFECTS = [
    best("ties-to-the-highest", "ties", new=ARGMAX + "return (logits.shape[-1] - 1 - first_highest(logits.flip(-1))).to(torch.int32)\n"),
    best("nan-is-the-highest", "special", new=ARGMAX + "return logits.argmax(-1).to(torch.int32)\n", discrepancy=6),
    best("negative-zero-is-lower", "ties", new=ARGMAX + """wide = torch.where(torch.isnan(logits), -torch.inf, logits).float().contiguous()
        bits = wide.view(torch.int32)
        return first_highest(torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).double())\n"""),
    best("last-column-dropped", "dropped", new=ARGMAX + "return first_highest(logits[:, :-1])\n"),
    best("ids-in-uint16", "overflow", new=ARGMAX + "return first_highest(logits) % 65536\n", discrepancy=21),
    best("ids-in-int64", "dtype", new=ARGMAX + "return first_highest(logits).long()\n"),
    best("compared-in-bfloat16", "rounding", new=ARGMAX + "return first_highest(logits.bfloat16())\n", dtypes=("float32",),
         why="bfloat16 logits are compared as they are"),
    sample("u-ignored", "formula", target, "target = 0.5 * cumulated.gather(1, kept - 1)\n"),
    sample("temperature-0-samples", "temperature", greedy, ""),
    sample("temperature-ignored", "temperature", "falling / _divisor(temperature)[:, None]", "falling"),
    sample("temperature-multiplies", "temperature", "falling / _divisor(temperature)[:, None]", "falling * _divisor(temperature)[:, None]"),
    sample("temperature-of-the-first-row", "rows", "falling / _divisor(temperature)[:, None]", "falling / _divisor(temperature)[:1, None]",
           discrepancy=52),
    sample("top-k-ignored", "top-k", "limit = torch.where(top_k > 0, top_k, n).long()[:, None]\n",
           "limit = torch.full_like(top_k, n).long()[:, None]\n", discrepancy=36),
    sample("top-k-off-by-one", "off by one", "limit = torch.where(top_k > 0, top_k, n).long()[:, None]\n",
           "limit = torch.where(top_k > 0, (top_k + 1).clamp(max=n), n).long()[:, None]\n"),
    sample("top-k-0-is-1", "top-k", "limit = torch.where(top_k > 0, top_k, n).long()[:, None]\n",
           "limit = top_k.clamp(min=1).long()[:, None]\n"),
    sample("top-p-ignored", "top-p", prefix, "kept = limit\n", discrepancy=36),
    sample("top-p-of-all-candidates", "top-p", reached, "reached = cumulated < top_p[:, None]\n"),
    sample("crossing-candidate-left-out", "top-p", prefix, "kept = torch.minimum((reached & within).sum(1, keepdim=True), limit).clamp(min=1)\n"),
    sample("boundary-taken-in", "top-p", reached, reached.replace("<", "<="),
           equivalent="the two differ where the probability reached equals top_p exactly, and a chip whose probabilities are "
           "off by one rounding may stand on either side of that"),
    sample("kept-mass-not-normalised", "formula", target, "target = u[:, None].clone()\n"),
    sample("off-by-one", "off by one", drawn, drawn.replace(".sum(1, keepdim=True), kept - 1)", ".sum(1, keepdim=True) + 1, kept - 1)")),
    sample("probabilities-in-bfloat16", "rounding", "dim=-1).cumsum(-1)\n        limit", "dim=-1).bfloat16().float().cumsum(-1)\n        limit"),
    sample("sum-in-bfloat16", "accumulator", "dim=-1).cumsum(-1)\n        limit", "dim=-1).cumsum(-1).bfloat16().float()\n        limit"),
    sample("in-the-order-of-ids", "order", "return order.gather(1, drawn)[:, 0].to(torch.int32)\n", "return drawn[:, 0].to(torch.int32)\n"),
    sample("ties-by-highest-id", "ties", "order = ranked(logits)\n        falling",
           "order = n - 1 - ranked(logits.flip(1))\n        falling"),
    sample("a-random-number-of-its-own", "non-determinism", target, "target = torch.rand_like(u)[:, None] * cumulated.gather(1, kept - 1)\n"),
    verify("all-drafts-accepted", "acceptance", passed, "passed = torch.ones_like(u, dtype=torch.bool)\n"),
    verify("accepted-when-equal", "acceptance", passed, passed.replace(" < ", " <= ")),
    verify("acceptance-reversed", "acceptance", passed, passed.replace(" < ", " > ")),
    verify("u-of-the-next-row", "rows", passed, passed.replace("u * (", "u.roll(-1, 1) * (")),
    verify("draft-probabilities-ignored", "optional", passed, "passed = u < p.gather(2, at)[..., 0]\n", discrepancy=36),
    verify("any-accepted-counts", "acceptance", "kept = passed.long().cumprod(1).sum(1, keepdim=True)\n", "kept = passed.long().sum(1, keepdim=True)\n"),
    verify("residual-not-taken", "residual", rest, "rest = here.clone()\n"),
    verify("residual-not-clamped", "residual", rest, "rest = here - left_out\n"),
    verify("residual-not-normalised", "residual", inverted, inverted.replace("u[:, n:] * cumulated[:, -1:]", "u[:, n:]")),
    verify("residual-reversed", "residual", rest, "rest = (left_out - here).clamp(min=0)\n"),
    verify("residual-absolute", "residual", rest, "rest = (here - left_out).abs()\n"),
    verify("temperature-0-samples", "temperature", "greedy = (temperature == 0)[:, None]\n",
           "greedy = torch.zeros_like(temperature, dtype=torch.bool)[:, None]\n"),
    verify("temperature-ignored", "temperature", "falling / _divisor(temperature)[:, None, None]", "falling"),
    verify("greedy-token-of-the-last-row", "rows", "torch.where(greedy, best.gather(1, kept), drawn)", "torch.where(greedy, best[:, -1:], drawn)"),
    verify("u-of-the-first-row-draws", "rows", inverted, inverted.replace("u[:, n:]", "u[:, :1]")),
    verify("no-token-after-the-last-draft", "off by one", final, final.replace("token, -1))", "torch.where(kept < n, token, -1), -1))")),
    verify("tail-of-zeros", "padding", final, final.replace("token, -1))", "token, 0))"), discrepancy=8),
    verify("drafts-beyond-the-token", "padding", final, final.replace("token, -1))", "token, drafts))")),
    verify("always-the-second-row's-distribution", "rows", "here = p.gather(1, row)[:, 0]\n", "here = p[:, 1]\n"),
]
