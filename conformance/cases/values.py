"""Value generators: what numbers a case is made of, each defined once, bit for bit the same on every machine.

The code calls them recipes. A token has one word for each, which never changes; some functions have a longer name.

Every number comes from 64-bit words of a counter hash in integer arithmetic; the only float operations are those that
IEEE 754 defines exactly, so no platform's libm changes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
BLOCK = 2**14  # words made at a time: they stay in a core's cache
# SplitMix64: the step of its counter, multiples of it, and how it mixes the bits; arrays are faster than NumPy's scalars.
STEP, LAST, BITS_21, LOW_21 = (np.array(n, np.uint64) for n in (0x9E3779B97F4A7C15, 31, 21, 2**21 - 1))
COUNTED = np.arange(1, BLOCK + 1, dtype=np.uint64) * STEP
MIXED = [tuple(np.array(n, np.uint64) for n in m) for m in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))]


@dataclass(frozen=True)
class Draw:
    """A request for values: a key that names the stream, the shape, the dtype they will be rounded to, and the sizes
    (dims, attributes and, for integers, `low` and `high`) that the generator may need."""

    key: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    sizes: Mapping[str, Any] = field(default_factory=dict)

    def words(self, part: str = "") -> Array:
        """uint64 of the draw's shape: SplitMix64 over a counter that starts at the hash of the key."""
        out = np.empty(prod(self.shape), np.uint64)
        for at, z in self._words(part):
            out[at] = z
        return out.reshape(self.shape)

    def _words(self, part: str) -> Iterator[tuple[slice, Array]]:
        """The words in blocks, each with its place."""
        start = np.frombuffer(hashlib.sha256(f"{self.key}/{part}".encode()).digest()[:8], "<u8")
        n = prod(self.shape)
        room = np.empty((2, min(n, BLOCK)), np.uint64)
        for first in range(0, n, BLOCK):
            z, high = room[:, : n - first]
            np.add(COUNTED[: len(z)], start + STEP * np.uint64(first), out=z)
            for shift, factor in MIXED:
                np.right_shift(z, shift, out=high)
                z ^= high
                z *= factor
            np.right_shift(z, LAST, out=high)
            z ^= high
            yield slice(first, first + len(z)), z

    def integers(self, low: int, high: int, part: str = "") -> Array:
        """int64 in [low, high)."""
        return (self.words(part) >> np.uint64(11)).astype(np.int64) % (high - low) + low

    def bell(self) -> Array:
        """float64, mean 0, variance 1, within +-3: the sum of three uniform 21-bit integers, scaled by a power of two."""
        out = np.empty(prod(self.shape))
        for at, word in self._words(""):
            three, made = word & LOW_21, out[at]
            for _ in range(2):
                word >>= BITS_21
                three += word & LOW_21
            np.copyto(made, three.view(np.int64))
            made *= 2.0**-20
            made -= 3 * (2**21 - 1) * 2.0**-21
        return out.reshape(self.shape)

    def order(self, n: int, first: int | None = None) -> Array:
        """A permutation of n numbers, or the first so many of it."""
        words = Draw(self.key, (n,)).words("order")
        if first is None or not 0 < first < n // 4:
            return np.argsort(words, kind="stable")[:first]
        least = np.flatnonzero(words <= np.partition(words, first - 1)[first - 1])
        return least[np.argsort(words[least], kind="stable")][:first]


Generator = Callable[[Draw], Array]
RECIPES: dict[str, Generator] = {}  # by the word in tokens
# With these, exactly equal scores are equal by construction, so the order of ties can be judged.
TIED = ("integer", "ties", "equal", "zeros", "signed")


# Generators of any floats, and of integers those that may replace a default.
FLOATING = ("normal", "small", "large", "zeros", "equal", "ties", "integer", "negative", "outlier", "offset", "comb",
            "denormal", "special", "masked", "weight", "below", "abyss", "blocked", "shelves", "rising", "summit", "cancel",
            "surge", "level", "seesaw", "pillar", "hollow", "extreme", "tiers",
            "sinking", "faint", "rim", "rear", "crest", "halved", "lean", "verge", "vault",
            "pegged", "uneven", "vast", "slight", "halfway", "dim")  # fmt: skip
# Of these, values that every op takes: larger ones may overflow where a contract permits rounding to float16.
ANY_OP = ("zeros", "equal", "denormal")
RELATED = {
    "routed": ("crowded", "nowhere", "deserted", "holes", "away", "repeated", "wild", "eldest", "central", "even", "ragged"),
    "counts": ("zeros", "skewed", "heap", "waist", "single", "tiled"),
    "permutation": ("nowhere", "gaps"),
    "index": ("ascending",),
    "uniform": ("edges", "zeros", "refused", "stopped"),
    "temperature": ("cold", "hot", "greedy"),
    "probability": ("zeros", "brink"),
    "top_k": ("zeros", "brim"),
}


def recipe(f: Generator) -> Generator:
    return spelled(f.__name__)(f)


def spelled(word: str) -> Callable[[Generator], Generator]:
    """Enter a generator under its word in tokens."""

    def enter(f: Generator) -> Generator:
        RECIPES[word] = f
        return f

    return enter


# -- floats ----------------------------------------------------------------------------------------------------------


@recipe
def normal(draw: Draw) -> Array:
    return draw.bell()


@recipe
def small(draw: Draw) -> Array:
    """Squares far below the usual eps."""
    return draw.bell() * 2.0**-10


@recipe
def large(draw: Draw) -> Array:
    """Squares beyond float16's range."""
    return draw.bell() * 2.0**8


@recipe
def huge(draw: Draw) -> Array:
    """Beyond float16's range, or near its end in float16 itself."""
    return draw.bell() * 2.0 ** (12 if draw.dtype == "float16" else 20)


@recipe
def vault(draw: Draw) -> Array:
    """Up to three quarters of float16's largest number: sums, and products with more than 1, leave its range."""
    return draw.bell() * 2.0**14


@recipe
def zeros(draw: Draw) -> Array:
    return np.zeros(draw.shape)


@recipe
def equal(draw: Draw) -> Array:
    return np.full(draw.shape, 0.5)


@recipe
def ties(draw: Draw) -> Array:
    """Five different values."""
    return draw.integers(-2, 3) * 0.5


@recipe
def integer(draw: Draw) -> Array:
    """Small integers, whose products and sums float32 holds exactly."""
    return draw.integers(-4, 5).astype(np.float64)


@recipe
def negative(draw: Draw) -> Array:
    return -np.abs(draw.bell()) - 2.0**-6


@spelled("below")
def far_below_zero(draw: Draw) -> Array:
    """So far below zero that adding a probability leaves it negative."""
    return -np.abs(draw.bell()) - 2


@spelled("sunk")
def sigmoid_underflow(draw: Draw) -> Array:
    """Where a sigmoid is near 1e-20, and a sum of them as well."""
    return draw.bell() * 2 - 46


@spelled("signed")
def signed_zeros(draw: Draw) -> Array:
    """Zeros of both signs, and -1: the zeros are equal."""
    return np.array([-0.0, 0.0, -1.0])[draw.integers(0, 3)]


@spelled("abyss")
def most_negative(draw: Draw) -> Array:
    """From -2^13 to the most negative numbers of the dtype, every exponent equally likely."""
    return -(1 + draw.integers(0, 2**7, "digits") * 2.0**-7) * 2.0 ** draw.integers(13, 16 if draw.dtype == "float16" else 128)


@recipe
def outlier(draw: Draw) -> Array:
    """One element of each row is 256 times the others."""
    x = draw.bell()
    if x.size:
        rows = x.reshape(-1, x.shape[-1])
        rows[np.arange(len(rows)), np.arange(len(rows)) * 7 % x.shape[-1]] *= 256
    return x


@recipe
def offset(draw: Draw) -> Array:
    """A mean far above the deviation, as far as the dtype resolves it."""
    return 64 + draw.bell() * (1 if draw.dtype == "bfloat16" else 2.0**-4)


@spelled("comb")
def every_eighth_high(draw: Draw) -> Array:
    """Every eighth element is far above the others: a strided sample sees only these."""
    x = draw.bell()
    x[..., ::8] += 8
    return x


@recipe
def plateau(draw: Draw) -> Array:
    """64, except for one element of each row, which is a step higher."""
    x = np.full(draw.shape, 64.0)
    if x.size:
        rows = x.reshape(-1, x.shape[-1])
        rows[np.arange(len(rows)), np.arange(len(rows)) * 7 % x.shape[-1]] += 0.5 if draw.dtype == "bfloat16" else 2.0**-4
    return x


@recipe
def denormal(draw: Draw) -> Array:
    return draw.bell() * (2.0**-18 if draw.dtype == "float16" else 2.0**-130)


@recipe
def special(draw: Draw) -> Array:
    """Rows in turn: finite, with one NaN, with +inf, with -inf, all NaN; a negative zero in each finite one."""
    x = draw.bell()
    if x.size:
        rows = x.reshape(-1, x.shape[-1])
        at = Draw(draw.key, (len(rows),)).integers(0, x.shape[-1], "at")
        for r, column in enumerate(at):
            rows[r, column] = (-0.0, np.nan, np.inf, -np.inf, np.nan)[r % 5]
            if r % 5 == 4:
                rows[r] = np.nan
    return x


@recipe
def masked(draw: Draw) -> Array:
    """Three of four are -inf, but never a whole row: what a grammar leaves of the logits."""
    x = draw.bell()
    if x.size:
        rows = x.reshape(-1, x.shape[-1])
        out = draw.integers(0, 4, "out").reshape(rows.shape) > 0
        out[np.arange(len(rows)), np.arange(len(rows)) * 7 % x.shape[-1]] = False
        rows[out] = -np.inf
    return x


@recipe
def weight(draw: Draw) -> Array:
    """Near 1 / sqrt(K) for K inputs, so that products keep the scale of what they multiply."""
    return draw.bell() * 2.0 ** -((max(draw.shape[-1], 1).bit_length()) // 2)


@recipe
def uniform(draw: Draw) -> Array:
    """[0, 1) in steps of 2^-24."""
    return draw.integers(0, 2**24) * 2.0**-24


@recipe
def edges(draw: Draw) -> Array:
    """The ends of [0, 1)."""
    return np.array([0.0, 1 - 2.0**-24])[draw.integers(0, 2)]


@recipe
def temperature(draw: Draw) -> Array:
    return np.array([0.0, 0.5, 1.0, 1.5])[draw.integers(0, 4)]


@spelled("cold")
def near_zero_temperature(draw: Draw) -> Array:
    """Temperatures so low that logit / temperature leaves float16's range."""
    return np.array([0.0, 1e-5, 1e-3, 1e-2])[draw.integers(0, 4)]


@recipe
def probability(draw: Draw) -> Array:
    return np.array([1.0, 0.9, 0.5, 0.0625])[draw.integers(0, 4)]


@recipe
def nucleus(draw: Draw) -> Array:
    """What GLM-5's generation_config.json has for top_p."""
    return np.full(draw.shape, 0.95)


@recipe
def distribution(draw: Draw) -> Array:
    """Rows that sum to 1."""
    x = draw.integers(0, 256).astype(np.float64)
    return x / np.maximum(x.sum(-1, keepdims=True), 1)


# -- integers --------------------------------------------------------------------------------------------------------


@recipe
def index(draw: Draw) -> Array:
    """Anywhere in the operand's range, including its first and last value."""
    x = draw.integers(draw.sizes["low"], draw.sizes["high"])
    if x.size:
        x.flat[-1], x.flat[0] = draw.sizes["low"], draw.sizes["high"] - 1
    return x


@recipe
def ascending(draw: Draw) -> Array:
    """0, 1, 2, ... as far as the range goes, and again from 0: some kernels skip the copy then."""
    high = draw.sizes["high"]
    return np.arange(prod(draw.shape)).reshape(draw.shape) % high if high > 0 else np.full(draw.shape, draw.sizes["low"])


@recipe
def wide(draw: Draw) -> Array:
    """All of int32."""
    return draw.integers(-(2**31), 2**31)


@recipe
def top_k(draw: Draw) -> Array:
    V = draw.sizes["V"]
    return np.minimum(np.array([0, 1, 2, V // 2, V])[draw.integers(0, 5)], V)


@recipe
def pages(draw: Draw) -> Array:
    """Distinct pages."""
    return draw.order(draw.sizes["P"])[: draw.shape[0]]


@recipe
def lone(draw: Draw) -> Array:
    """One page, as often as there are places."""
    return np.full(draw.shape, draw.order(draw.sizes["P"])[0])


@recipe
def permutation(draw: Draw) -> Array:
    """Every row once in any order, the last eighth of the places empty (-1)."""
    n = draw.shape[0]
    order = draw.order(n)
    order[n - n // 8 :] = -1
    return order


@recipe
def gaps(draw: Draw) -> Array:
    """Every row at most once in any order; the first place, the last and some between are empty (-1)."""
    order = draw.order(draw.shape[0])
    order[draw.integers(0, 4, "empty") == 0] = -1
    order[:1] = order[-1:] = -1
    return order


@recipe
def nowhere(draw: Draw) -> Array:
    return np.full(draw.shape, -1)


@recipe
def counts(draw: Draw) -> Array:
    """Rows per expert: uneven, every third expert without any, an eighth of the rows beyond all of them."""
    E, M = draw.shape[0], draw.sizes["M"]
    busy = np.arange(E) % 3 != 1
    cuts = np.sort(draw.integers(0, M - M // 8 + 1, "cuts")[busy])
    cuts[-1:] = M - M // 8
    out = np.zeros(E, np.int64)
    out[busy] = np.diff(cuts, prepend=0)
    return out


@recipe
def skewed(draw: Draw) -> Array:
    """All rows belong to the last expert."""
    out = np.zeros(draw.shape, np.int64)
    out[-1:] = draw.sizes["M"]
    return out


def _experts(draw: Draw, choose_from: Array) -> Array:
    """Distinct in each row where there are enough of them."""
    k, pool = draw.shape[-1], len(choose_from)
    order = np.argsort(Draw(draw.key, (*draw.shape[:-1], max(pool, k))).words(), axis=-1, kind="stable")
    return choose_from[order[..., :k] % pool] + draw.sizes.get("first_expert", 0)


@recipe
def routed(draw: Draw) -> Array:
    return _experts(draw, np.arange(draw.sizes["E"]))


@spelled("crowded")
def one_expert(draw: Draw) -> Array:
    """All rows go to the last expert only."""
    ids = np.full(draw.shape, -1, np.int64)
    ids[np.arange(len(ids)), np.arange(len(ids)) % ids.shape[1]] = draw.sizes["E"] - 1 + draw.sizes.get("first_expert", 0)
    return ids


@spelled("deserted")
def idle_experts(draw: Draw) -> Array:
    """Only every second expert has rows."""
    return _experts(draw, np.arange(0, draw.sizes["E"], 2))


@spelled("holes")
def ids_missing(draw: Draw) -> Array:
    """A third of the ids are -1; some rows have nothing else."""
    ids = routed(draw)
    ids[draw.integers(0, 3, "holes") == 0] = -1
    ids[::5] = -1
    return ids


@spelled("away")
def ids_of_other_ranks(draw: Draw) -> Array:
    """Ids on both sides of the local experts."""
    below = min(draw.sizes.get("first_expert", 0), 64)
    return _experts(draw, np.arange(-below, 2 * draw.sizes["E"]))


@recipe
def repeated(draw: Draw) -> Array:
    """One expert per row, as often as the row has places."""
    return np.broadcast_to(routed(draw)[..., :1], draw.shape)


@spelled("wild")
def ids_out_of_range(draw: Draw) -> Array:
    """Every second id is as far out as int32 goes."""
    ids = routed(draw)
    far = np.array([-(2**31), 2**31 - 1, -2, 2**24])[draw.integers(0, 4, "far")]
    return np.where(draw.integers(0, 2, "wild") == 0, ids, far)
