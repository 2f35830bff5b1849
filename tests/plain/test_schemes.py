"""Schemes of few bits: their codes and scales by hand, what a chip may choose, and cache rows as vendors pack them."""

import re
from pathlib import Path

import numpy as np
import pytest

import porthal
from porthal.conformance import run
from porthal.conformance.report.schemes import head, page
from porthal.hal import (
    SCHEMES,
    PagesSpec,
    Quantised,
    UsageError,
    Weight,
    WeightSpec,
    contracts,
    limits,
    one_of,
    scheme_of,
)
from porthal.hal.layouts import ASCEND, DEEPGEMM, FLASHMLA
from porthal.hal.operands import Pages
from porthal.hal.scheme import KEYS, LATENTS, WEIGHTS, Scaled

ml_dtypes = pytest.importorskip("ml_dtypes")


def drawn(*shape):
    return np.random.default_rng(0).normal(size=shape)


@pytest.mark.parametrize("name", SCHEMES)
def test_form_says_what_quantising_gives(name):
    scheme, x = scheme_of(name), drawn(300, 576)
    parts = scheme.quantised(x)
    assert {n: (p.shape, str(p.dtype)) for n, p in parts.items()} == scheme.form(x.shape)
    assert scheme.misfit(x, parts, np.zeros(x.shape)) is None


def test_a_ragged_last_block_has_a_row_of_scales():
    assert scheme_of("fp8_block").form((576, 6144))["scale"] == ((5, 48), "float32")
    assert scheme_of("fp8_block").form((2624, 6144))["scale"] == ((21, 48), "float32")  # q_a and kv_a merged


def test_int8_by_hand():
    parts = scheme_of("int8_token").quantised(np.array([[127.0, -127, 0.5, 1.5, -2.5, 0], [0, 0, 0, 0, 0, 0]]))
    assert parts["codes"].tolist() == [[127, -127, 0, 2, -2, 0], [0] * 6]
    assert parts["scale"].tolist() == [[1.0], [1.0]]


def test_e4m3_codes_are_those_of_the_format():
    scheme = scheme_of("fp8_group")
    x = np.array([[448.0, -448, 0.001953125, -0.0, 464, 1e9, 1.0625, 1.1875]])
    assert scheme.coded(x).tolist() == [[0x7E, 0xFE, 0x01, 0x80, 0x7E, 0x7E, 0x38, 0x3A]]  # 1.0625 and 1.1875 are ties
    every = np.arange(256, dtype=np.uint8)
    said = every.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert np.array_equal(scheme.decoded(every), said, equal_nan=True)
    assert np.array_equal(scheme.coded(said[~np.isnan(said)]), every[~np.isnan(said)])


def test_e2m1_ties_go_to_even():
    scheme = scheme_of("mxfp4")
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7, -0.25, -5])
    assert scheme.coded(ties).tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 8, 14]
    assert scheme.decoded(np.arange(16)).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


def test_e8m0_follows_the_floor_rule():
    """As OCP says: 7.5 saturates to 6, where other packers would double the scale."""
    scheme = scheme_of("mxfp4")
    x = np.concatenate([np.full((1, 32), v) for v in (7.5, 8.0, 0.0, 2.0**-140)], axis=1)
    parts = scheme.quantised(x)
    assert parts["scale"].tolist() == [[127, 128, 0, 0]]
    assert scheme.numbers(parts)[0, ::32].tolist() == [6.0, 8.0, 0.0, 0.0]


def test_nvfp4_has_two_scales():
    blocks = [np.full((1, 16), v) for v in (6 * 448.0, 6.0, 0.0)]
    parts = scheme_of("nvfp4").quantised(np.concatenate(blocks, axis=1))
    assert parts["whole"].tolist() == [1.0]
    assert parts["scale"].view(ml_dtypes.float8_e4m3fn).astype(float).tolist() == [[448.0, 1.0, 2.0**-9]]


@pytest.mark.parametrize("name", SCHEMES)
def test_another_code_scale_or_block_is_found(name):
    scheme, x = scheme_of(name), drawn(130, 256)
    right = scheme.quantised(x)
    for part in right:
        wrong = {n: p.copy() for n, p in right.items()}
        if part == "codes":
            wrong["codes"][3, 5] ^= 3
        elif wrong[part].dtype == np.uint8:
            wrong[part].flat[0] += 1
        else:
            wrong[part].flat[0] *= 1.01
        found = scheme.misfit(x, wrong, np.zeros(x.shape))
        assert found, part
        assert found[0] in (part, "codes")


def test_either_code_at_a_boundary_where_the_scale_is_no_power_of_two():
    scheme = scheme_of("int8_token")
    scale = np.float32(0.1)
    x = np.array([[127 * float(scale), 10.5 * float(scale)]])
    for code in (10, 11):
        parts = {"codes": np.array([[127, code]], np.int8), "scale": np.array([[scale]])}
        assert scheme.misfit(x, parts, np.zeros(x.shape)) is None
    x, parts = np.array([[127.0, 10.5]]), {"codes": np.array([[127, 11]], np.int8), "scale": np.ones((1, 1), np.float32)}
    wrong = scheme.misfit(x, parts, np.zeros(x.shape))
    assert wrong == ("codes", (0, 1), "says 11 for 10.5, expected 10")


def test_a_judge_of_codes_knows_no_more_slack_than_float32():
    scheme, scale = scheme_of("int8_token"), np.float32(0.1)
    x = np.array([[127 * float(scale), 10.502 * float(scale)]])
    parts = {"codes": np.array([[127, 10]], np.int8), "scale": np.array([[scale]])}
    assert scheme.misfit(x, parts, np.zeros(x.shape)) == ("codes", (0, 1), "says 10 for 10.502, expected 11")
    off = {"codes": np.array([[127, 11]], np.int8), "scale": np.array([[scale * np.float32(1 + 1e-5)]])}
    assert scheme.misfit(x, off, np.zeros(x.shape))[0] == "scale"


def test_scales_of_half_precision_are_off_by_half_a_step_at_most():
    scheme, x = scheme_of("int8_half_keys"), np.full((1, 8), 2.0**-10)
    parts = scheme.quantised(x)
    assert scheme.misfit(x, parts, np.zeros(x.shape)) is None
    parts["scale"] = parts["scale"] + np.float16(2.0**-22)
    assert scheme.misfit(x, parts, np.zeros(x.shape))[0] == "scale"


@pytest.mark.parametrize("name", ["int8_token", "fp8_group", "int8_half_keys"])
def test_zeros_have_any_scale_that_is_a_number(name):
    scheme, x = scheme_of(name), np.zeros((1, 128))
    parts = scheme.quantised(x)
    for scale, good in ((0, True), (3, True), (np.nan, False), (np.inf, False)):
        parts["scale"] = np.full_like(parts["scale"], scale)
        assert (scheme.misfit(x, parts, x) is None) is good, scale


def test_codes_of_small_numbers_are_judged():
    scheme, x = scheme_of("fp8_group"), drawn(4, 256) * 1e-4
    parts = scheme.quantised(x)
    assert scheme.misfit(x, parts, np.zeros(x.shape)) is None
    parts["codes"][2, 7] ^= 16
    assert scheme.misfit(x, parts, np.zeros(x.shape))[:2] == ("codes", (2, 7))


def test_a_chip_that_flushes_reads_small_scales_as_zero():
    held = Scaled(scheme_of("int8_token"), {"codes": np.ones((2, 3), np.int8), "scale": np.array([[2.0**-130], [0.5]], "f4")})
    assert held.flushed(2.0**-126).numbers.tolist() == [[0] * 3, [0.5] * 3]
    assert held.flushed(2.0**-140) is held


def test_the_table_of_schemes():
    """codes, block, scale, and in which scheme a product takes its other operand."""
    assert {s.name: (s.codes, s.block, s.scale, s.other) for s in SCHEMES.values()} == {
        "int8_channel": ("int8", (1, 0), "float32", "int8_token"),
        "fp8_block": ("float8_e4m3fn", (128, 128), "float32", "fp8_group"),
        "int4_g128": ("int4", (1, 128), "float32", ""),
        "int4_g32": ("int4", (1, 32), "float32", ""),
        "mxfp4": ("float4_e2m1fn", (1, 32), "float8_e8m0fnu", ""),
        "nvfp4": ("float4_e2m1fn", (1, 16), "float8_e4m3fn", ""),
        "int8_token": ("int8", (1, 0), "float32", ""),
        "fp8_group": ("float8_e4m3fn", (1, 128), "float32", ""),
        "int8_keys": ("int8", (1, 0), "float32", "int8_token"),
        "int8_half_keys": ("int8", (1, 0), "float16", "int8_token"),
        "fp8_keys": ("float8_e4m3fn", (1, 0), "float32", "fp8_group"),
        "int8_latents": ("int8", (1, 0), "float32", ""),
        "int8_tile_latents": ("int8", (1, 128), "float32", ""),
        "fp8_latents": ("float8_e4m3fn", (1, 128), "float32", ""),
    }


def test_what_is_written_is_quantised_and_what_is_copied_is_not():
    held = Scaled.of(scheme_of("fp8_latents"), drawn(4, 256)).copy()
    held[np.array([1])] = held[np.array([2])]
    assert held.asked is None
    assert np.array_equal(held.parts["codes"][1], held.parts["codes"][2])
    row = drawn(1, 256)
    held[np.array([0])] = row
    assert held.asked is not None
    assert np.array_equal(held.asked[:1], row)


@pytest.mark.parametrize("name", WEIGHTS)
def test_reference_multiplies_by_what_the_parts_say(name):
    ops, scheme = porthal.bind("reference"), scheme_of(name)
    parts, x = scheme.quantised(drawn(300, 576)), drawn(5, 576).astype(np.float32)
    w = ops.prepare(WeightSpec("linear", "w", (300, 576), "float32", name), lambda rows: {n: p[rows] for n, p in parts.items()})
    taken = scheme_of(scheme.other).rounded(x.astype(float)) if scheme.other else x.astype(float)
    assert np.allclose(ops.linear(x, w), taken @ scheme.numbers(parts).T, rtol=1e-6, atol=1e-4)
    assert all(np.array_equal(p, parts[n]) for n, p in ops.to_logical(w).items())


def test_an_unknown_scheme_is_named():
    with pytest.raises(UsageError, match="scheme is 'int3', expected none or one of int8_channel"):
        scheme_of("int3")
    ops = porthal.bind("reference", check=True)
    w = Weight(WeightSpec("linear", "w", (8, 8), "float32", "int8_keys"), {})
    with pytest.raises(UsageError, match="linear: w is under scheme 'int8_keys', expected none or int8_channel"):
        ops.linear(np.zeros((1, 8), np.float32), w)


def test_a_kernel_without_schemes_refuses_and_names_it():
    @limits(provider="plain", schemes=one_of("none", "fp8_block"))
    def linear():
        pass

    spec = porthal.hal.CallSpec({}, {"x": "float32"}, {}, {"w": "nvfp4"})
    assert linear.limits.refuses(spec) == "quantisation scheme of w is 'nvfp4', the kernel takes one of none, fp8_block"
    assert linear.limits.refuses(porthal.hal.CallSpec({}, {}, {}, {"w": "fp8_block"})) is None


def test_the_page_states_the_table_and_has_a_row_for_each_op():
    text = (Path(__file__).parents[2] / "docs" / "schemes.md").read_text()
    assert text.startswith(head())
    rows = {(op, name) for op, name in re.findall(r"^\| (\w+) \| `(\w+)` \|", text, re.M)}
    taken = {(op, name) for op, c in contracts().items() for names in c.schemes.values() for name in names}
    assert rows == taken | {("quantize", name) for name in contracts()["quantize"].cases["scheme"]}


def test_a_page_of_a_report_tells_whose_kernel_and_the_worst_error():
    report = run("reference", ["dequantize"], isolate=False)
    rows = {m[1]: int(m[2]) for m in re.finditer(r"\| dequantize \| `(\w+)` \| own, (\d+) passed[\d., ]* \|", page([report]))}
    judged = [r.token for r in report.results if r.status != "refusal"]
    assert rows["fp8_group"] == sum("q%fp8_group" in token for token in judged) > 0
    first = [token for token in judged if "%" not in token or "q%int8_token" in token]
    assert rows["int8_token"] == len(first) > 0


# -- packed rows -----------------------------------------------------------------------------------------------------


def latents(scheme="fp8_latents"):
    return PagesSpec((("c", 512), ("kp", 64)), "bfloat16", 2, 4, scheme)


def test_flashmla_row_by_hand():
    row = np.zeros((8, 656), np.uint8)
    row[3, :512] = np.arange(512) % 126
    row[3, 512:528] = np.frombuffer(np.array([0.5, 0.1, 3.0, 7e-3], "<f4").tobytes(), np.uint8)
    row[3, 528:] = np.frombuffer((np.arange(64) + 0x3F80).astype("<u2").tobytes(), np.uint8)
    parts = FLASHMLA.apart(latents(), row)
    assert parts["c"][3].tolist() == (np.arange(512) % 126).tolist()
    assert parts["c_scale"][3].tolist() == [0.5, np.float32(0.1), 3.0, np.float32(7e-3)]
    assert parts["kp"].dtype == ml_dtypes.bfloat16
    assert parts["kp"][3].view(np.uint16).tolist() == (np.arange(64) + 0x3F80).tolist()
    assert np.array_equal(FLASHMLA.together(latents(), parts), row)


def test_ascend_row_has_its_scales_last():
    row = np.zeros((8, 656), np.uint8)
    row[5, 640:656] = np.frombuffer(np.array([1, 2, 3, 4], "<f4").tobytes(), np.uint8)
    row[5, 512:514] = (0x80, 0x3F)
    parts = ASCEND.apart(latents(), row)
    assert parts["c_scale"][5].tolist() == [1, 2, 3, 4]
    assert float(parts["kp"][5, 0]) == 1.0
    assert np.array_equal(ASCEND.together(latents(), parts), row)


def test_deepgemm_page_has_its_keys_first():
    spec = PagesSpec((("k", 128),), "bfloat16", 2, 64, "fp8_keys")
    page = np.zeros((2, 64 * 132), np.uint8)
    page[1, 3 * 128 : 4 * 128] = 0x38  # slot 3 of page 1
    page[1, 64 * 128 + 3 * 4 : 64 * 128 + 4 * 4] = np.frombuffer(np.float32(0.3).tobytes(), np.uint8)
    parts = DEEPGEMM.apart(spec, page)
    assert (parts["k"][67] == 0x38).all()
    assert parts["k_scale"][67, 0] == np.float32(0.3)
    assert not parts["k"][:67].any()
    assert np.array_equal(DEEPGEMM.together(spec, parts).reshape(2, -1), page)


@pytest.mark.parametrize(("layout", "spec"), [(FLASHMLA, latents()), (ASCEND, latents()), (ASCEND, latents("int8_latents"))])
def test_packing_keeps_every_bit(layout, spec):
    rng = np.random.default_rng(1)
    packed = rng.integers(0, 256, (spec.slots, layout.width(spec)), dtype=np.uint8)
    assert np.array_equal(layout.together(spec, layout.apart(spec, packed)), packed)


def test_packed_bytes_of_another_size_are_refused():
    with pytest.raises(UsageError, match=r"a packed cache is uint8 \[8, 655\], expected 8 x 656 bytes"):
        FLASHMLA.apart(latents(), np.zeros((8, 655), np.uint8))
    with pytest.raises(UsageError, match="a cache of c, kp cannot be packed as c, c_scale, kp"):
        FLASHMLA.apart(latents("none"), np.zeros((8, 656), np.uint8))


# -- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KEYS, *LATENTS])
def test_a_step_writes_codes_and_scales(name):
    ops, scheme = porthal.bind("reference"), scheme_of(name)
    spec = PagesSpec((("c", 256), ("kp", 64)), "float32", 2, 4, name)
    batch = porthal.hal.Batch.build([2], [2], [[1]], 4)
    c, kp = drawn(2, 256).astype(np.float32), drawn(2, 64).astype(np.float32)
    pages = ops.kv_write(ops.alloc_pages(spec), ops.plan(batch), c, kp)
    held, wanted = ops.to_logical(pages), scheme.quantised(c.astype(float))
    assert list(held) == ["c", "c_scale", "kp"]
    assert np.array_equal(held["c"][4:6], wanted["codes"])
    assert np.array_equal(held["c_scale"][4:6], wanted["scale"])
    assert np.array_equal(held["kp"][4:6], kp)
    assert not held["c"][:4].any()
    assert {n: (p.shape, str(p.dtype)) for n, p in held.items()} == Pages.form(spec)


def test_quantize_then_dequantize():
    ops, x = porthal.bind("reference"), drawn(3, 200).astype(np.float32)
    q = ops.quantize(x, scheme="fp8_group")
    assert isinstance(q, Quantised)
    assert q.native["scale"].shape == (3, 2)
    assert np.abs(ops.dequantize(q, out="float32") - x).max() <= np.abs(x).max() / 28 + 1e-6
