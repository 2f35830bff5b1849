"""Writes results.json, the record of what was proved and on what sources; `tests/house` holds it against them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.proofs import PROOF, digest, entry, record

HASHED = pytest.StashKey[dict[Path, str]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Before the tests, so that an edit during the run leaves the result stale."""
    files = {item.path for item in session.items if item.path.parent == PROOF}
    session.stash[HASHED] = {file: digest(file) for file in files}


def pytest_sessionfinish(session: pytest.Session) -> None:
    account, hashed = session.config.pluginmanager.get_plugin("account"), session.stash.get(HASHED, {})
    ran = {file: account.passed[file] == account.collected[file] for file in hashed if account.whole(file)}
    record({
        file.name: entry(hashed[file], account.passed[file], account.seconds[file]) if good else None
        for file, good in ran.items()
    })
