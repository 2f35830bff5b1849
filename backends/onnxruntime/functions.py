"""Operators as functions of ONNX in the domain `porthal`, made of standard operators alone: a text each, in `functions`.

A function has the name and the attributes of its contract, and takes the arrays that its operands hold: `kv_c` is the field c
of the pages kv, `sel_length` the lengths of the selection sel, `visible` what a batch says of its rows. A compiler that knows
an operator by this name may put its own kernel in the place of the function's body.

Where a word or an optional operand changes the body, a text is a variant, NAME.VARIANT, which is its overload in ONNX; of
several words, as in `int8_keys.second`, all must be there. A text NAME.SCHEME is one for each scheme of weights, and KEYS,
LATENTS and CACHE likewise: the scheme's name stands where the text says so, and what is beside it below where it says FORM.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import onnx
from onnx import FunctionProto, ModelProto, NodeProto, helper

DOMAIN, VERSION = "porthal", 1
OPSET, IR = 21, 10  # overloads are from IR 10 on; onnx of today writes newer ones, which runtimes of today refuse
HEAD = f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}, "{DOMAIN}": {VERSION}]>\n'
FOLDER = Path(__file__).parent / "functions"
SCHEMES = {  # of weights, and attributes of DequantizeLinear; of the others a graph of this opset has no codes
    "int8_channel": "axis = 0",
    "fp8_block": "axis = 1, block_size = 128",
    "int4_g128": "axis = 1, block_size = 128",
    "int4_g32": "axis = 1, block_size = 32",
}
KEYS = {"int8_keys": "int8", "int8_half_keys": "int8_half"}
LATENTS = {"int8_latents": "int8", "int8_tile_latents": "int8_tile"}
WORDS: dict[str, dict[str, str]] = {"SCHEME": SCHEMES, "KEYS": KEYS, "LATENTS": LATENTS, "CACHE": KEYS | LATENTS}
DTYPES = ("float32", "bfloat16", "float16", "int32", "int64", "int8", "int4", "uint8", "float8_e4m3fn")
SPELLED = {"float32": "FLOAT", "float8_e4m3fn": "FLOAT8E4M3FN"}
CODES = {name: onnx.TensorProto.DataType.Value(SPELLED.get(name, name.upper())) for name in DTYPES}

Value = tuple[str, str, int]  # name, dtype and rank of an input or output


@cache
def variants(name: str) -> tuple[str, ...]:
    """The variants of an operator's function, "" for the plain one; none where it has no function."""
    found = (path.stem.partition(".")[2] for path in FOLDER.glob(f"{name}*.txt") if _named(path) == name)
    return tuple(sorted({variant for text in found for variant in spelled(text)}))


def spelled(stem: str) -> list[str]:
    """What a text is, or a part of its name: itself, or one for each scheme."""
    word = next((word for word in WORDS if word in stem), "")
    return [stem.replace(word, scheme) for scheme in WORDS[word]] if word else [stem]


@cache
def function(name: str, variant: str = "") -> FunctionProto:
    """One function; what it calls are others."""
    stem = f"{name}.{variant}" if variant else name
    named = [(word, scheme, form) for word, forms in WORDS.items() for scheme, form in forms.items() if scheme in stem]
    paths = ((FOLDER / f"{stem.replace(s, word)}.txt", word, s, form) for word, s, form in [("", "", ""), *named])
    path, word, scheme, form = next(found for found in paths if found[0].exists())
    text = path.read_text(encoding="utf-8").replace(word, scheme).replace("FORM", form)
    made = onnx.parser.parse_function(HEAD + text)
    made.overload = variant
    return made


def needed(functions: Iterable[FunctionProto]) -> list[FunctionProto]:
    """Functions and what they call, each once."""
    found = {(f.name, f.overload): f for f in functions}
    for node in [node for f in found.values() for node in nodes(f) if node.domain == DOMAIN]:
        for f in needed([function(node.op_type, node.overload)]):
            found.setdefault((f.name, f.overload), f)
    return list(found.values())


def nodes(f: Any) -> Iterator[NodeProto]:
    """The nodes of a function or graph, those of its loops among them."""
    for node in f.node:
        yield node
        for attribute in node.attribute:
            yield from nodes(attribute.g)


def model(f: FunctionProto, inputs: Sequence[Value], outputs: Sequence[Value], attributes: Mapping[str, Any]) -> ModelProto:
    """A model of one call, whose sizes are free."""

    def declared(values: Sequence[Value]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(n, CODES[t], [f"{n}_{i}" for i in range(rank)]) for n, t, rank in values]

    node = helper.make_node(f.name, list(f.input), list(f.output), domain=DOMAIN, overload=f.overload, **attributes)
    graph = helper.make_graph([node], f.name, declared(inputs), declared(outputs))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, functions=needed([f]), opset_imports=opsets, ir_version=IR)


def _named(path: Path) -> str:
    return path.name.partition(".")[0]
