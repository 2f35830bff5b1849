"""Variants of a tiny checkpoint: other config values, other tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Tensors = dict[str, np.ndarray]


def variant(
    source: Path,
    target: Path,
    change: Callable[[Tensors], object] = lambda tensors: None,
    without: tuple[str, ...] = (),
    **config: Any,
) -> Path:
    """Copy a single-file checkpoint: `config` replaces keys, `without` drops some, `change` edits the tensors in place."""
    target.mkdir(parents=True, exist_ok=True)
    raw = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in without}))
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target
