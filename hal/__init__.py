"""The abstraction: contracts, operands, backends, binding. Imports nothing above it."""

if not __name__.startswith("porthal."):
    raise ImportError("hal is a room of porthal: import porthal.hal instead of hal")

from porthal.hal.backend import Backend, Kernel, Place
from porthal.hal.binding import Binding, Choice, bind, checked, selected, use
from porthal.hal.contract import CallSpec, Contract, contract, contracts
from porthal.hal.discovery import Probe, backend_names, best, create, probe
from porthal.hal.dtypes import FLOATS, UNIT_ROUNDOFF, dtype, narrow, numpy_dtype, widen
from porthal.hal.errors import NotClaimed, PorthalError, Unavailable, UsageError
from porthal.hal.limits import any_of, at_least, at_most, limits, multiple_of, one_of
from porthal.hal.operands import (
    Batch,
    Pages,
    PagesSpec,
    Rows,
    Selection,
    SelectionSpec,
    Weight,
    WeightSpec,
)

__all__ = [
    "FLOATS",
    "UNIT_ROUNDOFF",
    "Backend",
    "Batch",
    "Binding",
    "CallSpec",
    "Choice",
    "Contract",
    "Kernel",
    "NotClaimed",
    "Pages",
    "PagesSpec",
    "Place",
    "PorthalError",
    "Probe",
    "Rows",
    "Selection",
    "SelectionSpec",
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
    "limits",
    "multiple_of",
    "narrow",
    "numpy_dtype",
    "one_of",
    "probe",
    "selected",
    "use",
    "widen",
]
