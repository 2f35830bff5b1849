"""One call that is tested, and the token that replays it anywhere."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from porthal.conformance.cases.domain import options
from porthal.conformance.cases.legal import DISTINCT, LARGEST, elements, refusal
from porthal.hal import UsageError, operators
from porthal.hal.contract import PAGE_SIZES, Contract
from porthal.hal.scheme import NONE
from porthal.hal.spans import worded

_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_LONG = {v: k for k, v in _SHORT.items()}
_NAMED = {"batch": "composition", "view": "view", "fault": "fault", "via": "provider", "seq": "program"}
_COUNTED = {"block_size": worded(PAGE_SIZES), "distinct": DISTINCT}
_NUMBER = f"a whole number from 0 to {LARGEST['size']}"


@dataclass(frozen=True)
class Case:
    """One concrete call: everything its inputs are a function of.

    dims     the symbols that the batch does not bind, T among them
    attrs    attributes that differ from their defaults
    dtypes   per operand; operands not named here follow their contract's first option
    recipes  operand -> value generator, where it is not the first of the contract's
    absent   optional operands and page fields that are left out
    batch    a composition's name, or its requests: "1/5+4/130/1" has one of 1 query row that sees 5 keys and one of 4
             rows that sees 130 keys and shares its first page with the request before
    distinct where not 0: along what is independent all rows are copies of so few (see `copies`), so that a call of any size
             has a small golden
    seq      a program, whose steps are calls of this shape (see `programs`)
    fault    a deliberate mistake, to which the checked binding must answer with a UsageError
    capture  the call is captured as a graph, and replayed with other values in its memory
    schemes  operand -> scheme, where it is not none or, of quantised activations, the contract's first
    via      the provider whose kernel is to run, where the backend has several for the op
    """

    op: str
    dims: tuple[tuple[str, int], ...] = ()
    attrs: tuple[tuple[str, Any], ...] = ()
    dtypes: tuple[tuple[str, str], ...] = ()
    recipes: tuple[tuple[str, str], ...] = ()
    absent: tuple[str, ...] = ()
    batch: str = ""
    block_size: int = 0
    distinct: int = 0
    view: str = ""
    seq: str = ""
    fault: str = ""
    capture: bool = False
    via: str = ""
    seed: int = 0
    schemes: tuple[tuple[str, str], ...] = ()

    @property
    def contract(self) -> Contract:
        return operators()[self.op]

    @property
    def attributes(self) -> dict[str, Any]:
        """Every attribute, those of the contract's defaults among them."""
        return {a.name: a.default for a in self.contract.attributes.values()} | dict(self.attrs)

    @property
    def token(self) -> str:
        """The case as text: "rms_norm,T=7,H=96,x:bf16,x~small,view=columns,0", "topk@2,..." where the contract has changed."""
        version = self.contract.version
        return self._text(f"{self.op}@{version}" if version > 1 else self.op, f"via={self.via}" if self.via else "")

    @property
    def stream(self) -> str:
        """The seed of its values: the token without version and provider, which do not change them."""
        return self._text(self.op, "")

    def _text(self, op: str, via: str) -> str:
        parts = [op]
        parts += [f"{k}={v}" for k, v in self.dims]
        parts += [f"{k}={v}" for k, v in self.attrs]
        parts += [f"{k}:{_SHORT.get(v, v)}" for k, v in self.dtypes]
        parts += [f"{k}~{v}" for k, v in self.recipes]
        parts += [f"{k}%{v}" for k, v in self.schemes]
        parts += [f"-{k}" for k in self.absent]
        names = ("batch", "block_size", "distinct", "view", "seq", "fault")
        parts += [f"{k}={v}" for k in names if (v := getattr(self, k))]
        parts += ["capture"] * self.capture
        return ",".join([*parts, *filter(None, [via]), str(self.seed)])

    @classmethod
    def from_token(cls, token: str) -> Case:
        """The case a token describes; UsageError where it describes none that can be built."""
        head, *parts = token.split(",")
        op, _, version = head.partition("@")
        if why := _misshapen(op, parts) if token.isprintable() else _NEITHER:
            raise UsageError(f"{token!r} is not a case token: {why}")
        contract = operators()[op]
        _check_version(token, contract, version)
        found: dict[str, list[Any]] = {k: [] for k in ("dims", "attrs", "dtypes", "recipes", "schemes", "absent")}
        named: dict[str, Any] = {}

        def wrong(why: str) -> UsageError:
            return UsageError(f"case token {token!r} does not describe a call of {op}: {why}")

        for part in parts[:-1]:
            name, mark, value = _cut(part)
            number = _number(value, LARGEST["size"])
            if mark == "-":
                found["absent"].append(name)
            elif mark == ":":
                found["dtypes"].append((name, _LONG.get(value, value)))
            elif mark == "~":
                found["recipes"].append((name, value))
            elif mark == "%":
                found["schemes"].append((name, value))
            elif name in named:
                raise wrong(f"{name} is given twice")
            elif part == "capture":
                named[part] = True
            elif mark == "=" and name in _NAMED:
                named[name] = value
                if not value:
                    raise wrong(f"{part} names no {_NAMED[name]}")
            elif mark == "=" and name in _COUNTED:
                named[name] = number
                if not number:
                    raise wrong(f"{name} is {value or 'empty'}, expected {_COUNTED[name]}")
            elif mark == "=" and name in contract.attributes:
                parsed, expected = _parsed(contract.attributes[name].type, value)
                found["attrs"].append((name, parsed))
                if parsed is None:
                    raise wrong(f"{name} is {value or 'empty'}, expected {expected}")
            elif mark == "=" and number is not None:
                found["dims"].append((name, number))
            elif mark == "=" and name in contract.signature.symbols():
                raise wrong(f"{name} is {value or 'empty'}, expected {_NUMBER}")
            else:
                raise UsageError(f"case token part {part!r} does not apply to {op}: copy the token from a report")
        case = cls(op, seed=int(parts[-1]), **(named | {k: tuple(v) for k, v in found.items()}))
        why = refusal(case)
        most = LARGEST["copied" if case.distinct else "elements"]
        if not why and (n := elements(case)) > most:
            why = f"it holds {n} numbers, expected at most {most}"
        if why:
            raise wrong(why)
        return case

    def recipe(self, operand: str) -> str:
        return dict(self.recipes).get(operand) or options(self.contract, operand)[0]

    def dtype(self, operand: str) -> str:
        """An operand's dtype: given, or the contract's first option resolved."""
        given = dict(self.dtypes)
        name = operand
        while name in self.contract.dtypes and name not in given:
            name = self.contract.dtypes[name][0]
        return given.get(name, name)

    def scheme(self, operand: str) -> str:
        """An operand's scheme: given, or none; of quantised activations, which have one, the contract's first."""
        first = self.contract.schemes[operand][0] if self.contract.signature[operand].kind == "Quantised" else NONE
        return dict(self.schemes).get(operand, first)

    def through(self, provider: str) -> Case:
        """The same call on the kernel of one provider."""
        return replace(self, via=provider)


_NEITHER = "expected op,name=value,...,seed as a report prints it, or the path of a saved .npz"


def _misshapen(op: str, parts: list[str]) -> str:
    """What is wrong with a token's first or last part, or ""."""
    if not parts:
        return _NEITHER
    if op not in operators():
        close = get_close_matches(op, operators(), 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(operators())}"
        return f"unknown op {op!r}, {hint}"
    if _number(parts[-1], LARGEST["seed"]) is None:
        return f"its last part is {parts[-1]!r}, expected the seed, a whole number from 0 to {LARGEST['seed']}"
    return ""


def _check_version(token: str, contract: Contract, version: str) -> None:
    meant = _number(version, LARGEST["size"]) if version else 1
    if meant != contract.version:
        raise UsageError(
            f"case token {token!r} is for version {meant or version} of {contract.name}, expected version "
            f"{contract.version}: run conform again for new tokens, since results of other versions are not comparable"
        )


def _cut(part: str) -> tuple[str, str, str]:
    if part.startswith("-"):
        return part[1:], "-", ""
    for mark in "=:~%":
        name, found, value = part.partition(mark)
        if found:
            return name, mark, value
    return part, "", ""


def _number(text: str, most: int) -> int | None:
    """A plain decimal number up to `most`, or None."""
    plain = text.isascii() and text.isdigit() and len(text) <= 12
    return number if plain and (number := int(text)) <= most else None


def _parsed(kind: type, text: str) -> tuple[Any, str]:
    """An attribute's value, None where the text has none, and what is expected."""
    if kind is bool:
        return {"True": True, "False": False}.get(text), "True or False"
    if kind is int:
        return _number(text, LARGEST["size"]), _NUMBER
    if kind is float:
        plain = re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", text, re.ASCII) and text.count(".") <= 1 and text != "."
        return float(text) if plain and math.isfinite(float(text)) else None, "a finite number"
    return text, "text"
