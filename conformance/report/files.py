"""Files of reports, of whatever kind: read as one JSON object, or refused in one sentence that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from porthal.hal import UsageError

Made = TypeVar("Made")


def parsed(text: str) -> dict[str, Any]:
    """The object that a text holds; UsageError says what it is instead."""
    try:
        data = json.loads(text, parse_constant=_refused)
    except RecursionError:
        raise UsageError("not a report: its JSON is nested too deep") from None
    except ValueError as error:
        raise UsageError(f"not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UsageError("not a report: expected a JSON object")
    return data


def read(file: Path, make: Callable[[dict[str, Any]], Made]) -> Made:
    """What `make` makes of a file's object; a UsageError gets the file's name in front."""
    try:
        return make(parsed(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {file}: {getattr(error, 'strerror', None) or 'it is not text'}") from None
    except UsageError as error:
        raise UsageError(f"{file} is {error}") from None


def why(error: Exception) -> str:
    """What is wrong with an object that could not be read."""
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")
