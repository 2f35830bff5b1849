"""torch_npu's ops as the adapter calls them: found by their schemas, and called by keyword alone.

Schemas drift between post releases of one version, so a call is looked for by name and arguments, never by a version.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch_npu

from porthal.hal import limits, one_of

F = TypeVar("F", bound=Callable[..., Any])

FLOATS = one_of("float32", "bfloat16", "float16")
HALVES = one_of("bfloat16", "float16")


class Call:
    """An op of torch_npu and the arguments that it is given."""

    def __init__(self, name: str, *arguments: str) -> None:
        self.name, self.arguments = name, frozenset(arguments)

    def __call__(self, **given: Any) -> Any:
        return getattr(torch.ops.npu, self.name)(**given)

    def missing(self) -> str | None:
        """Why this torch_npu cannot be called so, or None."""
        version = f"this torch_npu ({torch_npu.__version__})"
        op = getattr(torch.ops.npu, self.name, None)
        if op is None:
            return f"{version} has no {self.name}: install one for CANN 8.5 or later"
        unknown: set[str] = set()
        for overload in op.overloads():
            taken = getattr(op, overload)._schema.arguments
            unknown = self.arguments - {a.name for a in taken}
            if not unknown and {a.name for a in taken if not a.has_default_value()} <= self.arguments:
                return None
        what = f"takes no {', '.join(sorted(unknown))}" if unknown else "asks for more arguments"
        return f"{self.name} of {version} {what}: the adapter is written for the schema of torch-npu 2.13"


def calling(*made: Call, **stated: Any) -> Callable[[F], F]:
    """`@limits` of a kernel that makes these calls, of which the first names it."""

    def attach(f: F) -> F:
        vars(f)["calls"] = made
        return limits(provider=f"torch_npu.{made[0].name}", **stated)(f)

    return attach
