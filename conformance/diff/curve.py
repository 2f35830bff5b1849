"""What the demo checkpoint makes of two texts, and how many of its drafts it accepts: against the reference's stored curve.

`python -m porthal.conformance.diff.curve` writes the stored one anew, of the same texts, after the checkpoint or its
arithmetic has changed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from statistics import fmean, median

from porthal.hal import bind
from porthal.model.evaluate import logprobs
from porthal.model.generate import generate
from porthal.model.glm5 import Glm5
from porthal.model.load import DEMO, load

FILE = DEMO / "curve.json"
HONEST = ("reference", "cpu", "torch")  # whose bfloat16 shows how far rounding goes
MARGIN, TYPICAL = 4, 2  # times as far, from which on it is no rounding any more: where it is worst, and as a rule
STRETCH = 64  # bytes of which a mean is taken
DRAFTS, PROMPTS, NEW = 3, 8, 48
CODED, TURNED = 8, 3  # under schemes, where rounding turns codes: times as far a byte may be off as a rule, and drafts
LEAST = 0.05  # by how much the accepted drafts may differ, where rounding has changed none: there are some hundred steps
DTYPE = "bfloat16"


@dataclass(frozen=True)
class Curve:
    """bits      of each text, -log2 of the probability of each byte but the first
    accepted  of steps with drafts, in how many the first 1, 2, ... of them were accepted"""

    bits: Mapping[str, Sequence[float]]
    accepted: Sequence[float]


@dataclass(frozen=True)
class Stored:
    """The reference's curve in float32, and what rounding to bfloat16 explains: of a byte as a rule, which is the median, of
    the mean over the worst stretch, where it has turned a choice, and of the accepted drafts."""

    texts: Mapping[str, str]
    curve: Curve
    typical: Mapping[str, float]
    stretch: Mapping[str, float]
    accepted: float


@dataclass(frozen=True)
class Probe:
    """One thing that was looked at, whether it is as it must be, and the figures."""

    name: str
    holds: bool
    words: str


@cache
def stored() -> Stored:
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    return Stored(**kept | {"curve": Curve(**kept["curve"])})


def measure(model: Glm5, texts: Mapping[str, str]) -> Curve:
    """The same of a model. NotFinite where what it computes is not."""
    encoded = {name: list(text.encode())[: model.config.max_position_embeddings] for name, text in texts.items()}
    bits = {name: [-x / math.log(2) for x in logprobs(model, ids, len(ids))] for name, ids in encoded.items()}
    first = next(iter(encoded.values()))
    prompts = [first[: (len(first) - NEW) * n // PROMPTS] for n in range(1, PROMPTS + 1)]
    steps: list[int] = []
    generate(model, prompts, NEW, speculative=DRAFTS, on_tokens=lambda _, ids: steps.append(len(ids)))
    drafted = steps[len(prompts) :]  # the first token of each comes of its prompt
    return Curve(bits, [fmean(n > k for n in drafted) for k in range(1, DRAFTS + 1)])


def probes(found: Curve, known: Stored, coded: Curve | None = None) -> Iterator[Probe]:
    """Each part of a curve beside the stored one; under schemes beside the reference's under the same, `coded`."""
    right, wider, some = (coded, CODED, TURNED * known.accepted) if coded else (known.curve, 1, known.accepted)
    for text, plain in known.curve.bits.items():
        bits, most = right.bits[text], wider * known.typical[text]
        typical, stretch = _apart(found.bits[text], bits)
        beside = f" ({fmean(plain):.4f} without schemes)" if coded else ""
        words = (
            f"{fmean(found.bits[text]):.4f} bits per byte, the reference {fmean(bits):.4f}{beside}; a byte is off by "
            f"{typical:.2g} of at most {most:.2g}, the worst {STRETCH} by {stretch:.2g} of at most {known.stretch[text]:.2g}"
        )
        yield Probe(text, typical <= most and stretch <= known.stretch[text], words)
    off = _off(found.accepted, right.accepted)
    mine, theirs, plainly = (_shares(each.accepted) for each in (found, right, known.curve))
    beside = f" ({plainly} without schemes)" if coded else ""
    words = f"of {DRAFTS} drafts accepted {mine}, the reference's {theirs}{beside}: off by {off:.2g} of at most {some:.2g}"
    yield Probe("MTP", off <= some, words)


def _shares(accepted: Sequence[float]) -> str:
    return ", ".join(f"{share:.0%}" for share in accepted)


def _apart(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """How far apart they are: a byte as a rule, and the mean over the worst stretch."""
    off = [a - b for a, b in zip(mine, theirs)]
    return median(map(abs, off)), max(abs(fmean(off[at : at + STRETCH])) for at in range(0, len(off), STRETCH))


def _off(mine: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(mine, theirs))


def made(texts: Mapping[str, str]) -> Stored:
    """What is stored, computed."""
    curve = measure(load(DEMO, bind("reference"), dtype="float32"), texts)
    honest = [measure(load(DEMO, bind(name), dtype=DTYPE), texts) for name in HONEST]
    apart = {text: [_apart(each.bits[text], curve.bits[text]) for each in honest] for text in texts}
    return Stored(
        texts,
        Curve({text: [round(b, 4) for b in bits] for text, bits in curve.bits.items()}, curve.accepted),
        {text: TYPICAL * max(typical for typical, _ in found) for text, found in apart.items()},
        {text: MARGIN * max(stretch for _, stretch in found) for text, found in apart.items()},
        max(LEAST, MARGIN * max(_off(each.accepted, curve.accepted) for each in honest)),
    )


if __name__ == "__main__":
    result = made(stored().texts)
    FILE.write_text(json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
