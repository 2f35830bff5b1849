"""What a contract leaves open: the variations that a call of it may have."""

from __future__ import annotations

from collections.abc import Sequence

from porthal.conformance.cases.values import FLOATING, RELATED
from porthal.hal.contract import Contract
from porthal.hal.signature import ARRAY, OperandSpec

SELECTIONS = ("full", "short", "empty")
Combo = tuple[tuple[str, str], ...]


def options(contract: Contract, operand: str) -> Sequence[str]:
    """The value generators of an operand, the default first."""
    spec = contract.signature[operand]
    if operand in contract.values:
        return contract.values[operand]
    if spec.kind == "Selection":
        return SELECTIONS
    if operand in contract.ranges:
        return ("index",)
    return ("weight",) if spec.kind == "Weight" else ("normal",)


def fitting(contract: Contract, operand: str) -> Sequence[str]:
    """All value generators whose values are legal for an operand: its options, and whatever else has their domain."""
    own = options(contract, operand)
    domain = FLOATING if own[0] in FLOATING else RELATED.get(own[0], ())
    return tuple(dict.fromkeys((*own, *domain)))


def first_float(contract: Contract) -> str:
    """The operand whose dtype the others follow, or "" where the contract fixes every dtype."""
    return next((o.name for o in contract.signature.operands if len(_choices(contract, o)) > 1), "")


def _choices(contract: Contract, operand: OperandSpec) -> tuple[str, ...]:
    return contract.dtypes.get(operand.name, ())


def combos(contract: Contract) -> list[Combo]:
    """Every base dtype with all operands following it, then with a different dtype wherever one is allowed."""
    first = first_float(contract)
    if not first:
        return [()]
    bases = _choices(contract, contract.signature[first])
    found: list[Combo] = [((first, base),) for base in bases]
    for base in bases:
        other = []
        for operand in contract.signature.operands:
            if operand.name != first and len(choices := _choices(contract, operand)) > 1:
                last = base if choices[-1] == first else choices[-1]
                if last != (base if choices[0] == first else choices[0]):
                    other.append((operand.name, last))
        if other:
            found.append(((first, base), *other))
    return found


def mixed(contract: Contract) -> list[Combo]:
    """One operand alone in a dtype of its own, where several can be."""
    return [(combo[0], one) for combo in combos(contract) if combo[2:] for one in combo[1:]]


def absences(contract: Contract) -> list[tuple[str, ...]]:
    """Each optional operand left out, together with the optional page fields of the same width."""
    operands = contract.signature.operands
    fields = {width: name for o in operands for name, width, optional in o.fields if optional}
    found = []
    for operand in operands:
        if operand.optional:
            found.append((operand.name, *(fields.pop(d) for d in operand.dims if d in fields)))
    return [*found, *((name,) for name in fields.values())]


def schemes_alike(contract: Contract) -> list[tuple[tuple[str, str], ...]]:
    """Each scheme, of all operands that may be under it."""
    taken = contract.schemes
    names = dict.fromkeys(name for names in taken.values() for name in names)
    return [tuple((operand, name) for operand, known in taken.items() if name in known) for name in names]


def free_symbols(contract: Contract) -> list[str]:
    """The sizes that a case chooses: neither the batch's nor attributes."""
    bound = {d for o in contract.signature.of_kind("Batch") for d in o.dims}
    return [s for s in contract.cases if s in contract.signature.symbols() - bound and s not in contract.attributes]


def per_expert(contract: Contract) -> str:
    """The integer operand that says how many rows each expert of the weights has, or ""."""
    leading = {w.dims[:1] for w in contract.signature.of_kind("Weight")}
    counted = [o for o in contract.signature.of_kind(ARRAY) if o.dims in leading and o.name in contract.ranges]
    return counted[0].name if counted else ""


def joined(contract: Contract) -> list[str]:
    """The arrays whose rows may lie side by side in one buffer, as a product gives them that is then cut."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for operand in contract.signature.of_kind(ARRAY):
        alike = groups.setdefault(operand.dims[:-1], [])
        kinds = _choices(contract, operand)
        if len(operand.dims) > 1 and (not alike or kinds in ((alike[0],), _choices(contract, contract.signature[alike[0]]))):
            alike.append(operand.name)
    return next((names for names in groups.values() if len(names) > 1), [])


def takes_integers(contract: Contract, operand: str) -> bool:
    """Whether an operand takes any floats, and so small integers."""
    plain = options(contract, operand)[0] in ("normal", "weight")
    return plain and contract.signature[operand].typed
