"""What belongs to an op stands in its file, what belongs to a chip in its folder; and files stay small."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from porthal.hal import backend_names, contracts
from porthal.hal.signature import ARRAY

ROOT = Path(__file__).resolve().parents[2]
# Tables of op names by their nature: known discrepancies, and what is planted in kernels.
TABLES = ("cases/discrepancies.py", "selftest/")
# Value generators that are named like what they make, and the scores behind any choice.
OTHER_THINGS = {
    "cases/values.py": {"counts", "temperature", "top_k", "weight"},
    "cases/domain.py": {"weight"},
    "cases/legal.py": {"rows"},  # a view
    "cases/ranked.py": {"rows"},
    "execution/placing.py": {"rows"},
    "execution/ranked.py": {"rows"},
    "judgement/golden.py": {"scores"},
    "runner/proven.py": {"rows"},  # a service
}
LONGEST = 500  # lines of a file
OP_LONGEST = 120
EXCEPTIONS = {
    "conformance/cases/discrepancies.py": "a table of data",
    "tests/plain/test_references.py": "a second opinion on each reference, which are counted there",
    "tests/torch/test_torch_backend.py": "one class per kind of kernel, and what they share",
}


def texts(source: str) -> Iterator[tuple[int, str]]:
    """The string constants of a program and their lines, docstrings left out."""
    tree = ast.parse(source)
    documents = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            yield node.lineno, node.value


def names_an_op(text: str) -> str:
    """The op or the operand of an op that a text names, or ""."""
    operands = {o.name for c in contracts().values() for o in c.signature.of_kind(ARRAY) if len(o.name) > 2}
    operands -= {"index", "table"}  # words of Python and of the value generators
    op = re.match(r"(\w+)(,|\.|$)", text)
    return text if text in operands else op[1] if op and op[1] in contracts() else ""


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_conformance_names_no_op():
    wrong = []
    for file in files("conformance"):
        path = file.relative_to(ROOT / "conformance").as_posix()
        for line, text in () if path.startswith(TABLES) else texts(file.read_text(encoding="utf-8")):
            if (op := names_an_op(text)) and text not in OTHER_THINGS.get(path, ()):
                wrong.append(f"conformance/{path}:{line} names {op}: state it in ops/{op}.py")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("text", ["topk", "grouped_gemm", "topk,T=7", "linear.w", "logits", "target"])
def test_the_name_of_an_op_or_operand_would_be_seen(text):
    assert names_an_op(text)


@pytest.mark.parametrize("folder", ["hal", "ops", "model", "conformance", "bench", "cli"])
def test_no_chip_is_named_outside_its_folder(folder):
    """`reference` is what all others are judged by, two are packages as well; a vendor's chip stands in its folder alone."""
    chips = set(backend_names()) - {"reference", "torch", "cpu", "onnxruntime"}
    assert chips
    wrong = []
    for file in files(folder):
        for line, text in texts(file.read_text(encoding="utf-8")):
            if text in chips:
                wrong.append(f"{file.relative_to(ROOT)}:{line} names {text}: state it in backends/{text}")
    assert not wrong, "\n".join(wrong)


def test_an_adapter_and_its_stand_in_import_nothing_of_each_other():
    """The stand-in is written from the vendor's pages alone, so that an adapter is held to what these promise."""
    stand_ins = sorted((ROOT / "backends").glob("*/emulated*"))
    assert stand_ins
    for stand_in in stand_ins:
        own = {stand_in} if stand_in.suffix else set(stand_in.rglob("*.py"))
        for file in own:
            assert f"porthal.backends.{stand_in.parent.name}.backend" not in file.read_text(encoding="utf-8"), file
    for chip in {stand_in.parent for stand_in in stand_ins}:
        for adapter in (file for file in chip.rglob("*.py") if not file.relative_to(chip).parts[0].startswith("emulated")):
            assert "emulated import" not in adapter.read_text(encoding="utf-8"), adapter


@pytest.mark.parametrize("folder", ["hal", "ops", "backends", "model", "conformance", "bench", "cli", "tests"])
def test_files_stay_within_their_budget(folder):
    wrong, seen = [], set()
    for file in files(folder):
        path, lines = file.relative_to(ROOT).as_posix(), len(file.read_text(encoding="utf-8").splitlines())
        most = OP_LONGEST if folder == "ops" else LONGEST
        if lines > most:
            seen.add(path)
            if path not in EXCEPTIONS:
                wrong.append(f"{path} has {lines} lines, expected at most {most}: split it, or say in EXCEPTIONS why not")
    assert not wrong, "\n".join(wrong)
    assert {p for p in EXCEPTIONS if p.startswith(f"{folder}/")} == seen, "an exception that is no longer needed"
