"""The proof that a backend computes what the contracts say: cases, execution, judgement, report.

`run(backend=...)` gives a Report, `replay(token, backend)` repeats one case. Cases (`cases`, `inputs`, `values`), execution
(`runner`) and judgement (`judge`) know nothing of each other beyond plain values.
"""

if not __name__.startswith("porthal."):
    raise ImportError(f"import porthal.{__name__} instead of {__name__}: two names make two registries.")

from typing import Any

__all__ = ["Case", "Report", "replay", "run"]
_HOMES = {"Case": "cases", "Report": "report", "replay": "runner", "run": "runner"}


def __getattr__(name: str) -> Any:
    """Loaded on first use: the pytest plugin stands in this package and must cost nothing."""
    if name not in _HOMES:
        raise AttributeError(f"porthal.conformance has no {name!r}: it offers {', '.join(__all__)}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
