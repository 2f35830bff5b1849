"""The host's processor, in C++ with threads; ops without a native kernel come from the reference."""

import importlib.util

from porthal.hal import Probe

requires = ("numpy", "ml_dtypes")
rank = 20


def probe() -> Probe:
    if importlib.util.find_spec("porthal.backends.cpu._native") is None:
        return Probe("broken", "its native module is not built: run pip install -e . in the clone, or install a wheel")
    return Probe("available")
