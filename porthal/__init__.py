"""porthal: what every operator of a GLM-5-class model must compute, how a chip does it, and the proof that the two agree."""

import porthal.backends  # noqa: F401  (imported later, the package would take the place of the function below)
from porthal.hal import Batch, Binding, NotClaimed, PorthalError, Unavailable, UsageError, bind, use
from porthal.hal import backend_names as backends

__version__ = "0.1.0"
__all__ = ["Batch", "Binding", "NotClaimed", "PorthalError", "Unavailable", "UsageError", "backends", "bind", "use"]


def __getattr__(name: str) -> object:
    """`porthal.ops` and `porthal.model` load on first use."""
    if name in ("ops", "model", "conformance"):
        import importlib

        return importlib.import_module(f"porthal.{name}")
    raise AttributeError(f"porthal has no attribute {name!r}")
