"""An export holds a piece of one tensor at a time, whatever the checkpoint's size."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc

import pytest

pytest.importorskip("onnx", reason="onnx is not installed: pip install -e '.[dev]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[dev]'")

from porthal.backends.onnxruntime import graph
from porthal.hal import recorded
from porthal.model.checkpoint import Blank
from porthal.model.config import Config
from porthal.model.export import export
from porthal.model.glm5 import Glm5
from porthal.model.load import DEMO, opened

SIZES = {"hidden_size": 512, "vocab_size": 8192, "n_routed_experts": 32, "moe_intermediate_size": 512}
WITHOUT = {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}


class Asked(Blank):
    """Notes which tensors a model reads, in which shape; experts one by one, as they are published."""

    def __init__(self):
        self.shapes = {}

    def holds(self, prefix):
        return not prefix.endswith("experts.gate_up_proj")

    def read(self, name, shape, rows):
        self.shapes[name] = tuple(shape)
        return super().read(name, shape, rows)


def blank_checkpoint(folder, **config):
    """Zeros in bfloat16, in a file without blocks on the disk: the bytes of each tensor."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(json.loads((DEMO / "config.json").read_text()) | config))
    asked = Asked()
    recorded(lambda ops: Glm5(Config.read(folder), asked, ops))
    sizes = {name: 2 * math.prod(shape) for name, shape in asked.shapes.items()}
    header, at = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "BF16", "shape": list(asked.shapes[name]), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return sizes


def test_peak_memory_is_that_of_a_tensor_not_of_its_stack(tmp_path, monkeypatch):
    sizes = blank_checkpoint(tmp_path / "large", **SIZES, **WITHOUT)
    stack = sum(size for name, size in sizes.items() if ".experts." in name)
    largest, room = max(sizes.values()), 8 << 20
    assert stack > 2 * (1.2 * largest + room)
    monkeypatch.setattr(graph, "PIECE", 1 << 20)
    export(*opened(DEMO), tmp_path / "demo.onnx")  # what is made once is made
    given = opened(tmp_path / "large")
    tracemalloc.start()
    try:
        export(*given, tmp_path / "model.onnx", "bfloat16")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.2 * largest + room, f"{peak / 2**20:.1f} MiB"
    assert (tmp_path / "model.onnx.data").stat().st_size >= sum(sizes.values())
