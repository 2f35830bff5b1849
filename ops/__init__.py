"""One file per operator: signature, semantics, float64 NumPy reference, cost. `porthal.ops.<op>` is its checked front.

The files are found by listing this folder; each defines one contract named like the file.
"""

if not __name__.startswith("porthal."):
    raise ImportError(f"import porthal.{__name__} instead of {__name__}: two names make two registries.")

import importlib
import pkgutil

from porthal.hal import Contract

__all__ = sorted(m.name for m in pkgutil.iter_modules(__path__))

for _name in __all__:
    _module = importlib.import_module(f"{__name__}.{_name}")
    globals()[_name] = getattr(_module, _name)  # the contract, in place of the module of the same name


def __getattr__(name: str) -> Contract:
    raise AttributeError(f"porthal has no op {name!r}: the known ones are {', '.join(__all__)}")
