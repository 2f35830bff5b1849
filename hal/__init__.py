"""The abstraction: contracts, operands, backends, binding. Imports nothing above it."""

if not __name__.startswith("porthal."):
    raise ImportError(f"import porthal.{__name__} instead of {__name__}: two names make two registries.")

from porthal.hal.backend import Backend, Kernel, Place, Traits
from porthal.hal.binding import Binding, Choice, bind, checked, selected, use
from porthal.hal.contract import CallSpec, Contract, contract, contracts
from porthal.hal.discovery import Probe, backend_names, best, create, emulatable, probe
from porthal.hal.dtypes import FLOATS, UNIT_ROUNDOFF, dtype, narrow, numpy_dtype, widen
from porthal.hal.errors import DataNotTaken, NotClaimed, PorthalError, Unavailable, UsageError
from porthal.hal.limits import (
    Need,
    any_of,
    at_least,
    at_most,
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
    Operand,
    Pages,
    PagesSpec,
    Rows,
    Selection,
    SelectionSpec,
    Weight,
    WeightSpec,
)
from porthal.hal.recorder import Recorder, recorded

__all__ = [
    "FLOATS",
    "KINDS",
    "UNIT_ROUNDOFF",
    "Backend",
    "Batch",
    "Binding",
    "CallSpec",
    "Choice",
    "Contract",
    "DataNotTaken",
    "Kernel",
    "Need",
    "NotClaimed",
    "Operand",
    "Pages",
    "PagesSpec",
    "Place",
    "PorthalError",
    "Probe",
    "Recorder",
    "Rows",
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
    "bind",
    "checked",
    "contract",
    "contracts",
    "create",
    "dtype",
    "emulatable",
    "limits",
    "multiple_of",
    "multiple_of_bytes",
    "narrow",
    "numpy_dtype",
    "one_of",
    "per_dtype",
    "probe",
    "recorded",
    "same_as",
    "selected",
    "use",
    "widen",
]
