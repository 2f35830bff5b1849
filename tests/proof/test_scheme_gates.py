"""What each scheme costs the demo checkpoint on the reference, in bits per byte of source code; torch and cpu stay within 0.1 %
of the reference under the same scheme. In float32, where nothing but codes is rounded."""

from pathlib import Path

import pytest

from porthal.conformance.diff.curve import stored
from porthal.hal import bind
from porthal.model.evaluate import bits_per_token
from porthal.model.load import DEMO, load
from porthal.model.quantising import FORMATS, quantise

PROVES = ("hal", "ops", "model", "backends/cpu", "backends/reference", "backends/torch", "conformance/diff/curve.py")
TEXT = list(stored().texts["source code"].encode())[:1024]
# Bits per byte beyond those without a scheme, in thousandths, measured in November 2026 (docs/schemes.md), and as much again.
MORE = {"fp8": 4, "int8": 3, "int4": 48, "nvfp4": 5, "mxfp4": 6, "ascend-w8a8": 5, "ascend-w4a8": 28}
CACHES = {
    **{"int8_keys": 1, "int8_half_keys": 1, "fp8_keys": 1},
    **{"int8_latents": 4, "int8_tile_latents": 4, "fp8_latents": 4},
}


def bits(backend: str, directory: Path = DEMO, caches: tuple[str, ...] = ()) -> float:
    return bits_per_token(load(directory, bind(backend), caches=caches), TEXT, len(TEXT))


@pytest.fixture(scope="module")
def plain() -> float:
    return bits("reference")


def gates(plain: float, most: float, *where: object) -> None:
    theirs = bits("reference", *where)  # type: ignore[arg-type]
    assert abs(theirs - plain) <= most / 1000
    for backend in ("torch", "cpu"):
        assert bits(backend, *where) == pytest.approx(theirs, rel=1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", FORMATS)
def test_weights(scheme: str, plain: float, tmp_path: Path) -> None:
    quantise(DEMO, tmp_path, scheme)
    gates(plain, MORE[scheme], tmp_path)


@pytest.mark.parametrize("scheme", CACHES)
def test_caches(scheme: str, plain: float) -> None:
    gates(plain, CACHES[scheme], DEMO, (scheme,))


def test_a_served_combination(plain: float, tmp_path: Path) -> None:
    """As Ascend serves it: W8A8 with both caches of int8."""
    quantise(DEMO, tmp_path, "ascend-w8a8")
    gates(plain, MORE["ascend-w8a8"] + CACHES["int8_tile_latents"], tmp_path, ("int8_half_keys", "int8_tile_latents"))
