"""What it takes to load a checkpoint in FP8 as FP8: little more than its file has bytes, at no time more."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

from porthal.bench.step import Random
from porthal.hal import bind, narrow, numpy_dtype, recorded
from porthal.model import quantising
from porthal.model.config import Config
from porthal.model.glm5 import Glm5
from porthal.model.load import DEMO, load

LAYERS = 16  # so that the experts of one, which are packed at once, are few of all
BLOCK = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def written(out: Path) -> Path:
    """The demo checkpoint's widths in more layers, of random codes."""
    raw = json.loads((DEMO / "config.json").read_text())
    left = {k: v for k, v in raw.items() if k not in ("mlp_layer_types", "indexer_types")}
    sizes = {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": 0, "first_k_dense_replace": 1}
    (out / "config.json").write_text(json.dumps(left | sizes | BLOCK | {"moe_intermediate_size": 512, "n_routed_experts": 16}))
    source, shapes = Random(), {}

    class Asked(Random):
        def read(self, name: str, shape: Any, rows: slice) -> Any:
            shapes[name] = tuple(shape)
            return super().read(name, shape, rows)

    recorded(lambda ops: Glm5(Config.read(out), Asked(), ops))
    tensors: dict[str, Any] = {}
    for name, shape in shapes.items():
        if quantising.LINEAR.search(name):
            codes = np.resize(np.arange(120, dtype=np.uint8), shape).view(numpy_dtype("float8_e4m3fn"))
            scale = np.full([-(-n // 128) for n in shape], 1e-4, np.float32)
            tensors |= {name: codes, name.removesuffix("weight") + "weight_scale_inv": scale}
        else:
            tensors[name] = narrow(np.asarray(source.read(name, shape, slice(None)), np.float32), "bfloat16")
    quantising._write(out / "model.safetensors", tensors, "")
    return out


def test_an_fp8_checkpoint_takes_little_more_than_its_file(tmp_path: Path) -> None:
    directory = written(tmp_path)
    size = (directory / "model.safetensors").stat().st_size
    binding = bind("torch")
    load(directory, binding, dtype="bfloat16")  # what is made once
    tracemalloc.start()
    try:
        model = load(directory, binding, dtype="bfloat16")
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert model.blocks[1].mlp.w13.spec.scheme == "fp8_block"
    assert held <= 1.05 * size, held / size
    assert peak <= 1.15 * size, peak / size
