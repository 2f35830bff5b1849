"""porthal: what every operator of a GLM-5-class model must compute, how a chip does it, and the proof that the two agree."""

from typing import TYPE_CHECKING, Any

import porthal.backends  # first: imported later, the package would take the place of the function below
from porthal.hal import NotClaimed, NotFinite, PorthalError, Unavailable, UsageError
from porthal.hal import backend_names as backends

if TYPE_CHECKING:
    from porthal.hal import Batch, Binding, bind, use

__version__ = "0.1.0"
__all__ = ["Batch", "Binding", "NotClaimed", "NotFinite", "PorthalError", "Unavailable", "UsageError"]
__all__ += ["backends", "bind", "use"]


def __getattr__(name: str) -> Any:
    """What needs NumPy loads on first use: names of hal, and `porthal.ops`, `porthal.model`, `porthal.conformance`."""
    if name in __all__:
        return getattr(porthal.hal, name)
    if name in ("ops", "model", "conformance"):
        import importlib

        return importlib.import_module(f"porthal.{name}")
    raise AttributeError(f"porthal has no attribute {name!r}")
