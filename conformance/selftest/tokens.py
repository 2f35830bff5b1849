"""Planted in what chooses the next token: argmax, check_finite, sample, speculative_verify."""

# ruff: noqa: E501, since a snippet is quoted on one line as it stands in its source
# fmt: off
from __future__ import annotations

from functools import partial

from porthal.conformance.selftest.planting import Defect

best = partial(Defect, "argmax", old="def argmax(self, logits: Tensor) -> Tensor:\n        return first_highest(logits)\n")
finite = partial(Defect, "check_finite", old="(ids >= 0) & ~torch.isfinite(logits.amax(-1))")
sample = partial(Defect, "sample")
verify = partial(Defect, "speculative_verify")
ARGMAX = "def argmax(self, logits: Tensor) -> Tensor:\n        "
certain = "(temperature == 0)[:, None] | ~torch.isfinite(falling[:, :1])"
divisor = "falling / torch.where(temperature == 0, 1.0, temperature)[:, None]"
widened = "falling = comparable(logits).float().gather(1, order)\n"
limit = "limit = torch.where(top_k > 0, top_k, len(place)).long()[:, None]\n"
reached = "reached = cumulated / cumulated.gather(1, limit - 1) < top_p[:, None]\n"
prefix = "torch.minimum((reached & (place < limit)).sum(1, keepdim=True) + 1, limit)"
summed = "cumulated = shares.cumsum(-1)\n"
target = "target = u[:, None] * cumulated.gather(1, kept - 1)\n"
drawn = "drawn = torch.minimum((cumulated <= target).sum(1, keepdim=True), kept - 1)\n"
per_row = "(x.repeat_interleave(n + 1) for x in (temperature, top_k, top_p))"
cut = "shares = torch.where(torch.arange(shares.shape[1], device=u.device) < count, shares, 0.0)\n"
passed = "passed = u * (1.0 if q is None else q.gather(2, at)[..., 0]) < p.gather(2, at)[..., 0]\n"
rest = "rest = (here - left_out).clamp(min=0)\n"
inverted = "token = (cumulated <= u[:, n:] * cumulated[:, -1:]).sum(1, keepdim=True).clamp(max=rest.shape[1] - 1)\n"
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
    finite("only-nan", "special", new="(ids >= 0) & torch.isnan(logits).any(-1)"),
    finite("nan-dropped", "special", new="(ids >= 0) & ~torch.isfinite(comparable(logits).amax(-1))"),
    finite("masks-refused", "special", new="(ids >= 0) & ~torch.isfinite(logits).all(-1)"),
    finite("one-for-all-rows", "rows", new="(ids >= 0) & ~torch.isfinite(logits.amax())"),
    finite("tails-too", "padding", new="~torch.isfinite(logits.amax(-1))"),
    finite("first-column-only", "dropped", new="(ids >= 0) & ~torch.isfinite(logits[:, 0])"),
    sample("u-ignored", "formula", target, "target = 0.5 * cumulated.gather(1, kept - 1)\n"),
    sample("temperature-0-samples", "temperature", certain, "~torch.isfinite(falling[:, :1])"),
    sample("temperature-ignored", "temperature", divisor, "falling"),
    sample("temperature-multiplies", "temperature", divisor, divisor.replace("/", "*")),
    sample("temperature-of-the-first-row", "rows", divisor, divisor.replace("[:, None]", "[:1, None]"), discrepancy=52),
    sample("nan-spoils-the-row", "special", widened, "falling = logits.float().gather(1, order)\n", discrepancy=6),
    sample("top-k-ignored", "top-k", limit, "limit = torch.full_like(top_k, len(place)).long()[:, None]\n", discrepancy=36),
    sample("top-k-off-by-one", "off by one", limit, limit.replace("top_k, len(place)", "(top_k + 1).clamp(max=len(place)), len(place)")),
    sample("top-k-0-is-1", "top-k", limit, "limit = top_k.clamp(min=1).long()[:, None]\n"),
    sample("top-p-ignored", "top-p", prefix, "limit", discrepancy=36),
    sample("top-p-of-all-candidates", "top-p", reached, "reached = cumulated < top_p[:, None]\n"),
    sample("crossing-candidate-left-out", "top-p", prefix, prefix.replace(" + 1, limit)", ", limit).clamp(min=1)")),
    sample("boundary-taken-in", "top-p", reached, reached.replace("<", "<="),
           equivalent="the two differ where the probability reached equals top_p exactly, and a chip whose probabilities are "
           "off by one rounding may stand on either side of that"),
    sample("kept-mass-not-normalised", "formula", target, "target = u[:, None].clone()\n"),
    sample("off-by-one", "off by one", drawn, drawn.replace(".sum(1, keepdim=True), kept - 1)", ".sum(1, keepdim=True) + 1, kept - 1)")),
    sample("probabilities-in-bfloat16", "rounding", summed, "cumulated = shares.bfloat16().float().cumsum(-1)\n"),
    sample("sum-in-bfloat16", "accumulator", summed, "cumulated = shares.cumsum(-1).bfloat16().float()\n"),
    sample("in-the-order-of-ids", "order", "return order.gather(1, drawn)[:, 0].to(torch.int32)\n", "return drawn[:, 0].to(torch.int32)\n"),
    sample("ties-by-highest-id", "ties", "order, place = ranked(logits), ", "order, place = logits.shape[-1] - 1 - ranked(logits.flip(1)), "),
    sample("a-random-number-of-its-own", "non-determinism", target, "target = torch.rand_like(u)[:, None] * cumulated.gather(1, kept - 1)\n"),
    verify("all-drafts-accepted", "acceptance", passed, "passed = torch.ones_like(u, dtype=torch.bool)\n"),
    verify("accepted-when-equal", "acceptance", passed, passed.replace(" < ", " <= ")),
    verify("acceptance-reversed", "acceptance", passed, passed.replace(" < ", " > ")),
    verify("u-of-the-next-row", "rows", passed, passed.replace("u * (", "u.roll(-1, 1) * (")),
    verify("draft-probabilities-ignored", "optional", passed, "passed = u < p.gather(2, at)[..., 0]\n", discrepancy=36),
    verify("any-accepted-counts", "acceptance", "kept = passed[:, :n].long().cumprod(1)", "kept = passed[:, :n].long()"),
    verify("residual-not-taken", "residual", rest, "rest = here.clone()\n"),
    verify("residual-not-clamped", "residual", rest, "rest = here - left_out\n"),
    verify("residual-not-normalised", "residual", inverted, inverted.replace("u[:, n:] * cumulated[:, -1:]", "u[:, n:]")),
    verify("residual-reversed", "residual", rest, "rest = (left_out - here).clamp(min=0)\n"),
    verify("residual-absolute", "residual", rest, "rest = (here - left_out).abs()\n"),
    verify("temperature-0-samples", "temperature", certain, "~torch.isfinite(falling[:, :1])"),
    verify("temperature-ignored", "temperature", divisor, "falling"),
    verify("top-k-ignored", "top-k", per_row, per_row.replace("top_k", "torch.zeros_like(top_k)"), discrepancy=36),
    verify("top-p-ignored", "top-p", per_row, per_row.replace("top_p", "torch.ones_like(top_p)"), discrepancy=36),
    verify("top-p-of-another-request", "rows", per_row, per_row.replace("top_p", "top_p.roll(1)")),
    verify("dropped-candidates-stay", "top-p", cut, "pass\n"),
    verify("kept-mass-not-normalised", "formula", "shares / cumulated.gather(1, count - 1)", "shares"),
    verify("not-finite-is-sampled", "special", certain, "(temperature == 0)[:, None]"),
    verify("nan-spoils-the-row", "special", widened, "falling = logits.float().gather(1, order)\n", discrepancy=6),
    verify("u-of-the-first-row-draws", "rows", inverted, inverted.replace("u[:, n:]", "u[:, :1]")),
    verify("no-token-after-the-last-draft", "off by one", final, final.replace("token, -1))", "torch.where(kept < n, token, -1), -1))")),
    verify("tail-of-zeros", "padding", final, final.replace("token, -1))", "token, 0))"), discrepancy=8),
    verify("drafts-beyond-the-token", "padding", final, final.replace("token, -1))", "token, drafts))")),
    verify("always-the-second-row's-distribution", "rows", "here = p.gather(1, row)[:, 0]\n", "here = p[:, 1]\n"),
]
