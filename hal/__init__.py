"""The abstraction: contracts, operands, backends, binding. Imports nothing above it.

A name comes from its file when it is first used: to list the backends takes no NumPy.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if not __name__.startswith("porthal."):
    raise ImportError(f"import porthal.{__name__} instead of {__name__}: two names make two registries.")

if TYPE_CHECKING:
    from porthal.hal.backend import Backend, Kernel, Peak, Place, Traits
    from porthal.hal.binding import Binding, Callers, bind, called, checked, use
    from porthal.hal.choice import Choice
    from porthal.hal.contract import CallSpec, Contract, collectives, contract, contracts, operators
    from porthal.hal.discovery import Probe, backend_names, best, create, emulatable, probe, probes, running, selected
    from porthal.hal.dtypes import FLOATS, MOVED, UNIT_ROUNDOFF, dtype, narrow, numpy_dtype, widen
    from porthal.hal.errors import (
        DataNotTaken,
        NotClaimed,
        NotFinite,
        PeerLost,
        PorthalError,
        Unavailable,
        UsageError,
        note,
    )
    from porthal.hal.limits import (
        ANY_SCHEME,
        Need,
        any_of,
        at_least,
        at_most,
        between,
        limits,
        multiple_of,
        multiple_of_bytes,
        one_of,
        per_dtype,
        same_as,
    )
    from porthal.hal.operands import (
        KINDS,
        Batch,
        Communicator,
        CommunicatorSpec,
        Operand,
        Pages,
        PagesSpec,
        Quantised,
        QuantisedSpec,
        Rows,
        Selection,
        SelectionSpec,
        Weight,
        WeightSpec,
    )
    from porthal.hal.recorder import Recorder, callers, recorded
    from porthal.hal.scheme import SCHEMES, Scheme, scheme_of
    from porthal.hal.spans import Reals
    from porthal.hal.tuned import cache_folder
    from porthal.hal.wire import simulated

__all__ = [
    "ANY_SCHEME",
    "FLOATS",
    "KINDS",
    "MOVED",
    "SCHEMES",
    "UNIT_ROUNDOFF",
    "Backend",
    "Batch",
    "Binding",
    "CallSpec",
    "Callers",
    "Choice",
    "Communicator",
    "CommunicatorSpec",
    "Contract",
    "DataNotTaken",
    "Kernel",
    "Need",
    "NotClaimed",
    "NotFinite",
    "Operand",
    "Pages",
    "PagesSpec",
    "Peak",
    "PeerLost",
    "Place",
    "PorthalError",
    "Probe",
    "Quantised",
    "QuantisedSpec",
    "Reals",
    "Recorder",
    "Rows",
    "Scheme",
    "Selection",
    "SelectionSpec",
    "Traits",
    "Unavailable",
    "UsageError",
    "Weight",
    "WeightSpec",
    "any_of",
    "at_least",
    "at_most",
    "backend_names",
    "best",
    "between",
    "bind",
    "cache_folder",
    "called",
    "callers",
    "checked",
    "collectives",
    "contract",
    "contracts",
    "create",
    "dtype",
    "emulatable",
    "limits",
    "multiple_of",
    "multiple_of_bytes",
    "narrow",
    "note",
    "numpy_dtype",
    "one_of",
    "operators",
    "per_dtype",
    "probe",
    "probes",
    "recorded",
    "running",
    "same_as",
    "scheme_of",
    "selected",
    "simulated",
    "use",
    "widen",
]

# Where the names are, the files first that need little.
_FILES = (
    "errors", "discovery", "dtypes", "limits", "operands", "scheme", "spans", "wire", "contract", "tuned", "backend", "choice",
    "binding",
    "recorder",
)  # fmt: skip


class _Hal(ModuleType):
    def __getattr__(self, name: str) -> Any:
        for file in _FILES if name in __all__ else ():
            if name in (names := vars(import_module(f"{__name__}.{file}"))):
                setattr(self, name, names[name])
                return names[name]
        raise AttributeError(f"{__name__} has no {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in __all__ or not isinstance(value, ModuleType):  # the function `limits` keeps its place from the file
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Hal
