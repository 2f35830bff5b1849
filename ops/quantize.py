from porthal.hal import FLOATS, Quantised, QuantisedSpec, contract, scheme_of
from porthal.hal.numerics import Array
from porthal.hal.scheme import ACTIVATIONS, Scaled


@contract(
    "x[T, K] -> q: Quantised[T, K]",
    dtypes={"x": FLOATS},
    cost=lambda d, b: (3 * d.T * d.K, d.T * d.K * (b.x + 1)),
    independent=("T",),
    cases={"K": (6144, 12288, 2048, 128, 96, 130), "scheme": ACTIVATIONS},
    legal={"scheme": ACTIVATIONS},
    values={
        "x": (
            *("normal", "small", "large", "huge", "zeros", "integer", "outlier", "negative", "denormal", "signed"),
            *("pegged", "uneven", "halfway"),
        )
    },
)
def quantize(x: Array, *, scheme: str) -> Quantised:
    """Codes and scales of activations, each row by itself: code = x / scale, half to even, scale as `Scheme` says.

    Codes are judged at the scale that a chip gives. Where float32's errors in x / scale decide between two, either is right;
    a scale that is a power of two leaves no such place. Source: DeepSeek-V3 (groups of 128), SmoothQuant (a scale per token).
    """
    return Quantised(QuantisedSpec(x.shape, scheme), Scaled.of(scheme_of(scheme), x))
