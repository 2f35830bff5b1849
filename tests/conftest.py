"""The tiny checkpoints, written once per session, and their models on the reference backend."""

from __future__ import annotations

from pathlib import Path

import pytest

import porthal
from porthal.model import Glm5, load
from tests.oracles import tiny


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {kind: tiny.build(root / kind, kind) for kind in ("glm5", "glm52")}


@pytest.fixture(params=["glm5", "glm52"])
def directory(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Path:
    return checkpoints[request.param]


@pytest.fixture(scope="session")
def reference() -> porthal.Binding:
    return porthal.bind("reference", overrides={}, fallback="error")


@pytest.fixture(scope="session")
def models(checkpoints: dict[str, Path], reference: porthal.Binding) -> dict[str, Glm5]:
    return {kind: load(path, reference) for kind, path in checkpoints.items()}


@pytest.fixture
def model(directory: Path, models: dict[str, Glm5]) -> Glm5:
    """The reference model of the test's `directory`."""
    return models[directory.name]
