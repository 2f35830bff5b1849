"""A checkpoint written anew in one of the formats in which quantised checkpoints are published, rounded to nearest.

Nothing is calibrated: a scale follows from the largest number that it stands for. A code is the quotient of the number by
its stored scale, rounded half to even. `model.quantised` reads what is written here, and the packers' own readers do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from porthal.hal import UsageError, dtype, narrow, recorded, widen
from porthal.model.checkpoint import DTYPES, Checkpoint, TensorFile
from porthal.model.config import Config
from porthal.model.glm5 import Glm5
from porthal.model.load import opened
from porthal.model.quantised import E2M1

Array = np.ndarray[Any, Any]
Parts = dict[str, Array]
Progress = Callable[[int, int, str], object]
SHARD = 2**31  # bytes of a shard, as the tensors are in bfloat16
GROUPS = (128, 64, 32)  # columns of a group of int4: the first of these that divides all widths
LINEAR = re.compile(
    r"\.(self_attn\.((q_a|q_b|kv_b|o)_proj|kv_a_proj_with_mqa|indexer\.(wq_b|wk))|mlp\.(.+\.)?(gate|up|down)_proj)\.weight$"
)
EXPERTS = re.compile(r"\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight$")
COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class Format:
    """A published format.

    about     one line for people
    kind      of a matrix by its name, or "" for what stays as it is
    pack      the tensors of a matrix: its name, the matrix in float64, columns of a group
    config    quantization_config: names of the linear layers that stay as they are, columns of a group
    step      its matrices' columns must be a multiple of it
    ascend    AscendV1's file names, and a description beside them instead of a quantization_config
    """

    about: str
    kind: Callable[[str], str]
    pack: Callable[[str, Array, int], Parts]
    config: Callable[[Sequence[str], int], dict[str, Any]] | None = None
    step: int = 1
    ascend: bool = False


def _one(pattern: re.Pattern[str], kind: str = "one") -> Callable[[str], str]:
    return lambda name: kind if pattern.search(name) else ""


# -- codes and scales ------------------------------------------------------------------------------------------------------


def _scales(amax: Array, most: float) -> Array:
    """float32, so that the largest number has the largest code; 1 where all are 0."""
    scale = (amax / most).astype(np.float32)
    return np.where(scale > 0, scale, np.float32(1))


def _grouped(w: Array, columns: int) -> Array:
    return w.reshape(len(w), -1, columns or w.shape[1])


def _integers(w: Array, columns: int, bits: int) -> tuple[Array, Array]:
    """Codes [rows, columns] of so many bits and their scales [rows, groups]."""
    parts, most = _grouped(w, columns), 2 ** (bits - 1) - 1
    scale = _scales(np.abs(parts).max(axis=2), most)
    codes = np.clip(np.rint(parts / widen(scale)[..., None]), -most, most)
    return codes.reshape(w.shape).astype(np.int8), scale


def _fp8(name: str, w: Array, group: int) -> Parts:
    high, wide = (-(-n // 128) for n in w.shape)
    padded = np.zeros((high * 128, wide * 128))
    padded[: w.shape[0], : w.shape[1]] = w
    blocks = padded.reshape(high, 128, wide, 128)
    scale = _scales(np.abs(blocks).max(axis=(1, 3)), 448)
    codes = np.clip(blocks / widen(scale)[:, None, :, None], -448, 448).reshape(padded.shape)
    return {"weight": narrow(codes[: w.shape[0], : w.shape[1]], "float8_e4m3fn"), "weight_scale_inv": scale}


def _int8(name: str, w: Array, group: int) -> Parts:
    codes, scale = _integers(w, 0, 8)
    return {"weight": codes, "weight_scale": scale}


def _int4(name: str, w: Array, group: int) -> Parts:
    codes, scale = _integers(w, group, 4)
    biased = (codes + 8).astype(np.uint8)
    words = (biased[:, 0::2] | biased[:, 1::2] << 4).view(np.int32)
    return {"weight_packed": words, "weight_scale": scale, "weight_shape": np.int64(w.shape)}


def _e2m1(x: Array) -> Array:
    """Codes of the nearest numbers, two in a byte, the first in the low half."""
    a = np.abs(x)
    codes = sum((a > tie if even else a >= tie).astype(np.uint8) for tie, even in zip((E2M1[:7] + E2M1[1:8]) / 2, (1, 0) * 4))
    codes |= np.where(np.signbit(x) & (codes > 0), np.uint8(8), np.uint8(0))
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _nvfp4(name: str, w: Array, group: int) -> Parts:
    parts = _grouped(w, 16)
    whole = _scales(np.abs(w).max(keepdims=True), 6 * 448).reshape(())
    amax = np.abs(parts).max(axis=2)
    scale = narrow(np.where(amax > 0, np.clip(amax / (6 * widen(whole)), 2.0**-9, 448), 1), "float8_e4m3fn")
    product = (widen(scale) * widen(whole)).astype(np.float32)
    codes = _e2m1((parts / widen(product)[..., None]).reshape(w.shape))
    return {"weight": codes, "weight_scale": scale, "weight_scale_2": whole}


def _mxfp4(name: str, w: Array, group: int) -> Parts:
    parts = _grouped(w, 32)
    mantissa, power = np.frexp(np.abs(parts).max(axis=2) / 6)  # the least power of two with which nothing is cut off
    power = np.clip(np.where(mantissa == 0.5, power - 1, power), -127, 127)
    power = np.where(mantissa == 0, 0, power)
    codes = _e2m1(np.ldexp(parts, -power[..., None]).reshape(w.shape))
    return {"weight": codes, "weight_scale": (power + 127).astype(np.uint8)}


def _ascend(kind: Callable[[str], str], name: str, w: Array, group: int) -> Parts:
    """Of codes of 4 bits with scale_bias, which AscendV1's kernel takes off as its codes are unsigned: 8 times the sums of the
    rows, in 16 parts of a `down_proj`, whose columns ranks may share."""
    four = kind(name) == "W4A8_DYNAMIC"
    codes, scale = _integers(w, 0, 4 if four else 8)
    parts = {"weight": codes, "weight_scale": scale, "weight_offset": np.zeros_like(scale)}
    if not four:
        return parts
    shared = 16 if name.endswith("down_proj.weight") else 1
    sums = (codes * widen(scale)).reshape(len(w), shared, -1).sum(axis=2)
    return parts | {"weight": codes[0::2] & 15 | codes[1::2] << 4, "scale_bias": (8 * sums).astype(np.float32)}


# -- the formats -----------------------------------------------------------------------------------------------------------


def _compressed(form: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Callable[..., dict[str, Any]]:
    def config(ignored: Sequence[str], group: int) -> dict[str, Any]:
        scheme = {"symmetric": True, "dynamic": False, **weights}
        if scheme["strategy"] == "group":
            scheme["group_size"] = group
        return {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "ignore": list(ignored),
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": inputs}},
        }

    return config


def _modelopt(ignored: Sequence[str], group: int) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": list(ignored)}


def _quark(ignored: Sequence[str], group: int) -> dict[str, Any]:
    weight = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "is_dynamic": False}
    return {"quant_method": "quark", "exclude": list(ignored), "global_quant_config": {"weight": weight}}


def _block(ignored: Sequence[str], group: int) -> dict[str, Any]:
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def _w8a8(name: str) -> str:
    return "W8A8_DYNAMIC" if LINEAR.search(name) and "kv_b_proj" not in name else ""


def _w4a8(name: str) -> str:
    return "W4A8_DYNAMIC" if EXPERTS.search(name) else _w8a8(name)


TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
W8A8 = _compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, TOKEN)
W4A16 = _compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group"}, None)
FORMATS = {
    "fp8": Format("e4m3 with a scale for 128 x 128, as GLM-5-FP8", _one(LINEAR), _fp8, _block),
    "int8": Format("int8 with a scale for a row, W8A8 of compressed-tensors", _one(LINEAR), _int8, W8A8),
    "int4": Format("int4 in groups of 128 or less, W4A16 of compressed-tensors", _one(LINEAR), _int4, W4A16, 32),
    "nvfp4": Format("routed experts in NVFP4, of ModelOpt", _one(EXPERTS), _nvfp4, _modelopt, 16),
    "mxfp4": Format("routed experts in MXFP4, of Quark", _one(EXPERTS), _mxfp4, _quark, 32),
    "ascend-w8a8": Format("W8A8_DYNAMIC of AscendV1", _w8a8, partial(_ascend, _w8a8), ascend=True),
    "ascend-w4a8": Format(
        "W4A8_DYNAMIC of AscendV1 for experts, W8A8_DYNAMIC else", _w4a8, partial(_ascend, _w4a8), step=16, ascend=True
    ),
}


# -- files -----------------------------------------------------------------------------------------------------------------


@dataclass
class _Asked:
    """A source that hands a checkpoint's tensors through, and notes which a model reads in which shape."""

    checkpoint: Checkpoint
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def holds(self, prefix: str) -> bool:
        return self.checkpoint.holds(prefix)

    def read(self, name: str, shape: Sequence[int], rows: slice) -> Array:
        self.shapes[name] = tuple(shape)
        return self.checkpoint.read(name, shape, rows)


def quantise(source: str | Path, target: str | Path, scheme: str, progress: Progress | None = None) -> None:
    """Write the checkpoint in `source` to `target` in a format of FORMATS.

    A file has its name only when it is whole, and config.json comes last. A run that was stopped goes on where it was.
    UsageError for a source that is no checkpoint, widths that a format cannot hold, and a target that holds another checkpoint.
    """
    if scheme not in FORMATS:
        raise UsageError(f"scheme is {scheme!r}: expected one of {', '.join(FORMATS)}")
    source, target, form = Path(source), Path(target), FORMATS[scheme]
    config, checkpoint = opened(source)
    shapes = _shapes(config, checkpoint)
    kinds = {name: form.kind(name) for name in shapes}
    group = _group(form, shapes, kinds)
    stem = "quant_model_weights" if form.ascend else "model"
    shards = list(_shards(shapes))
    receipt = _receipt(source, scheme, shapes)
    files = [target / f"{stem}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    _check_target(source, target, files, receipt, form.ascend)
    where: dict[str, str] = {}
    try:
        target.mkdir(parents=True, exist_ok=True)
        for n, (file, names) in enumerate(zip(files, shards)):
            if not file.exists():
                _write(file, dict(_packed(checkpoint, form, {name: shapes[name] for name in names}, kinds, group)), receipt)
            where |= dict.fromkeys(TensorFile(file).header, file.name)
            if progress:
                progress(n + 1, len(files), file.name)
        _finish(source, target, form, stem, where, kinds, group)
    except OSError as error:
        raise UsageError(f"cannot write {error.filename or target}: {error.strerror}, give a writable folder") from None


def _shapes(config: Config, checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model reads, in the order in which it does."""
    asked = _Asked(checkpoint)
    recorded(lambda ops: Glm5(config, asked, ops))
    fused = [name for name, shape in asked.shapes.items() if len(shape) > 2]
    if fused:
        raise UsageError(f"{checkpoint.directory} holds {fused[0]!r}, experts in one tensor: expected one for each")
    return asked.shapes


def _group(form: Format, shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, str]) -> int:
    """Columns that share a scale, where that is to be chosen."""
    widths = {shapes[name][1]: name for name, kind in kinds.items() if kind}
    for width, name in widths.items():
        if width % form.step:
            raise UsageError(f"{name!r} has {width} columns: expected a multiple of {form.step} for {form.about}")
    return next(size for size in (*GROUPS, 1) if all(width % size == 0 for width in widths))


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        if names and held + size > SHARD:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def _receipt(source: Path, scheme: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What a shard is made of: the source's files as they are now, the scheme, and these rules."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(source.glob("*.safetensors"))]
    rules = Path(__file__).read_bytes()
    return blake2b(repr((files, scheme, sorted(shapes.items()))).encode() + rules, digest_size=16).hexdigest()


def _check_target(source: Path, target: Path, files: Sequence[Path], receipt: str, ascend: bool) -> None:
    if target.resolve() == source.resolve():
        raise UsageError(f"--out is {target}, the model itself: give another folder")
    for file in target.glob("*.safetensors"):
        try:
            made_of = TensorFile(file).metadata.get("porthal.made_of")
        except UsageError as error:
            raise UsageError(f"{error}; remove it and start again") from None
        if file not in files or made_of != receipt:
            raise UsageError(f"{file} is of another checkpoint, or of another scheme: give an empty folder, or remove it")
    ours = {f"{files[0].name.partition('-')[0]}.safetensors.index.json", "quant_model_description.json" * ascend}
    for name in ("model.safetensors.index.json", "quant_model_weights.safetensors.index.json", "quant_model_description.json"):
        if name not in ours and (target / name).exists():
            raise UsageError(f"{target / name} is of another format: give an empty folder, or remove it")


def _packed(
    checkpoint: Checkpoint, form: Format, shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, str], group: int
) -> Iterator[tuple[str, Array]]:
    for name, shape in shapes.items():
        stored = checkpoint.read(name, shape, slice(None))
        if not kinds[name]:
            yield name, stored if dtype(stored) != "float64" else narrow(stored, "bfloat16")
            continue
        stem = name.removesuffix("weight")
        yield from ((stem + part, tensor) for part, tensor in form.pack(name, widen(stored), group).items())


def _write(file: Path, tensors: Mapping[str, Array], receipt: str) -> None:
    """A safetensors file."""
    spelled = {name: code for code, name in DTYPES.items() if code != "F8_E8M0"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "porthal.made_of": receipt}}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": spelled[dtype(tensor)], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    _put(file, chain([len(text).to_bytes(8, "little"), text], (tensor.tobytes() for tensor in tensors.values())))


def _finish(
    source: Path,
    target: Path,
    form: Format,
    stem: str,
    where: Mapping[str, str],
    kinds: Mapping[str, str],
    group: int,
) -> None:
    """The index, what is copied, and config.json at last."""
    headers = [TensorFile(file).header.values() for file in target.glob("*.safetensors")]
    size = sum(end - begin for header in headers for begin, end in (tensor["data_offsets"] for tensor in header))
    _put_json(target / f"{stem}.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    if form.config:
        config["quantization_config"] = form.config(_ignored(kinds), group)
    if form.ascend:
        about = {name: _kind_of(name, kinds) for name in where}
        _put_json(target / "quant_model_description.json", {"version": "1.0.0", "group_size": 0, "metadata": {}, **about})
    _put_json(target / "config.json", config)


def _ignored(kinds: Mapping[str, str]) -> list[str]:
    """The linear layers that stay as they are, as modules."""
    linear = re.compile(r"(_proj|wk|wq_b|mlp\.gate|weights_proj|lm_head)\.weight$")
    return [name.removesuffix(".weight") for name, kind in kinds.items() if not kind and linear.search(name)]


def _kind_of(name: str, kinds: Mapping[str, str]) -> str:
    return kinds.get(name) or kinds.get(name.rpartition(".")[0] + ".weight") or "FLOAT"


def _put(file: Path, parts: Iterable[bytes]) -> None:
    """A file of these parts one behind the other, under its name once it is whole."""
    beside = file.with_name(file.name + ".part")
    with beside.open("wb") as out:
        for part in parts:
            out.write(part)
        out.flush()
        os.fsync(out.fileno())
    beside.rename(file)


def _put_json(file: Path, value: Mapping[str, Any]) -> None:
    _put(file, [(json.dumps(value, indent=1) + "\n").encode()])
