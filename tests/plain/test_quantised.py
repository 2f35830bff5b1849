"""Quantised matrices: what real packers wrote says the same numbers here, and what cannot be read is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.hal import Binding, UsageError, bind, contracts, dtype, narrow, scheme_of, widen
from porthal.model import quantised
from porthal.model.checkpoint import Blank, Loader, TensorFile
from porthal.model.config import Config
from porthal.model.generate import generate
from porthal.model.load import load, profile
from tests.checkpoints import variant

PACKED = Path(__file__).resolve().parents[1] / "packed"
PACKERS = ("compressed-tensors", "msmodelslim", "nvidia-modelopt", "amd-quark")
FILES = {name: TensorFile(PACKED / f"{name}.safetensors") for name in PACKERS}
WHAT = (".expected", ".about")
CASES = [(file, name.partition(".")[0]) for file in FILES for name in FILES[file].header if name.endswith(WHAT)]
SCHEMES = {
    "int3": "int3 with a scale of bfloat16 for 1 x all",
    "int4": "int4 with a scale of bfloat16 for 1 x 64",
    "int8_packed": "int8 with a scale of bfloat16 for 1 x 32",
    "fp8_tensor": "float8_e4m3fn with a scale of bfloat16 for all x all",
    "fp8_block": "float8_e4m3fn with a scale of bfloat16 for 128 x 128",
    "nvfp4": "float4_e2m1fn with a scale of float8_e4m3fn for 1 x 16",
    "mxfp4": "float4_e2m1fn with a scale of float8_e8m0fnu for 1 x 32",
}
BLOCK = (128, 128)
FP8 = ml_dtypes.float8_e4m3fn


@dataclass
class Held:
    """A matrix's tensors, as `quantised` wants them."""

    tensors: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, file: TensorFile, case: str) -> Held:
        return cls({name.partition(".")[2]: file.tensor(name) for name in file.header if name.startswith(case + ".")})

    def __contains__(self, part: str) -> bool:
        return part in self.tensors

    def dtype(self, part: str) -> str:
        return dtype(self.tensors[part])

    def shape(self, part: str) -> tuple[int, ...]:
        return tuple(self.tensors[part].shape)

    def array(self, part: str) -> Any:
        return self.tensors[part]

    def wrong(self, part: str, what: str) -> UsageError:
        return UsageError(f"{part} {what}")

    def values(self, shape: tuple[int, int], rows: slice = slice(None), block: tuple[int, int] = BLOCK) -> Any:
        return quantised.values(self, shape, block, rows)


# -- what real packers wrote ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "case"), CASES)
def test_of_a_real_packer(file: str, case: str) -> None:
    held = Held.of(FILES[file], case)
    expected = held.tensors.pop("expected", None)
    about = held.tensors.pop("about", None)
    shape = (expected if about is None else about).shape
    found = held.values(shape)
    assert found.shape == shape
    if about is None:
        assert np.array_equal(widen(narrow(found, dtype(expected))), widen(expected))
    else:  # what codes of 4 and of 8 bits lose of normal numbers; another layout would lose all
        lost = np.sqrt(((found - widen(about)) ** 2).mean() / (widen(about) ** 2).mean())
        assert lost < (0.16 if "int4" in case else 0.03)
    for rows in (slice(3, 8), slice(5, 6), slice(4, 4)):
        assert np.array_equal(held.values(shape, rows), found[rows])
    if file == "compressed-tensors" and case in SCHEMES:
        assert str(quantised.scheme(held, shape, BLOCK)) == SCHEMES[case]


def test_there_is_something_of_each_packer() -> None:
    assert len([case for file, case in CASES if file == "compressed-tensors"]) == 11
    assert len([case for file, case in CASES if file == "msmodelslim"]) == 9
    assert len([case for file, case in CASES if file == "nvidia-modelopt"]) == 9
    assert len([case for file, case in CASES if file == "amd-quark"]) == 5


@pytest.mark.parametrize(("file", "case"), CASES)
def test_codes_that_are_kept_say_the_numbers_that_are_read(file: str, case: str) -> None:
    held = Held.of(FILES[file], case)
    shape = next(held.tensors.pop(name).shape for name in ("expected", "about") if name in held.tensors)
    held.tensors.pop("about", None)
    found = quantised.scheme(held, shape, BLOCK)
    if (name := quantised.kept(held, found, shape)) == "none":
        return
    parts = quantised.parts(held, shape, BLOCK)
    assert {part: (a.shape, str(a.dtype)) for part, a in parts.items()} == scheme_of(name).form(shape)
    said, read = scheme_of(name).numbers(parts), held.values(shape)  # the reader rounds the product of two scales, or quotient
    assert np.allclose(said, read, rtol=2**-22, atol=0) if name == "nvfp4" else np.array_equal(said, read)


def test_what_is_kept_of_each_packer() -> None:
    names = [(quantised.kept(held, quantised.scheme(held, shape, BLOCK), shape), file) for file, held, shape in all_held()]
    as_codes = {"fp8_block", "int8_channel", "mxfp4", "nvfp4", "none"}
    assert {name for name, file in names if file == "compressed-tensors"} >= as_codes
    assert {name for name, file in names if file == "nvidia-modelopt"} >= {"fp8_block", "nvfp4", "mxfp4", "none"}
    assert {name for name, file in names if file == "amd-quark"} == {"int8_channel", "mxfp4", "none"}


def all_held() -> Any:
    for file, case in CASES:
        held = Held.of(FILES[file], case)
        yield file, held, next(held.tensors[name].shape for name in ("expected", "about") if name in held.tensors)


# -- AscendV1, from its description --------------------------------------------------------------------------------------


def codes(rows: int, columns: int, bits: int) -> Any:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    return np.random.default_rng(1).integers(low, high, (rows, columns)).astype(np.int8)


def ascend(kind: str, q: Any, scale: Any) -> Held:
    """What AscendV1's saver writes of codes and scales."""
    column = scale.reshape(-1, 1)
    if kind == "W8A8":
        step, offset = np.float32(0.03125), np.float32(-7)
        bias = np.rint(-(q.sum(axis=1, dtype=np.int64) * offset)).astype(np.int32)
        parts = {"weight": q, "deq_scale": step * scale, "quant_bias": bias, "input_scale": step, "input_offset": offset}
        return Held({name: np.atleast_1d(part) for name, part in parts.items()})
    if kind == "W4A8_DYNAMIC":
        packed = (q[0::2] & 15) | (q[1::2] << 4)
        return Held({"weight": packed, "weight_scale": column, "weight_offset": 0 * column, "scale_bias": 8 * column})
    return Held({"weight": q, "weight_scale": column, "weight_offset": 0 * column})


SCALE = np.float32([0.5, 0.01, 3e-5, 7, 1e-3, 0.3])


@pytest.mark.parametrize("kind", ["W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC"])
def test_of_ascend(kind: str) -> None:
    q = codes(6, 10, 4 if kind == "W4A8_DYNAMIC" else 8)
    held = ascend(kind, q, SCALE)
    expected = q * widen(SCALE)[:, None]
    assert np.allclose(held.values((6, 10)), expected, rtol=1e-6)  # a product of two scales is rounded once
    assert np.array_equal(held.values((6, 10), slice(1, 4)), held.values((6, 10))[1:4])
    name = {"W8A8": "none", "W8A8_DYNAMIC": "int8_channel", "W4A8_DYNAMIC": "int4_g128"}[kind]  # the first has two scales
    assert quantised.kept(held, quantised.scheme(held, (6, 10), BLOCK), (6, 10)) == name
    if kind == "W8A8":
        bits = held.tensors["deq_scale"].view(np.int32).astype(np.int64)  # as written for a model in float16
        whole = Held(held.tensors | {"deq_scale": bits})
        assert np.array_equal(whole.values((6, 10)), held.values((6, 10)))
        assert str(quantised.scheme(whole, (6, 10), BLOCK)) == "int8 with a scale of float32 for 1 x all"
        bias = held.tensors["quant_bias"]
        for part, wrong, said in (
            ("quant_bias", bias + 3, "quant_bias holds a bias, expected the correction for input_offset alone"),
            ("input_offset", np.float32([np.nan]), "quant_bias holds a bias, expected the correction for input_offset alone"),
            ("quant_bias", bias[:5], r"quant_bias has shape \[5\], expected \[6\]"),
            ("input_offset", np.float32([]), r"input_offset has shape \[0\], expected \[1\]"),
        ):
            with pytest.raises(UsageError, match=said):
                Held(held.tensors | {part: wrong}).values((6, 10))


def test_an_offset_is_taken_off_before_the_scale() -> None:
    held = ascend("W8A8_DYNAMIC", codes(6, 10, 8), SCALE)
    held.tensors["weight_offset"] = np.float32([[1], [2], [3], [-4], [0], [5]])
    expected = (held.tensors["weight"] - held.tensors["weight_offset"].astype(np.float64)) * widen(SCALE)[:, None]
    assert np.array_equal(held.values((6, 10)), expected)


# -- exact numbers, and what is refused ------------------------------------------------------------------------------------


def fp8(rows: int, columns: int, *scale: int) -> Held:
    scales = np.arange(1.0, np.prod(scale) + 1, dtype=np.float32).reshape(scale)
    return Held({"weight": np.ones((rows, columns), FP8), "weight_scale_inv": scales})


def test_a_ragged_block_has_a_scale_of_its_own() -> None:
    """576 rows of 128 are five rows of scales: of q_a and kv_a merged, 2624 rows, it is 21."""
    found = fp8(576, 130, 5, 2).values((576, 130))
    assert (found[:128, :128] == 1).all() and (found[512:, :128] == 9).all() and (found[512:, 128:] == 10).all()
    with pytest.raises(UsageError, match=r"weight_scale_inv has shape \[20, 1\], expected \[21, 1\]"):
        fp8(2624, 128, 20, 1).values((2624, 128))


def test_every_shape_of_a_scale_is_read() -> None:
    for scale, expected in (((), 1), ((1,), 1), ((1, 1), 1), ((4,), 4), ((4, 1), 4), ((1, 1, 1, 1), 1)):
        assert fp8(4, 6, *scale).values((4, 6))[3, 5] == expected
    assert fp8(200, 300, 2, 1, 3, 1).values((200, 300))[150, 299] == 6


def test_scales_are_powers_of_two_from_the_least_to_the_greatest() -> None:
    powers = np.uint8([[0], [1], [127], [254]])
    found = Held({"weight": np.ones((4, 32), FP8), "weight_scale": powers}).values((4, 32))
    assert [float(x) for x in found[:, 0]] == [2.0**-127, 2.0**-126, 1.0, 2.0**127]


def test_fours_bits_are_read_the_low_half_first() -> None:
    packed = np.uint8([[0x21, 0xF8] * 8])
    scale = {"weight_scale": np.ones((1, 2), FP8), "weight_scale_2": np.float32(2)}
    found = Held({"weight": packed, **scale}).values((1, 32))
    assert found[0, :4].tolist() == [1.0, 2.0, -0.0, -12.0]
    divided = {"weight_scale": np.ones((1, 2), FP8), "weight_global_scale": np.float32([2])}
    assert Held({"weight_packed": packed, **divided}).values((1, 32))[0, :4].tolist() == [0.25, 0.5, -0.0, -3.0]


def without(part: str) -> Callable[[Held], object]:
    return lambda held: held.tensors.pop(part)


def put(part: str, value: Any) -> Callable[[Held], object]:
    return lambda held: held.tensors.update({part: value})


@pytest.mark.parametrize(
    ("case", "change", "said"),
    [
        ("int4", without("weight_scale"), "has no scale beside it, expected one scale"),
        ("int4", without("weight_shape"), "has no weight_shape beside it"),
        ("int4", put("weight_shape", np.int64([192, 20])), r"weight_shape holds \[192, 20\], expected \[20, 192\]"),
        ("int4", put("weight_scale", np.ones((20, 5), np.float32)), r"has shape \[20, 5\], expected \[1, 1\] or \[20, 1\]"),
        ("int4", put("weight_scale", np.ones((20, 3), np.int32)), "is int32, expected one of float32, bfloat16, float16"),
        ("int4", put("weight_scale", np.full((20, 3), 127, np.uint8)), "is uint8, expected one of float32"),
        ("int4", put("weight_shape", np.float32([np.nan, 192])), "is float32, expected int64 or int32"),
        ("int4_zero_points", put("weight_zero_point", np.zeros((2, 6), np.int32)), r"has shape \[2, 6\], expected \[3, 6\]"),
        ("int4_zero_points", put("weight_zero_point", np.zeros((3, 6), np.int64)), "is int64, expected int32"),
        ("int4_zero_points", put("weight_offset", np.zeros((20, 6), np.float32)), "has weight_zero_point beside it"),
        ("int8", put("weight_zero_point", np.int32([[0]] * 19 + [[128]])), "holds 128.0, expected -128 to 127"),
        ("int8", put("weight_offset", np.full((20, 1), 1e30, np.float32)), "weight_offset holds 1.*e.30, expected -128 to 127"),
        ("int8", put("weight_offset", np.full((20, 1), np.nan, np.float32)), "weight_offset holds nan, expected -128 to 127"),
        ("fp8_row", put("weight_offset", np.ones((20, 1), np.float32)), "stands beside codes of float8_e4m3fn, expected none"),
        ("fp8_block", put("weight_zero_point", np.int8([[1, 2]])), "weight_zero_point stands beside codes of float8_e4m3fn"),
        ("mxfp4", put("weight_zero_point", np.int8([[1, 2]])), "weight_zero_point stands beside codes of float4_e2m1fn"),
        ("int8", put("weight_scale", np.zeros((20, 1), np.float32)), "holds 0.0, expected finite numbers above 0"),
        ("int8", put("weight_scale", np.full((20, 1), np.nan, np.float32)), "holds nan, .*: its packer may have divided by"),
        ("int8", put("weight", np.zeros((20, 191), np.int8)), r"is int8 \[20, 191\], which holds the codes .* in no known way"),
        ("nvfp4", without("weight_global_scale"), "has neither weight_scale_2 nor weight_global_scale beside it"),
        ("nvfp4", put("weight_global_scale", np.float32([1, 2])), r"has shape \[2\], expected one number"),
        ("nvfp4", put("weight_scale", np.ones((20, 6), FP8)), r"has shape \[20, 6\], expected \[20, 12\]"),
        ("nvfp4", put("weight_scale", np.full((20, 12), np.nan, FP8)), "holds nan"),
        ("nvfp4", put("weight_scale", np.ones((20, 12), np.float32)), "is float32, expected one of float8_e4m3fn, uint8"),
        ("mxfp4", put("weight_scale", np.full((20, 6), 255, np.uint8)), "holds 255, which is NaN"),
        ("fp8_block", put("weight_scale", np.ones((2, 3), np.float32)), r"has shape \[2, 3\], expected \[2, 2\]"),
        ("fp8_row", put("weight_scale_inv", np.ones((20, 1), np.float32)), "has weight_scale_inv and weight_scale beside it"),
    ],
)
def test_what_cannot_be_read_is_named(case: str, change: Callable[[Held], object], said: str) -> None:
    held = Held.of(FILES["compressed-tensors"], case)
    shape = held.tensors.pop("expected").shape
    held.values(shape)
    change(held)
    with pytest.raises(UsageError, match=said):
        held.values(shape)


# -- whole checkpoints -----------------------------------------------------------------------------------------------------

PROJECTION = "_proj.weight"


def rewritten(source: Path, target: Path, write: Callable[[dict[str, Any], str, Any], None], **config: Any) -> Path:
    """The checkpoint with each of its experts' matrices written anew."""

    def change(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if ".experts." in n and n.endswith(PROJECTION)]:
            write(tensors, name.removesuffix("weight"), widen(tensors.pop(name)).astype(np.float64))

    return variant(source, target, change, **config)


def rounded(w: Any, most: int) -> tuple[Any, Any]:
    scale = (np.abs(w).max(axis=1, keepdims=True) / most).astype(np.float32)
    return np.rint(w / scale).astype(np.int8), scale


def plain8(tensors: dict[str, Any], stem: str, w: Any) -> None:
    q, scale = rounded(w, 127)
    tensors[stem + "weight"] = (q * widen(scale)).astype(np.float32)


def int8(tensors: dict[str, Any], stem: str, w: Any) -> None:
    q, scale = rounded(w, 127)
    tensors |= {stem + "weight": q, stem + "weight_scale": scale}


def ascend8(tensors: dict[str, Any], stem: str, w: Any) -> None:
    q, scale = rounded(w, 127)
    tensors |= {stem + name: part for name, part in ascend("W8A8_DYNAMIC", q, scale).tensors.items()}


def text(model: Any) -> list[int]:
    return list(generate(model, [[1, 2, 3]], 8).tokens[0])


COMPRESSED = {"quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}}}


def test_a_quantised_checkpoint_runs_as_its_numbers(
    checkpoints: dict[str, Path], reference: Binding, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = text(load(rewritten(checkpoints["glm5"], tmp_path / "plain", plain8), reference))
    assert text(load(rewritten(checkpoints["glm5"], tmp_path / "int8", int8, **COMPRESSED), reference)) == expected
    assert "matrices kept as int8_channel: 96, of int8 with a scale of float32 for 1 x all" in caplog.text
    directory = rewritten(checkpoints["glm5"], tmp_path / "ascend", ascend8)
    (directory / "model.safetensors").rename(directory / "quant_model_weights.safetensors")
    first, second = (f"model.layers.1.mlp.experts.{n}.up_proj.weight" for n in range(2))
    describe(directory, **{first: "W8A8_DYNAMIC"})
    assert text(load(directory, reference)) == expected
    assert "as quant_model_description.json does" not in caplog.text
    describe(directory, **{first: "W8A8_DYNAMIC", second: "FLOAT"})
    load(directory, reference)
    said = f"{second!r} is int8 with a scale of float32 for 1 x all, the description says FLOAT"
    assert f"matrices read as their tensors say, not as quant_model_description.json does: 1, as {said}" in caplog.text


class Unquantised(Reference):
    name = "unquantised"

    def grouped_gemm(self, x: Any, w: Any, counts: Any) -> Any:
        return self.derive(contracts()["grouped_gemm"])(x, w, counts)


def test_without_a_kernel_that_takes_codes_they_are_read_as_plain_numbers(
    checkpoints: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = rewritten(checkpoints["glm5"], tmp_path / "int8", int8, **COMPRESSED)
    assert load(directory, bind(backend=Unquantised())).blocks[1].mlp.w13.spec.scheme == "none"
    why = "since grouped_gemm: unquantised: quantisation scheme of w is 'int8_channel', the kernel takes none"
    assert "matrices read as plain numbers: 96, of int8" in caplog.text and why in caplog.text
    kept = load(directory, bind("reference")).blocks[1].mlp.w13
    assert kept.spec.scheme == "int8_channel"
    assert {name: str(part.dtype) for name, part in kept.native.items()} == {"codes": "int8", "scale": "float32"}


def describe(directory: Path, **names: Any) -> None:
    about = {"version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC", "metadata": {}, "group_size": 0, **names}
    (directory / "quant_model_description.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"metadata": {"quarot": {"max_tp_size": 4}}}, "has metadata.quarot: porthal does not rotate activations"),
        ({"a.weight": "W16A16S"}, "has 'a.weight' = 'W16A16S': expected one of FLOAT, W8A8"),
    ],
)
def test_a_description_that_is_not_understood(
    checkpoints: dict[str, Path], reference: Binding, tmp_path: Path, names: dict[str, Any], said: str
) -> None:
    directory = rewritten(checkpoints["glm5"], tmp_path / "model", ascend8)
    describe(directory, **names)
    with pytest.raises(UsageError, match=said):
        load(directory, reference)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"transform_config": {"config_groups": {}}}, "quantization_config.transform_config = "),
        ({"quantization_status": "frozen"}, "quantization_config.quantization_status = 'frozen'"),
        ({"config_groups": {"g": {"weights": {"block_structure": [128]}}}}, "config_groups.g.weights.block_structure = "),
        ({"quant_method": "gptq"}, "quantization_config.quant_method = 'gptq': expected one of fp8, compressed-tensors"),
    ],
)
def test_a_config_that_is_not_understood(
    checkpoints: dict[str, Path], reference: Binding, tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    quantization = COMPRESSED["quantization_config"] | config
    directory = rewritten(checkpoints["glm5"], tmp_path / "model", int8, quantization_config=quantization)
    with pytest.raises(UsageError, match=said):
        load(directory, reference)


def test_the_block_of_a_config_is_used(checkpoints: dict[str, Path], reference: Binding, tmp_path: Path) -> None:
    def blocks(tensors: dict[str, Any], stem: str, w: Any) -> None:
        scale = np.ones((-(-w.shape[0] // 16), -(-w.shape[1] // 16)), np.float32)
        tensors |= {stem + "weight": narrow(w, "float8_e4m3fn"), stem + "weight_scale": scale}

    def numbers(tensors: dict[str, Any], stem: str, w: Any) -> None:
        tensors[stem + "weight"] = narrow(w, "float8_e4m3fn").astype(np.float32)

    groups = {"g": {"weights": {"block_structure": [16, 16]}}}
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}
    expected = text(load(rewritten(checkpoints["glm5"], tmp_path / "plain", numbers), reference))
    assert text(load(rewritten(checkpoints["glm5"], tmp_path / "blocks", blocks, **config), reference)) == expected


# -- what of a checkpoint stays codes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("few", ["up", "down"])
def test_experts_of_which_only_some_matrices_are_codes(
    checkpoints: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, few: str
) -> None:
    """As people publish them: those of one product finer than those of the other."""

    def some(tensors: dict[str, Any], stem: str, w: Any) -> None:
        coded = ".experts." in stem and ("down_proj" in stem) == (few == "down")
        (int8 if coded else plain8)(tensors, stem, w)

    made = load(rewritten(checkpoints["glm5"], tmp_path / "some", some, **COMPRESSED), bind("reference"))
    expected = load(rewritten(checkpoints["glm5"], tmp_path / "plain", plain8), bind("reference"))
    schemes = [w.spec.scheme for w in (made.blocks[1].mlp.w13, made.blocks[1].mlp.w2)]
    assert schemes == (["none", "int8_channel"] if few == "down" else ["int8_channel", "none"])
    assert text(made) == text(expected) and "kept as int8_channel" in caplog.text


@pytest.mark.parametrize(
    ("codes", "scale", "shape", "name"),
    [
        ("int8", (96, 1), (96, 64), "int8_channel"),
        ("int8", (1, 1), (96, 64), "none"),  # one scale for the matrix
        ("float8_e4m3fn", (1, 1), (96, 64), "fp8_block"),  # one block
        ("float8_e4m3fn", (1, 1), (300, 64), "none"),
        ("float8_e4m3fn", (300, 1), (300, 64), "none"),
    ],
)
def test_a_block_as_large_as_the_matrix(codes: str, scale: tuple[int, int], shape: tuple[int, int], name: str) -> None:
    q = np.ones(shape, np.int8) if codes == "int8" else narrow(np.ones(shape), codes)
    held = Held({"weight": q, "weight_scale": np.ones(scale, np.float32)})
    assert quantised.kept(held, quantised.scheme(held, shape, BLOCK), shape) == name
    if name != "none":
        assert scheme_of(name).form(shape)["scale"] == (quantised.parts(held, shape, BLOCK)["scale"].shape, "float32")


def test_matrices_that_share_a_block_where_they_are_joined_are_read_as_plain_numbers(reference: Binding) -> None:
    loader = Loader(Blank(), reference, "float32", {"gate": "fp8_block", "up": "fp8_block"})
    made = loader.joined("linear.w", (200, 8), ["gate", "up"])  # each has 100 rows, a block 128
    assert (made.spec.scheme, made.spec.shape) == ("none", (200, 8))


def test_a_binding_for_plain_weights_keeps_none(checkpoints: dict[str, Path], tmp_path: Path, caplog: Any) -> None:
    directory = rewritten(checkpoints["glm5"], tmp_path / "int8", int8, **COMPRESSED)
    plain = bind("reference", profile=profile(Config.read(directory)))
    assert load(directory, plain).blocks[1].mlp.w13.spec.scheme == "none"
    assert "read as plain numbers: 96, of int8" in caplog.text and "is bound for other calls than" in caplog.text


def test_what_is_left_out_is_told_by_the_tensors(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Shared experts and attention are plain beside experts of few bits, whatever the config says of them."""

    def routed(tensors: dict[str, Any], stem: str, w: Any) -> None:
        (int8 if ".experts." in stem else plain8)(tensors, stem, w)

    expected = text(load(rewritten(checkpoints["glm5"], tmp_path / "plain", plain8), bind("reference")))
    for n, ignored in enumerate(([], ["lm_head", "*mlp.experts*"], ["model.layers.1.mlp.shared_experts.*"])):
        config = {"quantization_config": COMPRESSED["quantization_config"] | {"ignore": ignored}}
        made = load(rewritten(checkpoints["glm5"], tmp_path / f"{n}", routed, **config), bind("reference"))
        mlp = made.blocks[1].mlp
        assert [w.spec.scheme for w in (mlp.w13, mlp.w2, mlp.shared13, mlp.shared2)] == ["int8_channel"] * 2 + ["none"] * 2
        assert text(made) == expected
