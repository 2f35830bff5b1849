"""`porthal new-backend`: a plugin package for a chip, with a stub per op made from the installed contracts."""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Literal, NamedTuple

from porthal.hal import Backend, Contract, UsageError, backend_names, contracts
from porthal.hal.contract import Attribute
from porthal.model.config import Config
from porthal.model.load import DEMO, profile

TEMPLATES = Path(__file__).parent / "templates"  # laid out as the package they make
WIDTH = 114  # of a stub's lines; behind "    # " they end at column 120
FIRST = "rms_norm"  # two arrays, no cache, no packed weight, and in every layer
STUB = re.compile(r"def (\w+)")
RESERVED = ("backend", "composed", "error")  # the protocol's class, and words of PORTHAL_OPS and PORTHAL_FALLBACK


class Group(NamedTuple):
    """Stubs listed together, and their heading."""

    title: str
    stubs: Sequence[str]


def new_backend(name: str, base: Literal["reference", "torch"] = "reference", folder: Path | None = None) -> Path:
    """Write the package porthal-NAME into `folder` (None: porthal-NAME, here), which it returns.

    UsageError where the name cannot be that of a new backend, or the folder holds something or cannot be written.
    """
    _check_name(name)
    folder = folder or Path(f"porthal-{name}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder: give a new one with --dir")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    module = f"porthal_{name}"
    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    facts = {"name": name, "module": module, "base": base, "first": FIRST, "groups": groups()}
    facts["class_name"] = "".join(part.capitalize() for part in name.split("_"))
    try:
        for template in sorted(TEMPLATES.rglob("*.j2")):
            inside = template.relative_to(TEMPLATES).as_posix()
            file = folder / inside.replace("package/", f"{module}/").removesuffix(".j2")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(jinja.get_template(inside).render(facts), encoding="utf-8")
            file.chmod(0o755 if file.suffix == ".sh" else 0o644)
    except OSError as error:
        raise UsageError(f"cannot write {error.filename}: {error.strerror}; give another folder with --dir") from None
    return folder


def groups() -> list[Group]:
    """Every op's stub: primitives in the order of a model's first calls, composites likewise, then the rest."""
    known = contracts()
    called = [known[op] for op in dict.fromkeys([FIRST, *profile(Config.read(DEMO))])]
    return [
        Group(
            f"primitives: {FIRST} to begin with, then in the order of the demo model's calls",
            [stub(c) for c in called if not c.decomposition],
        ),
        Group(
            "composites: made of the primitives, unless there is a kernel here",
            [stub(c) for c in called if c.decomposition],
        ),
        Group("further ops, which the demo model does not call", [stub(c) for c in known.values() if c not in called]),
    ]


def stub(contract: Contract) -> str:
    """A method for an op, in Python: its exact signature, its formula, shapes and dtypes; it raises."""
    parameters = ["self", *(o.name + "=None" * o.optional for o in contract.signature.operands)]
    if contract.attributes:
        parameters += ["*", *map(_attribute, contract.attributes.values())]
    dtypes = (f"{name}: {' | '.join(_dtype(o, contract) for o in options)}" for name, options in contract.dtypes.items())
    results = ", ".join(r.name for r in contract.signature.results)
    body = [
        '"""' + str(contract.__doc__).partition("\n\n")[0],
        "",
        *_lines(contract.signature.text),
        *_lines("; ".join(dtypes)),
        '"""',
        f'raise NotImplementedError("{contract.name}")  # return {results}',
    ]
    head = _lines(f"def {contract.name}({', '.join(parameters)}):", indent=8)
    return "\n".join([*head, *("    " * bool(line) + line for line in body)])


def next_step(backend: Backend, ops: Sequence[str]) -> str:
    """What to do where none of these ops ran on a kernel of the backend's own: which to write first, where, and the next; of
    those that are written, that they took no call."""
    where = inspect.getfile(type(backend))
    if written := [op for op in ops if op in vars(type(backend))]:
        return f"`{written[0]}` in {where} took none of these calls: its @limits say what it takes"
    stubs = [STUB.findall(stub)[0] for group in groups() for stub in group.stubs]
    first, *others = [op for op in stubs if op in ops] or ops  # those of several ranks have no stub
    following = f", the next: {', '.join(others[:3])}" if others else ""
    return f"begin with `{first}` in {where}{following}"


def _check_name(name: str) -> None:
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UsageError(f"{name!r} cannot name a backend: expected a Python identifier in lower case, such as mychip")
    if name in backend_names():
        raise UsageError(f"backend {name!r} exists already: choose a name other than {', '.join(backend_names())}")
    if name in RESERVED:
        raise UsageError(f"{name!r} is reserved by porthal: choose a name other than {', '.join(RESERVED)}")


def _attribute(attribute: Attribute) -> str:
    default = "" if attribute.default is inspect.Parameter.empty else f" = {attribute.default!r}"
    return f"{attribute.name}: {attribute.type.__name__}{default}"


def _dtype(option: str, contract: Contract) -> str:
    if option.startswith("@"):
        return f"as {option[1:]} says"
    return f"like {option}" if option in contract.dtypes else option


def _lines(text: str, indent: int = 4) -> list[str]:
    """Wrapped between operands, never inside one."""
    whole = re.sub(r"\[[^]]*\]|\{[^}]*\}|: | = | \| |like ", lambda m: m[0].replace(" ", "\0"), text)
    lines = wrap(whole, WIDTH - 4, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]
