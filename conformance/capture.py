"""One call as a file: its operands in logical form, its attributes and what was returned, to be judged again anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from porthal.conformance.cases import Case
from porthal.conformance.golden import Golden
from porthal.conformance.inputs import Array, Inputs
from porthal.conformance.judge import judge
from porthal.conformance.runner import execute
from porthal.conformance.verdicts import Judgement
from porthal.hal import (
    Batch,
    Binding,
    Pages,
    PagesSpec,
    Rows,
    Selection,
    SelectionSpec,
    UsageError,
    Weight,
    WeightSpec,
    contracts,
)
from porthal.hal.contract import Contract
from porthal.hal.dtypes import dtype, is_float, narrow

SCHEMA = 1
SCRIPT = '''"""{title}: what the contract says beside what was returned; `python {name}.py BACKEND` judges it there again."""

import sys

import numpy as np

FILE = __file__.removesuffix(".py") + ".npz"
call = np.load(FILE)
for name in (key[7:] for key in call if key.startswith("golden/")):
    print(name, "golden:", call["golden/" + name], "returned:", call.get("returned/" + name, "nothing"), sep="\\n")
for backend in sys.argv[1:]:
    import porthal
    from porthal.conformance.capture import Capture

    print(backend, Capture.read(FILE).again(porthal.bind(backend)))
'''


def observed(contract: Contract, operands: Mapping[str, Any], attrs: Mapping[str, Any]) -> Inputs:
    """A call that was met rather than planned, as the suite's inputs."""
    spec = contract.spec(operands, attrs)
    sizes = {name: size for name, size in spec.dims.items() if isinstance(size, int)}  # no ranges in a call
    page = sizes.pop("block_size", 0)
    case = Case(contract.name, tuple(sizes.items()), tuple(attrs.items()), block_size=page)
    return Inputs(case, operands, attrs, spec)


@dataclass(frozen=True)
class Capture:
    """A call's inputs, and the results that a kernel gave, in logical form; those of pages as "name.field"."""

    inputs: Inputs
    returned: Mapping[str, Array]

    @classmethod
    def of(cls, inputs: Inputs, returned: Mapping[str, Any]) -> Capture:
        return cls(inputs, _flat(returned))

    def golden(self) -> dict[str, Array]:
        """The reference's results in float64."""
        return _flat(Golden(self.inputs).results())

    def again(self, binding: Binding) -> Judgement:
        """The same call on a binding, judged as a conformance case is."""
        return judge(self.inputs, execute(binding, self.inputs), tie=binding.choices[self.inputs.contract.name].tie)

    def save(self, directory: Path, name: str, title: str) -> Path:
        """Write NAME.npz and the script NAME.py that prints it; gives the script's path."""
        arrays, specs = {}, {}
        for operand, value in self.inputs.operands.items():
            specs[operand], parts = _packed(value)
            arrays.update({f"{operand}/{part}": array for part, array in parts.items()})
        arrays.update({f"returned/{part}": array for part, array in self.returned.items()})
        arrays.update({f"golden/{part}": array for part, array in self.golden().items()})
        facts = {
            "schema": SCHEMA,
            "op": self.inputs.contract.name,
            "version": self.inputs.contract.version,
            "attrs": dict(self.inputs.attrs),
            "operands": specs,
            "dtypes": {key: dtype(array) for key, array in arrays.items()},
        }
        directory.mkdir(parents=True, exist_ok=True)
        stored: dict[str, Any] = {key: _plain(array) for key, array in arrays.items()}
        np.savez_compressed(directory / f"{name}.npz", facts=np.array(json.dumps(facts)), **stored)
        script = directory / f"{name}.py"
        script.write_text(SCRIPT.format(title=title, name=name), encoding="utf-8")
        return script

    @classmethod
    def read(cls, file: Path | str) -> Capture:
        """The call in a file that `save` wrote; UsageError where it is of another schema or contract version."""
        with np.load(file) as stored:
            facts = json.loads(str(stored["facts"]))
            arrays = {key: narrow(stored[key], kind) for key, kind in facts["dtypes"].items()}
        contract = contracts()[facts["op"]]
        if (facts["schema"], facts["version"]) != (SCHEMA, contract.version):
            raise UsageError(
                f"{file} has schema {facts['schema']} and {contract.name} {facts['version']}: expected {SCHEMA} and "
                f"{contract.version}; save it again"
            )
        parts: dict[str, dict[str, Array]] = {}
        for key, array in arrays.items():
            owner, _, part = key.partition("/")
            parts.setdefault(owner, {})[part] = array
        operands = {n: _unpacked(spec, parts.get(n, {})) for n, spec in facts["operands"].items()}
        return cls(observed(contract, operands, facts["attrs"]), parts.get("returned", {}))


def _flat(results: Mapping[str, Any]) -> dict[str, Array]:
    """Results by name, those with parts as "name.part"."""
    found = {}
    for name, value in results.items():
        if isinstance(value, (Pages, Selection)):
            value = value.native
        if isinstance(value, Rows):
            value = value._asdict()
        parts = {f"{name}.{part}": array for part, array in value.items()} if isinstance(value, dict) else {name: value}
        found.update(parts)
    return found


def _packed(value: Any) -> tuple[dict[str, Any], dict[str, Array]]:
    """An operand as its spec and its arrays."""
    if value is None:
        return {"kind": "absent"}, {}
    if isinstance(value, Batch):
        parts = {name: getattr(value, name) for name in ("cu_q", "kv_len", "block_table")}
        return {"kind": "Batch", "block_size": value.block_size}, parts
    if isinstance(value, Weight):
        return {"kind": "Weight", **asdict(value.spec)}, {"w": narrow(value.native, value.spec.dtype)}
    if isinstance(value, Pages):
        return {"kind": "Pages", **asdict(value.spec)}, dict(value.native)
    if isinstance(value, Selection):
        return {"kind": "Selection", **asdict(value.spec)}, value.native._asdict()
    return {"kind": "array"}, {"x": value}


def _unpacked(packed: Mapping[str, Any], parts: dict[str, Any]) -> Any:
    facts = dict(packed)
    kind = facts.pop("kind")
    if kind == "Batch":
        return Batch(**parts, **facts)
    if kind == "Weight":
        return Weight(WeightSpec(**facts | {"shape": tuple(facts["shape"])}), parts["w"])
    if kind == "Pages":
        fields = tuple((name, width) for name, width in facts["fields"])
        return Pages(PagesSpec(**facts | {"fields": fields}), parts)
    if kind == "Selection":
        return Selection(SelectionSpec(**facts), Rows(**parts))
    return parts["x"] if kind == "array" else None


def _plain(array: Array) -> Array:
    """Narrow floats as float32, which holds them exactly."""
    return array.astype(np.float32) if array.dtype.itemsize < 4 and is_float(dtype(array)) else array
