"""What reports that are compared do not have in common, apart from what is compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

LETTERS = tuple("ABCDEFGH")  # of reports beside each other: so many at most


def told_apart(names: Sequence[str]) -> list[str]:
    """Each name, with the letter of its place where another is the same."""
    count = Counter(names)
    return [f"{name} {letter}" if count[name] > 1 else name for name, letter in zip(names, LETTERS)]


def differences(facts: Mapping[str, Sequence[str]]) -> list[str]:
    """One sentence per fact that is not the same of all: "different machine: x86_64 (A, C), aarch64 (B)"."""
    found = []
    for what, values in facts.items():
        letters: dict[str, list[str]] = {}
        for letter, value in zip(LETTERS, values):
            letters.setdefault(value or "not said", []).append(letter)
        if len(letters) > 1:
            found.append(f"different {what}: " + ", ".join(f"{value} ({'+'.join(at)})" for value, at in letters.items()))
    return found
