"""One package under one name, in whatever way it is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import porthal

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("hal", "ops", "backends", "model", "conformance", "bench", "cli")


@pytest.mark.parametrize("room", ROOMS)
def test_room_is_a_relative_link(room):
    assert os.readlink(ROOT / "porthal" / room) == f"../{room}"
    assert (ROOT / "porthal" / room / "__init__.py").samefile(ROOT / room / "__init__.py")


def test_package_folder_holds_nothing_else():
    names = {path.name for path in (ROOT / "porthal").iterdir()} - {"__pycache__"}
    assert names == {*ROOMS, "__init__.py", "__main__.py", "py.typed"}


@pytest.mark.parametrize("room", ROOMS)
def test_bare_name_is_refused(room):
    done = subprocess.run([sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True)
    *_, sentence = done.stderr.splitlines()
    assert done.returncode == 1
    assert sentence.startswith("ImportError: ")
    assert f"porthal.{room}" in sentence


def test_package_comes_from_this_tree():
    assert Path(porthal.__file__).samefile(ROOT / "porthal" / "__init__.py")
