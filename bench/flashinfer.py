"""Data sets of FlashInfer-Bench, which others have taken over: read as calls to be timed, written from the calls of a step.

DIR/definitions/TYPE/NAME.json says what an operator is: axes with fixed or variable sizes, the shapes and dtypes of its inputs
and outputs, and Python code. DIR/workloads/TYPE/NAME.jsonl has a line for each workload: the sizes of the variable axes.
Values may lie in files beside it; they are not read, since a call here is judged on inputs of its own.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from porthal.bench.scale import BLOCK_SIZE
from porthal.conformance.cases.compositions import Request
from porthal.hal import FLOATS, CallSpec, UsageError, contracts

Shape = tuple[str, ...]
EXPECTED = "expected the folder of a FlashInfer-Bench data set, or one of its workloads/**/*.jsonl"


@dataclass(frozen=True)
class Kind:
    """An operator of theirs that is one of ours: `axes` by their names, which are our dims; `inputs` and `outputs` by their
    names, with their shape and our operand, "" for what is no operand of ours."""

    op: str
    type: str
    name: str
    axes: Mapping[str, str]
    variable: Shape
    inputs: Mapping[str, tuple[Shape, str]]
    outputs: Mapping[str, tuple[Shape, str]]
    reference: str
    fixed: Mapping[str, str] = field(default_factory=dict)  # dtypes of what is no operand of ours
    scalars: Mapping[str, str] = field(default_factory=dict)  # attributes of ours

    def mismatch(self, definition: Mapping[str, Any]) -> str:
        """Why a definition is not of this kind, or ""."""
        shapes = {n: tuple(t["shape"] or ()) for side in ("inputs", "outputs") for n, t in definition[side].items()}
        mine = {n: shape for n, (shape, _) in (*self.inputs.items(), *self.outputs.items())} | dict.fromkeys(self.scalars, ())
        if shapes != mine or set(definition["axes"]) != set(self.axes):
            return "no contract has its inputs and outputs"
        wrong = [t["dtype"] for n, t in definition["inputs"].items() if n in self.inputs and self.inputs[n][1]
                 and t["dtype"] not in FLOATS]  # fmt: skip
        return f"no contract takes {wrong[0]}" if wrong else ""


H = ("batch_size", "hidden_size")
NORM = """import torch

EPS = 1e-5


def run(hidden_states, {residual}weight):
    x = hidden_states.float(){sum}
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.float()
    return y.to(hidden_states.dtype)
"""
ATTENTION = """import math

import torch


def run(q_nope, q_pe, ckv_cache, kpe_cache, sparse_indices, sm_scale):
    keys, values = torch.cat([ckv_cache, kpe_cache], -1).flatten(0, 1).float(), ckv_cache.flatten(0, 1).float()
    output, lse = torch.zeros_like(q_nope), torch.full(q_nope.shape[:2], -torch.inf, device=q_nope.device)
    for t, row in enumerate(sparse_indices):
        at = row[row >= 0].long()
        if len(at):
            logits = torch.cat([q_nope[t], q_pe[t]], -1).float() @ keys[at].T * sm_scale
            output[t] = (torch.softmax(logits, -1) @ values[at]).to(output.dtype)
            lse[t] = torch.logsumexp(logits, -1) / math.log(2)
    return output, lse
"""
KINDS = (
    Kind(
        "linear",
        "gemm",
        "gemm_n{N}_k{K}",
        {"M": "T", "N": "N", "K": "K"},
        ("M",),
        {"A": (("M", "K"), "x"), "B": (("N", "K"), "w")},
        {"C": (("M", "N"), "y")},
        "import torch\n\n\ndef run(A, B):\n    return (A.float() @ B.float().T).to({dtype})\n",
    ),
    Kind(
        "rms_norm",
        "rmsnorm",
        "rmsnorm_h{hidden_size}",
        {"batch_size": "T", "hidden_size": "H"},
        ("batch_size",),
        {"hidden_states": (H, "x"), "weight": (H[1:], "weight")},
        {"output": (H, "y")},
        NORM.format(residual="", sum=""),
    ),
    Kind(
        "add_rms_norm",
        "rmsnorm",
        "fused_add_rmsnorm_h{hidden_size}",
        {"batch_size": "T", "hidden_size": "H"},
        ("batch_size",),
        {"hidden_states": (H, "x"), "residual": (H, "residual"), "weight": (H[1:], "weight")},
        {"output": (H, "y")},
        NORM.format(residual="residual, ", sum=" + residual.float()"),
    ),
    Kind(
        "sparse_mla",
        "dsa_paged",
        "dsa_sparse_attention_h{num_qo_heads}_ckv{head_dim_ckv}_kpe{head_dim_kpe}_topk{topk}_ps{page_size}",
        {
            "num_tokens": "T",
            "num_qo_heads": "N",
            "head_dim_ckv": "C",
            "head_dim_kpe": "R",
            "page_size": "block_size",
            "topk": "k",
            "num_pages": "P",
        },
        ("num_tokens", "num_pages"),
        {
            "q_nope": (("num_tokens", "num_qo_heads", "head_dim_ckv"), "q_latent"),
            "q_pe": (("num_tokens", "num_qo_heads", "head_dim_kpe"), "q_rope"),
            "ckv_cache": (("num_pages", "page_size", "head_dim_ckv"), "kv"),
            "kpe_cache": (("num_pages", "page_size", "head_dim_kpe"), "kv"),
            "sparse_indices": (("num_tokens", "topk"), ""),
        },
        {
            "output": (("num_tokens", "num_qo_heads", "head_dim_ckv"), "o"),
            "lse": (("num_tokens", "num_qo_heads"), ""),
        },
        ATTENTION,
        fixed={"sparse_indices": "int32", "lse": "float32"},
        scalars={"sm_scale": "scale"},
    ),
)


# -- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    """A workload as a call of ours, and the requests of its batch."""

    definition: str
    op: str
    spec: CallSpec
    requests: tuple[Request, ...]


def read(path: Path) -> tuple[list[Listed], list[str]]:
    """The workloads of a data set, or of one of its files, as calls; and in words which definitions are left out, and why.

    Raises UsageError for what cannot be read, and where nothing is left.
    """
    files = sorted((path / "workloads").rglob("*.jsonl")) if path.is_dir() else [path]
    root = path if path.is_dir() else next((p.parent for p in path.absolute().parents if p.name == "workloads"), None)
    if root is None or not files:
        raise UsageError(f"{path} has no workloads: {EXPECTED}")
    definitions = {d["name"]: d for d in map(_definition, sorted((root / "definitions").rglob("*.json")))}
    found, left = [], {}
    for file in files:
        for n, line in enumerate(_text(file).splitlines(), 1):
            where = f"line {n} of {file}"
            try:
                traced = json.loads(line)
                name, axes = traced["definition"], traced["workload"]["axes"]
                scalars = {k: v["value"] for k, v in traced["workload"]["inputs"].items() if v["type"] == "scalar"}
                definition = definitions.get(name)
                if definition is None:
                    raise UsageError(f"{where} is of {name!r}: expected a definition of that name under {root / 'definitions'}")
                kind, why = _kind(definition)
                if kind is None:
                    left[name] = why
                else:
                    found.append(_listed(kind, definition, axes, scalars))
            except UsageError:
                raise
            except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
                raise UsageError(f"{where} is no workload ({type(error).__name__}: {error}): {EXPECTED}") from None
    told = [f"{name} is left out: {why}" for name, why in left.items()]
    if not found:
        raise UsageError(f"{path} has no workload that a contract takes: {'; '.join(told) or 'its files are empty'}")
    return found, told


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {file}: {getattr(error, 'strerror', None) or 'it is not text'}") from None


def _definition(file: Path) -> dict[str, Any]:
    try:
        made = dict(json.loads(_text(file)))
        for side in ("inputs", "outputs"):
            for tensor in made[side].values():
                tuple(tensor["shape"] or ()), str(tensor["dtype"])
        for axis in made["axes"].values():
            if axis["type"] == "const":
                int(axis["value"])
        return made | {"name": str(made["name"]), "op_type": str(made["op_type"])}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"{file} is no definition ({type(error).__name__}: {error}): {EXPECTED}") from None


def _kind(definition: Mapping[str, Any]) -> tuple[Kind | None, str]:
    why = "no contract is of that kind"
    for kind in KINDS:
        if kind.type == definition["op_type"]:
            why = kind.mismatch(definition)
            if not why:
                return kind, ""
    return None, why


def _listed(kind: Kind, definition: Mapping[str, Any], axes: Mapping[str, Any], scalars: Mapping[str, Any]) -> Listed:
    given = {n: axes[n] if axis["type"] == "var" else axis["value"] for n, axis in definition["axes"].items()}
    if wrong := [n for n, size in given.items() if type(size) is not int or size < 0]:
        raise ValueError(f"{wrong[0]} is {given[wrong[0]]!r}")
    dims = {kind.axes[name]: size for name, size in given.items()}
    tensors = {**definition["inputs"], **definition["outputs"]}
    dtypes = {operand: tensors[n]["dtype"] for n, (_, operand) in kind.inputs.items() if operand}
    contract = contracts()[kind.op]
    attrs = {name: a.default for name, a in contract.attributes.items()}
    attrs |= {ours: float(scalars[theirs]) for theirs, ours in kind.scalars.items()}
    if "out" in attrs and (made := tensors[next(iter(kind.outputs))]["dtype"]) != dtypes["x"]:
        attrs["out"] = made
    pages = dims.pop("P", 0)
    requests = (Request(dims["T"], pages * dims["block_size"]) if pages else Request(1, 1),)
    return Listed(definition["name"], kind.op, CallSpec(dims, dtypes, attrs, {}), requests)


# -- writing ---------------------------------------------------------------------------------------------------------


def write(folder: Path, calls: Sequence[tuple[str, CallSpec]], context: int) -> list[str]:
    """Write the calls of a step over a context as definitions and workloads; which ops are left out. A call is written once.

    Raises UsageError for a folder that cannot be written.
    """
    kinds = {kind.op: kind for kind in KINDS}
    made: dict[str, dict[str, Any]] = {}
    lines: dict[str, list[str]] = {}
    for op, spec in dict.fromkeys(calls):
        if op in kinds:
            definition, workload = _written(kinds[op], spec, context)
            name = definition["name"]
            if made.setdefault(name, definition) != definition:  # of the same sizes and other dtypes
                kept = "_".join(dict.fromkeys(t["dtype"] for side in ("inputs", "outputs") for t in definition[side].values()))
                definition["name"] = name = f"{name}_{kept}"
                made.setdefault(name, definition)
            line = json.dumps({"definition": name, "workload": workload, "solution": None, "evaluation": None})
            if line not in lines.setdefault(name, []):
                lines[name].append(line)
    for name, definition in made.items():
        for room, file, text in (
            ("definitions", f"{name}.json", json.dumps(definition, indent=2)),
            ("workloads", f"{name}.jsonl", "\n".join(lines[name])),
        ):
            home = folder / room / definition["op_type"]
            try:
                home.mkdir(parents=True, exist_ok=True)
                (home / file).write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                raise UsageError(f"cannot write {home / file}: {error.strerror}") from None
    return sorted({op for op, _ in calls} - set(kinds))


def _written(kind: Kind, spec: CallSpec, context: int) -> tuple[dict[str, Any], dict[str, Any]]:
    sizes = {**spec.dims, **spec.attrs, "block_size": BLOCK_SIZE, "P": -(-context // BLOCK_SIZE)}
    axes = {theirs: sizes[ours] for theirs, ours in kind.axes.items()}
    first = next(iter(kind.inputs.values()))[1]
    result = spec.attrs.get("out", "x")
    dtype = spec.dtypes[first] if result == "x" else result

    def tensors(named: Mapping[str, tuple[Shape, str]], of: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, (shape, operand) in named.items():
            yield name, {"shape": list(shape), "dtype": kind.fixed.get(name) or of.get(operand, dtype)}

    inputs = dict(tensors(kind.inputs, spec.dtypes)) | {n: {"shape": None, "dtype": "float32"} for n in kind.scalars}
    definition = {
        "name": kind.name.format(**axes),
        "op_type": kind.type,
        "axes": {n: {"type": "var"} if n in kind.variable else {"type": "const", "value": axes[n]} for n in axes},
        "inputs": inputs,
        "outputs": dict(tensors(kind.outputs, {})),
        "reference": kind.reference.replace("{dtype}", f"torch.{dtype}"),
    }
    given = {n: {"type": "random"} for n in kind.inputs}
    given |= {n: {"type": "scalar", "value": spec.attrs[ours]} for n, ours in kind.scalars.items()}
    workload = {"axes": {n: axes[n] for n in kind.variable}, "inputs": given}
    token = json.dumps([definition, workload], sort_keys=True)
    return definition, {"uuid": str(uuid.uuid5(uuid.NAMESPACE_OID, token)), **workload}
