"""The host's processor, in C++ with threads; ops without a native kernel come from the reference."""

import importlib
import importlib.util

from porthal.backends.cpu import policy
from porthal.hal import Probe, UsageError

requires = ("numpy", "ml_dtypes")
rank = 20


def probe() -> Probe:
    if importlib.util.find_spec("porthal.backends.cpu._native") is None:
        return Probe("broken", "its native module is not built: run pip install -e . in the clone, or install a wheel")
    try:
        return Probe("available", policy.text(importlib.import_module("porthal.backends.cpu._native")))
    except UsageError as error:
        return Probe("broken", str(error), mistake=True)
