"""Checkpoints written in published formats: the nearest codes, whole files, and no file that looks whole and is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porthal.hal import UsageError, dtype, widen
from porthal.model import quantising
from porthal.model.checkpoint import Checkpoint, TensorFile
from porthal.model.load import DEMO, opened
from porthal.model.quantising import EXPERTS, FORMATS, LINEAR, quantise

MATRICES = {"fp8": 76, "int8": 76, "int4": 76, "nvfp4": 36, "mxfp4": 36, "ascend-w8a8": 72, "ascend-w4a8": 72}
# How far a number may be from what it was, in numbers of the largest that shares its scale: half a step where they are even,
# and half of the largest step of a format whose steps grow; 1.1 as NVFP4 rounds the scales themselves.
STEP = {"fp8": 16 / 448, "int8": 0.5 / 127, "int4": 0.5 / 7, "nvfp4": 1.1 / 6, "mxfp4": 2 / 6, "w8": 0.5 / 127, "w4": 0.5 / 7}
BLOCK = {"int4": 128, "nvfp4": 16, "mxfp4": 32}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {scheme: tmp_path_factory.mktemp(scheme) for scheme in FORMATS}
    for scheme, out in found.items():
        quantise(DEMO, out, scheme)
    return found


def numbers(directory: Path) -> tuple[Checkpoint, dict[str, Any]]:
    _, source = opened(directory)
    shapes = quantising._shapes(opened(DEMO)[0], Checkpoint(DEMO))
    return source, {name: source.read(name, shape, slice(None)) for name, shape in shapes.items()}


@pytest.mark.parametrize("scheme", FORMATS)
def test_each_number_is_the_nearest_that_there_is(written: dict[str, Path], scheme: str) -> None:
    source, found = numbers(written[scheme])
    _, plain = numbers(DEMO)
    assert found.keys() == plain.keys()
    assert sum(map(bool, source.schemes.values())) == MATRICES[scheme]
    for name, was in plain.items():
        if not source.schemes[name]:
            assert dtype(found[name]) == dtype(was) and np.array_equal(found[name].view(np.uint8), was.view(np.uint8)), name
            continue
        was, off = widen(was), np.abs(found[name] - widen(was))
        kind = "w4" if scheme == "ascend-w4a8" and EXPERTS.search(name) else "w8" if scheme.startswith("ascend") else scheme
        if kind == "fp8":
            assert (off <= np.abs(was).max() * STEP[kind]).all(), name
            continue
        parts = was.reshape(len(was), -1, BLOCK.get(scheme, was.shape[1]))
        most = np.broadcast_to(np.abs(parts).max(axis=2, keepdims=True), parts.shape).reshape(was.shape)
        assert (off <= most * STEP[kind] * (1 + 1e-6)).all(), name


def test_a_scale_of_zeros_is_a_number() -> None:
    zeros = np.zeros((32, 128))
    for scheme, form in FORMATS.items():
        parts = form.pack("model.layers.1.mlp.experts.0.up_proj.weight", zeros, 128)
        for name, part in parts.items():
            if "scale" in name and name != "scale_bias" and part.dtype != np.uint8:
                assert (widen(part) > 0).all(), scheme
            elif name.startswith("weight_packed"):
                assert (part.view(np.uint32) == 0x88888888).all()
            elif name == "weight":
                assert not part.view(np.uint8).any(), scheme


def test_blocks_of_a_ragged_height_have_scales_of_their_own() -> None:
    w = np.ones((576, 130))
    w[512:] = 448
    parts = FORMATS["fp8"].pack("one", w, 0)
    assert parts["weight"].shape == (576, 130) and parts["weight_scale_inv"].shape == (5, 2)
    assert (parts["weight_scale_inv"][:4] == np.float32(1 / 448)).all() and (parts["weight_scale_inv"][4] == 1).all()


@given(st.lists(st.floats(-6, 6, width=32), min_size=32, max_size=32))
def test_four_bits_are_the_nearest_and_even_in_the_middle(values: list[float]) -> None:
    x = np.array(values).reshape(1, 32)
    packed = quantising._e2m1(x)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(1, 32)
    expected = x.astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    assert np.array_equal(quantising.E2M1[codes], expected)


@pytest.mark.parametrize("amax", [6.0, 6.0001, 5.999, 12.0, 2.0**-120, 3e38, 1.0, 0.75])
def test_powers_of_two_cut_nothing_off(amax: float) -> None:
    w = np.zeros((1, 32))
    w[0, :2] = amax, -amax / 2
    parts = FORMATS["mxfp4"].pack("one", w, 0)
    scale = 2.0 ** (int(parts["weight_scale"][0, 0]) - 127)
    assert amax <= 6 * scale and amax > 3 * scale


def test_small_groups_of_nvfp4_are_kept() -> None:
    w = np.full((1, 32), 6 * 448.0)
    w[0, 16:] = 6 * 2.0**-9
    parts = FORMATS["nvfp4"].pack("one", w, 0)
    assert float(parts["weight_scale_2"]) == 1 and widen(parts["weight_scale"]).tolist() == [[448, 2.0**-9]]
    assert (parts["weight"] == 0x77).all()


# -- files ---------------------------------------------------------------------------------------------------------------


def test_what_ascend_asks_for(written: dict[str, Path]) -> None:
    out = written["ascend-w4a8"]
    assert sorted(f.name for f in out.iterdir()) == [
        "config.json",
        "quant_model_description.json",
        "quant_model_weights-00001-of-00001.safetensors",
        "quant_model_weights.safetensors.index.json",
    ]
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    about = json.loads((out / "quant_model_description.json").read_text())
    stem = "model.layers.1.mlp.experts.0.down_proj."
    assert {about[stem + part] for part in ("weight", "weight_scale", "weight_offset", "scale_bias")} == {"W4A8_DYNAMIC"}
    assert about["model.layers.1.self_attn.o_proj.weight_scale"] == "W8A8_DYNAMIC"
    assert about["model.layers.1.self_attn.kv_b_proj.weight"] == about["model.norm.weight"] == "FLOAT"
    file = TensorFile(out / "quant_model_weights-00001-of-00001.safetensors")
    numbers = Checkpoint(out).read(stem + "weight", (256, 128), slice(None))
    bias = file.tensor(stem + "scale_bias")
    assert bias.shape == (256, 16) and np.allclose(bias, 8 * numbers.reshape(256, 16, 8).sum(axis=2), rtol=1e-6)
    assert file.tensor(stem.replace("down", "up") + "scale_bias").shape == (128, 1)


def test_a_config_names_what_is_not_quantised(written: dict[str, Path]) -> None:
    said = json.loads((written["nvfp4"] / "config.json").read_text())["quantization_config"]
    assert said["quant_algo"] == "NVFP4" and "model.layers.1.mlp.shared_experts.up_proj" in said["ignore"]
    assert not any(".experts." in name and "shared" not in name for name in said["ignore"])
    said = json.loads((written["int4"] / "config.json").read_text())["quantization_config"]
    assert said["config_groups"]["group_0"]["weights"]["group_size"] == 128
    assert {"lm_head", "model.layers.1.mlp.gate"} < set(said["ignore"]) and not any("o_proj" in n for n in said["ignore"])
    assert sum(LINEAR.search(f"{name}.weight") is not None for name in said["ignore"]) == 0


COMPRESSED = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
WEIGHTS = {"type": "int", "symmetric": True, "dynamic": False}
CONFIGS = {  # which the packers' readers go by; without the names of what is left out
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "int8": COMPRESSED
    | {
        "format": "int-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "strategy": "channel", **WEIGHTS},
                "input_activations": {
                    **{"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
                },
            }
        },
    },
    "int4": COMPRESSED
    | {
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "strategy": "group", "group_size": 128, **WEIGHTS},
                "input_activations": None,
            }
        },
    },
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
    "mxfp4": {
        "quant_method": "quark",
        "global_quant_config": {
            "weight": {
                **{"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "is_dynamic": False}
            }
        },
    },
    "ascend-w8a8": None,
    "ascend-w4a8": None,
}


@pytest.mark.parametrize("scheme", FORMATS)
def test_a_config_says_what_was_written(written: dict[str, Path], scheme: str) -> None:
    said = json.loads((written[scheme] / "config.json").read_text()).get("quantization_config")
    left = said and {key: value for key, value in said.items() if key not in ("ignore", "exclude")}
    assert left == CONFIGS[scheme]


def test_the_group_is_the_largest_that_divides_all_widths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMATS["int4"]
    for widths, group in (((256, 384), 128), ((128, 192), 64), ((96, 128), 32)):
        shapes = {f"{width}": (8, width) for width in widths}
        assert quantising._group(form, shapes, dict.fromkeys(shapes, "one")) == group
    monkeypatch.setattr(quantising, "GROUPS", (32,))
    quantise(DEMO, tmp_path, "int4")
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert said["weights"]["group_size"] == 32
    [file] = tmp_path.glob("*.safetensors")
    assert TensorFile(file).header["model.layers.0.self_attn.o_proj.weight_scale"]["shape"] == [256, 4]


def test_what_stands_beside_the_weights(tmp_path: Path) -> None:
    """Files of the tokenizer are copied, others are not, and the index says how large the tensors are."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(DEMO, source)
    copied = {name: f"{n} of the source" for n, name in enumerate(quantising.COPIED)}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} < set(copied)
    for name, what in {**copied, "README.md": "not copied"}.items():
        (source / name).write_text("{}" if name == "generation_config.json" else what)
    quantise(source, target, "nvfp4")
    for name in copied:
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert not (target / "README.md").exists()
    index = json.loads((target / "model.safetensors.index.json").read_text())
    [file] = target.glob("*.safetensors")
    header = TensorFile(file).header
    assert index["weight_map"] == dict.fromkeys(header, file.name)
    assert index["metadata"] == {"total_size": sum(e - b for b, e in (t["data_offsets"] for t in header.values()))}


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantising, "SHARD", 2**20)
    told: list[tuple[int, int, str]] = []

    def stop(*step: Any) -> None:
        told.append(step)
        if step[0] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantise(DEMO, tmp_path, "int8", stop)
    (tmp_path / "model-00004-of-00008.safetensors.part").write_bytes(b"cut off")
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    assert len(before) == 3 and not (tmp_path / "config.json").exists()
    quantise(DEMO, tmp_path, "int8", lambda *step: told.append(step))
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before
    assert [n for n, _, _ in told] == [1, 2, 3, *range(1, told[-1][1] + 1)]
    _, found = numbers(tmp_path)
    whole = tmp_path / "whole"
    monkeypatch.undo()
    quantise(DEMO, whole, "int8")
    assert all(np.array_equal(found[name], tensor) for name, tensor in numbers(whole)[1].items())


def test_a_quantised_checkpoint_may_be_the_source(written: dict[str, Path], tmp_path: Path) -> None:
    quantise(written["fp8"], tmp_path, "nvfp4")
    source, found = numbers(tmp_path)
    assert sum(map(bool, source.schemes.values())) == MATRICES["nvfp4"]
    before = numbers(written["fp8"])[1]["model.layers.0.self_attn.o_proj.weight"]
    after = found["model.layers.0.self_attn.o_proj.weight"]
    assert dtype(after) == "bfloat16" and np.allclose(widen(after), before, rtol=2.0**-8)


def test_what_cannot_be_written(written: dict[str, Path], tmp_path: Path) -> None:
    for source, target, scheme, said in (
        (DEMO, tmp_path, "int5", "scheme is 'int5': expected one of fp8, int8"),
        (DEMO, DEMO, "int8", "the model itself: give another folder"),
        (DEMO, written["int8"], "int4", "is of another checkpoint, or of another scheme"),
        (tmp_path / "none", tmp_path, "int8", "does not exist"),
    ):
        with pytest.raises(UsageError, match=said):
            quantise(source, target, scheme)


def test_what_is_left_of_another_format_is_refused_and_a_cut_off_shard_says_what_to_do(tmp_path: Path) -> None:
    for name, scheme in (("quant_model_description.json", "int8"), ("model.safetensors.index.json", "ascend-w8a8")):
        out = tmp_path / scheme
        out.mkdir()
        (out / name).write_text("{}")
        with pytest.raises(UsageError, match=f"{name} is of another format: give an empty folder, or remove it"):
            quantise(DEMO, out, scheme)
    out = tmp_path / "cut"
    quantise(DEMO, out, "nvfp4")
    [shard] = out.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:9000])
    with pytest.raises(UsageError, match=r"; remove it and start again$"):
        quantise(DEMO, out, "nvfp4")
    shard.unlink()
    quantise(DEMO, out, "nvfp4")
    assert opened(out)[1].kept()


def test_widths_that_do_not_fit(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has .* columns: expected a multiple of 32 for routed experts in MXFP4"):
        quantise(checkpoints["glm5"], tmp_path / "out", "mxfp4")
    assert not (tmp_path / "out").exists()


def test_the_command(command_line: Any, tmp_path: Path) -> None:
    code, out, _ = command_line("quantize", "--scheme", "int8", "--out", tmp_path / "small")
    assert (code, out) == (0, f"{tmp_path / 'small'}: int8 with a scale for a row, W8A8 of compressed-tensors\n")
    code, out, err = command_line("quantize", "--scheme", "q4", "--out", tmp_path / "other")
    assert (code, out) == (2, "") and err.startswith("porthal: scheme is 'q4': expected one of") and err.count("\n") == 1
    file = tmp_path / "file"
    file.write_text("x")
    code, out, err = command_line("quantize", "--scheme", "int8", "--out", file)
    assert (code, out) == (2, "") and err.startswith("porthal: ") and err.count("\n") == 1
