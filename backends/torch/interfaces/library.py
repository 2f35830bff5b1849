"""A vendor's library of operators: which of its functions are here, and whether they take what a kernel passes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

import torch

Form = dict[str, bool]  # names of the parameters, and whether each must be given


class Library:
    """The functions of a module with the arguments that kernels pass: by name, or by place where a "/" stands behind them,
    because the names differ by version or nobody published them. `TMO = Library("torch_mlu_ops", matmul="a b / bias")`, then
    `TMO.matmul(x, w, bias=b)`.

    A function is looked for in the module, then among the operators that its import registers with PyTorch. Its signature
    decides, never a version: schemas drift between post releases of one. `proof` is a module that tells the library from
    another one of this name, `wanted` the release that kernels are written for, in words.
    """

    known: ClassVar[dict[str, Library]] = {}

    def __init__(self, module: str, proof: str = "", wanted: str = "", **calls: str) -> None:
        self.module, self.proof, self.wanted = module, proof, wanted
        self.calls = {name: arguments.split() for name, arguments in calls.items()}  # a "/" among them
        self.known[module] = self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = _function(self.module, name)
        vars(self)[name] = function
        return function

    def takes(self, name: str, argument: str) -> bool:
        """Whether the function of this installation has an argument that others lack."""
        forms = _forms(_function(self.module, name))
        return forms is None or any(argument in form for form in forms)

    def lacks(self, name: str) -> str | None:
        """Why the function cannot be called here as kernels call it, or None."""
        for needed in filter(None, (self.module, self.proof)):
            if (error := _absent(needed)) is not None:
                return f"needs the Python module {needed}: {error}"
        version = getattr(import_module(self.module), "__version__", "")
        this = f"this {self.module} {version}".rstrip()
        written = f": kernels are written for {self.wanted}" if self.wanted else ""
        try:
            forms = _forms(_function(self.module, name))
        except AttributeError:
            return f"{this} has no {name}{written}"
        wrong = [self._misfit(name, form) for form in forms or ()]  # of one operator, any overload will do
        return f"{name} of {this} {wrong[0]}{written}" if wrong and all(wrong) else None

    def _misfit(self, name: str, form: Form) -> str | None:
        """Why a function of this form does not take what kernels pass, or None."""
        given = self.calls[name]
        places = given.index("/") if "/" in given else 0
        if places > len(form):
            return f"takes {len(form)} arguments, kernels pass {places}"
        by_name = given[places + 1 :] if places else given
        if unknown := next((a for a in by_name if a not in form), None):
            return f"takes no argument {unknown!r}"
        if missing := next((a for a in list(form)[places:] if form[a] and a not in by_name), None):
            return f"wants an argument {missing!r}, which kernels do not pass"
        return None


def lacks(provider: str) -> str | None:
    """What a kernel's provider lacks, "library.function" or several joined by "+"; None where it names no library known."""
    module = ""
    for part in provider.split("+"):
        path, _, name = part.rpartition(".")
        module = path or module
        library = Library.known.get(module)
        if library and (reason := library.lacks(name)):
            return reason
    return None


@cache
def _absent(module: str) -> str | None:
    """Why a module cannot be imported, in one line, or None."""
    try:
        import_module(module)
    except Exception as error:  # of somebody else's code, of any kind
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def _function(module: str, name: str) -> Callable[..., Any]:
    owner = import_module(module)
    function: Callable[..., Any] = getattr(owner, name, None) or getattr(getattr(torch.ops, module), name)
    return function


def _forms(function: Callable[..., Any]) -> list[Form] | None:
    """One for each overload; None where that cannot be read, or any name is taken."""
    if isinstance(function, torch._ops.OpOverloadPacket):
        schemas = [getattr(function, name)._schema for name in function.overloads()]
        return [{a.name: not a.has_default_value() for a in schema.arguments} for schema in schemas]
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled code
        return None
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
        return None
    return [{p.name: p.default is p.empty for p in parameters}]
