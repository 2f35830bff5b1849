"""The tiny checkpoints, written once per session, and their models on the reference backend; what the session cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

import porthal
from porthal.model import Glm5, load
from tests.budgets import Account
from tests.oracles import tiny


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Account(), "account")


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests keep on disk goes with their folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {kind: tiny.build(root / kind, kind) for kind in ("glm5", "glm52")}


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose tokens are bytes."""
    with mock.patch.dict(tiny.CONFIG, vocab_size=256, eos_token_id=[0]):
        return tiny.build(tmp_path_factory.mktemp("bytes"), "glm5")


@pytest.fixture
def command_line(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """(exit code, stdout, stderr) of a command line, run in this process."""
    from porthal.cli.app import app

    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            app([str(a) for a in args], prog_name="porthal")
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


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
