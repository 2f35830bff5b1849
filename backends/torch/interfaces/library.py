"""A vendor's library of operators: which of its functions are here, and whether they take what a kernel passes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

import torch


class Library:
    """The functions of a module with the arguments that kernels pass: by name, or by place where a "/" stands behind them,
    because the names differ by version or nobody published them. `TMO = Library("torch_mlu_ops", matmul="a b / bias")`, then
    `TMO.matmul(x, w, bias=b)`.

    A function is looked for in the module, then among the operators that its import registers with PyTorch. `proof` is a
    module that tells the library from another one of this name.
    """

    known: ClassVar[dict[str, Library]] = {}

    def __init__(self, module: str, proof: str = "", **calls: str) -> None:
        self.module, self.proof = module, proof
        self.calls = {name: arguments.split() for name, arguments in calls.items()}  # a "/" among them
        self.known[module] = self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = _function(self.module, name)
        vars(self)[name] = function
        return function

    def takes(self, name: str, argument: str) -> bool:
        """Whether the function of this installation has an argument that others lack."""
        parameters = _parameters(_function(self.module, name))
        return parameters is None or argument in parameters

    def lacks(self, name: str) -> str | None:
        """Why the function cannot be called here as kernels call it, or None."""
        for needed in filter(None, (self.module, self.proof)):
            if (error := _absent(needed)) is not None:
                return f"needs the Python module {needed}: {error}"
        try:
            function = _function(self.module, name)
        except AttributeError:
            return f"this {self.module} has no {name}"
        parameters = _parameters(function)
        if parameters is None:
            return None
        given = self.calls[name]
        places = given.index("/") if "/" in given else 0
        if places > len(parameters):
            return f"{name} of this {self.module} takes {len(parameters)} arguments, kernels pass {places}"
        by_name = given[places + 1 :] if places else given
        if unknown := next((a for a in by_name if a not in parameters), None):
            return f"{name} of this {self.module} takes no argument {unknown!r}"
        if missing := next((a for a in list(parameters)[places:] if parameters[a] and a not in by_name), None):
            return f"{name} of this {self.module} wants an argument {missing!r}, which kernels do not pass"
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


def _parameters(function: Callable[..., Any]) -> dict[str, bool] | None:
    """Names of the parameters and whether each must be given; None where that cannot be read, or any name is taken."""
    overload = getattr(function, "default", None)
    if (schema := getattr(overload, "_schema", None)) is not None:
        return {a.name: not a.has_default_value() for a in schema.arguments}
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled code
        return None
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
        return None
    return {p.name: p.default is p.empty for p in parameters}
