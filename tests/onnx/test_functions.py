"""Operators as functions of ONNX: what a graph's reader may rely on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install -e '.[dev]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[dev]'")

from porthal.backends.onnxruntime.functions import DOMAIN, FOLDER, function, needed, nodes, spelled, variants  # noqa: E402
from porthal.hal import contracts  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
STEMS = sorted(path.stem for path in FOLDER.glob("*.txt"))
TEXTS = sorted({text for stem in STEMS for text in spelled(stem)})
HELPERS = {
    "best_experts", "candidates", "codes_fp8", "codes_int8", "codes_int8_half", "codes_int8_tile", "columns", "copy_pages",
    "distributions", "e4m3", "expert_SCHEME", "expert_fp8_block", "gated", "gathered", "read_int8", "read_int8_tile",
    "routed", "scales_SCHEME", "scales_fp8_block", "scales_int8_channel", "sent", "sigmoid", "slots_of", "taken_SCHEME",
    "taken_fp8_block", "taken_int8_channel", "turned", "verified", "without_nan", "write_rows",
}  # fmt: skip


def test_every_operator_is_a_function_or_is_made_of_others():
    named = {text.partition(".")[0] for text in STEMS}
    assert named - set(contracts()) == HELPERS
    assert {op for op, contract in contracts().items() if not contract.decomposition} <= named


@pytest.mark.parametrize("text", TEXTS)
def test_a_function_has_standard_operators_alone(text):
    made = function(*text.split(".")[:1], text.partition(".")[2])
    assert {node.domain for f in needed([made]) for node in nodes(f)} <= {"", DOMAIN}
    for f in needed([made]):
        onnx.checker.check_function(f, context())


@pytest.mark.parametrize("text", TEXTS)
def test_what_a_function_makes_is_used(text):
    """Else a runtime warns of what it removes; of a node with several results one is enough."""
    made = function(*text.split(".")[:1], text.partition(".")[2])
    used = {name for node in nodes(made) for name in node.input} | set(made.output)
    used |= {result.name for node in nodes(made) for a in node.attribute for result in a.g.output}
    assert [node.output for node in nodes(made) if not used & set(node.output)] == []


def context():
    made = onnx.checker.C.CheckerContext()
    made.ir_version, made.opset_imports = 10, {"": 21, DOMAIN: 1}
    return made


@pytest.mark.parametrize("op", [op for op in contracts() if variants(op)])
def test_attributes_are_those_of_the_contract(op):
    contract = contracts()[op]
    found = [set(function(op, variant).attribute) for variant in variants(op)]
    assert set().union(*found) <= {*contract.attributes, *contract.facts()}
    assert {a for a in contract.attributes if contract.attributes[a].type is not str} <= set().union(*found)


def test_the_page_is_what_is_generated():
    command = [sys.executable, "-m", "porthal.backends.onnxruntime.page"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs/onnx.md").read_text(encoding="utf-8") == made
