"""What torchao writes flat, NAME._weight_qdata and its scales beside it, says the same numbers here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from porthal.hal import Binding, UsageError, narrow, scheme_of, widen
from porthal.model.checkpoint import Checkpoint, TensorFile
from porthal.model.generate import generate
from porthal.model.load import load
from tests.checkpoints import variant

PACKED = TensorFile(Path(__file__).resolve().parents[1] / "packed" / "torchao.safetensors")
# Each: how codes say it, and the scheme of calls that takes them as they are.
CASES = {
    "int8": ("int8 with a scale of float32 for 1 x all", "int8_channel"),
    "int8_alone": ("int8 with a scale of float32 for 1 x all", "int8_channel"),
    "int8_tensor": ("int8 with a scale of float32 for all x all", ""),
    "int8_group": ("int8 with a scale of float32 for 1 x 32", ""),
    "int4": ("int8 with a scale of bfloat16 for 1 x 32", ""),
    "int4_zero_points": ("int8 with a scale of bfloat16 for 1 x 32", ""),
    "fp8": ("float8_e4m3fn with a scale of float32 for 1 x all", ""),
    "nvfp4": ("float4_e2m1fn with a scale of float8_e4m3fn for 1 x 16", "nvfp4"),
    "mxfp8": ("float8_e4m3fn with a scale of float8_e8m0fnu for 1 x 32", ""),
    "mxfp4": ("float4_e2m1fn with a scale of float8_e8m0fnu for 1 x 32", "mxfp4"),
}


@pytest.fixture
def held(tmp_path: Path) -> Checkpoint:
    shutil.copy(PACKED.path, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path)


def test_there_is_each_kind() -> None:
    assert sorted(name.removesuffix(".expected") for name in PACKED.header if name.endswith(".expected")) == sorted(CASES)


@pytest.mark.parametrize("case", CASES)
def test_of_a_real_packer(case: str, held: Checkpoint) -> None:
    expected, name = PACKED.tensor(case + ".expected"), case + ".weight"
    found = held.read(name, expected.shape, slice(None))
    assert np.array_equal(widen(narrow(found, "bfloat16")), widen(expected))
    assert np.array_equal(held.read(name, expected.shape, slice(13, 19)), found[13:19])
    assert (held.schemes[name], held.kept().get(name, "")) == CASES[case]
    assert not any(other.startswith(case + "._") for other in held.unasked())
    if scheme := CASES[case][1]:
        said = scheme_of(scheme).numbers(held.parts(name, expected.shape))
        assert np.allclose(said, found, rtol=2**-23 if scheme == "nvfp4" else 0, atol=0)  # of two scales the product is rounded


def changed(folder: Path, metadata: dict[str, str], **tensors: Any) -> Checkpoint:
    """A file of the tensors of MXFP4 alone."""
    names = [name for name in PACKED.header if name.startswith("mxfp4._")]
    save_file({name: np.array(PACKED.tensor(name)) for name in names} | tensors, folder / "model.safetensors", metadata)
    return Checkpoint(folder)


ABOUT = json.loads(PACKED.metadata["mxfp4.weight"])


@pytest.mark.parametrize(
    ("about", "tensors", "said"),
    [
        (None, {}, "'mxfp4._weight_qdata' is of torchao, but the file's metadata does not say of which class"),
        ([], {}, "the file's metadata does not say of which class"),
        (ABOUT | {"_data": {"is_swizzled_scales": True}}, {}, "the file's metadata does not say of which class"),
        (ABOUT | {"_type": "Int4Tensor"}, {}, "'mxfp4.weight' is of torchao's class 'Int4Tensor', expected one of Int8Tensor"),
        (
            ABOUT,
            {"mxfp4._weight_scale": np.ones((64, 8), np.uint8)},
            r"'mxfp4._weight_scale' has shape \[64, 8\], expected tiles of 128 x 4 scales of 144 x 160 numbers",
        ),
        (
            ABOUT | {"_data": ABOUT["_data"] | {"is_swizzled_scales": False}},
            {},
            r"'mxfp4._weight_scale' has shape \[64, 32\], expected \[144, 5\]",
        ),
        (
            ABOUT,
            {"mxfp4._weight_scale": np.full((64, 32), 255, np.uint8)},
            "'mxfp4._weight_scale' holds 255, which is NaN, expected powers of two",
        ),
    ],
)
def test_what_cannot_be_read_is_named(about: Any, tensors: dict[str, Any], said: str, tmp_path: Path) -> None:
    metadata = {} if about is None else {"mxfp4.weight": json.dumps(about)}
    with pytest.raises(UsageError, match=said):
        changed(tmp_path, metadata, **tensors).read("mxfp4.weight", (144, 160), slice(None))


CONFIG = {"quant_method": "torchao", "quant_type": {"default": {}}, "modules_to_not_convert": None}


def test_a_checkpoint_runs_as_its_numbers(checkpoints: dict[str, Path], reference: Binding, tmp_path: Path) -> None:
    def text(directory: Path) -> list[int]:
        return list(generate(load(directory, reference), [[1, 2, 3]], 8).tokens[0])

    def plain(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            codes, scale = coded(tensors[name])
            tensors[name] = (codes * scale).astype(np.float32)

    def flat(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            codes, scale = coded(tensors.pop(name))
            parts = {"qdata": codes, "scale": scale, "zero_point": np.zeros(scale.shape, np.int8)}
            tensors |= {f"{name.removesuffix('weight')}_weight_{end}": part for end, part in parts.items()}
            said[name] = json.dumps({"_type": "Int8Tensor", "_data": {}})

    said: dict[str, str] = {}
    expected = text(variant(checkpoints["glm5"], tmp_path / "plain", plain))
    directory = variant(checkpoints["glm5"], tmp_path / "flat", flat, quantization_config=CONFIG)
    file = TensorFile(directory / "model.safetensors")
    tensors = {name: np.array(file.tensor(name)) for name in file.header}
    save_file(tensors, directory / "model.safetensors", said)
    assert said and text(directory) == expected


def coded(w: Any) -> tuple[Any, Any]:
    scale = (np.abs(w).max(axis=1, keepdims=True) / 127.5).astype(np.float32)
    return np.clip(np.rint(w / scale), -128, 127).astype(np.int8), scale
