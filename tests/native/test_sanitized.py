"""The kernels of one operator under AddressSanitizer, as they are and with a read behind a row, which it must name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("sanitize", ROOT / ".ci" / "sanitize.py")
sanitize = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sanitize)

SOURCE = "logits.cpp"


@pytest.mark.parametrize("edited", [False, True])
def test_address_sanitizer(edited):
    if why := sanitize.lacking("address"):
        pytest.skip(why)
    text = (ROOT / "backends" / "cpu" / "native" / SOURCE).read_text("utf-8")
    line = "for (; i + kLanes <= n; i += kLanes) top[0] = greater(load(x + i), top[0]);"
    assert text.count(line) == 1
    behind = line.replace("i + kLanes <= n", "i < n")
    code, said = sanitize.run("address", ["argmax"], {SOURCE: text.replace(line, behind)} if edited else {}, ["float16"])
    assert code == edited, said
    assert ("ERROR: AddressSanitizer" in said) == edited
