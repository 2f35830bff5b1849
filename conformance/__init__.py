"""The proof that a backend computes what the contracts say.

`run(backend=...)` gives a Report, `replay(token, backend)` repeats one case. The folders form a line, and each imports
only from its left: cases < execution < judgement < report < runner, diff < selftest; all use `level` and `verdicts`.
"""

if not __name__.startswith("porthal."):
    raise ImportError(f"import porthal.{__name__} instead of {__name__}: two names make two registries.")

from typing import Any

__all__ = ["Case", "Report", "replay", "run"]
_PLACES = {"Case": "cases.case", "Report": "report.report", "replay": "runner.runs", "run": "runner.runs"}


def __getattr__(name: str) -> Any:
    """Loaded on first use: the pytest plugin is in this package and must be cheap to import."""
    if name not in _PLACES:
        raise AttributeError(f"porthal.conformance has no {name!r}: it offers {', '.join(__all__)}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
