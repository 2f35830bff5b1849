"""A chip's first hour: a package is made, installed beside porthal, found, and given one kernel, right and then wrong."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv

import pytest

from tests import inner

CONFORM = ("conform", "--backend", "newchip", "--workers", "1", "--op", "rms_norm")
STUB = re.compile(r"    # def rms_norm\(.*?NotImplementedError\(\"rms_norm\"\).*?\n", re.DOTALL)
KERNEL = """\
    def rms_norm(self, x, weight, *, eps: float = 1e-05):
        wide = x.astype(np.float32)
        y = self.empty(x.shape, x.dtype.name)
        y[...] = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + eps) * weight.astype(np.float32)
        return y
"""


class Workplace:
    """A virtual environment of its own, which sees the packages of this one, and the package made in it."""

    def __init__(self, root):
        self.root = root
        self.python = root / "venv" / "bin" / "python"
        self.package = root / "porthal-newchip"
        self.backend = self.package / "porthal_newchip" / "backend.py"
        venv.create(root / "venv", symlinks=True)
        (site,) = (root / "venv").glob("lib/*/site-packages")
        ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in sorted(ours)]  # with what is editable there
        (site / "outer.pth").write_text("".join(lines))

    def run(self, *command):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PORTHAL_", "PYTHON"))}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"  # a file may change twice within a timestamp's second
        return subprocess.run(
            list(map(str, command)), cwd=self.root, env=environment, capture_output=True, text=True, timeout=60
        )

    def porthal(self, *args):
        return self.run(self.python, "-c", "from porthal.cli import main; main()", *args)

    def pip(self, *args):
        return self.run(sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", *args)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Installed as its README says, with setuptools from this environment, where PyTorch has brought it."""
    pytest.importorskip("setuptools", "77")
    made = Workplace(tmp_path_factory.mktemp("chip"))
    done = made.porthal("new-backend", "newchip")
    assert done.returncode == 0, done.stderr
    done = made.pip("install", "--no-index", "--no-build-isolation", "-e", made.package)
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture
def stubs(place):
    """The backend's file as it was made, and is again afterwards."""
    source = place.backend.read_text()
    yield source
    place.backend.write_text(source)


def test_it_is_found_first_and_owns_nothing(place):
    done = place.porthal("backends", "--json")
    first, *_ = json.loads(done.stdout)["backends"]
    assert first == {"name": "newchip", "state": "available", "why": "", "selected": True}
    told = json.loads(place.porthal("explain", "--backend", "newchip", "--json").stdout)
    assert told["counts"]["own"] == told["counts"]["missing"] == told["counts"]["fallback"] == 0
    assert {row["owner"] for row in told["ops"] if row["status"] == "inherited"} == {"reference"}


def test_conform_counts_what_is_inherited_and_says_where_to_begin(place):
    done = place.porthal(*CONFORM, "--op", "topk")
    *_, summary, hint = done.stdout.splitlines()
    assert done.returncode == 2, done.stdout
    counted = r"(\d+) of \1 cases passed \(\d+ inherited, \d+ refusals\)"
    assert re.fullmatch(f"nothing of newchip was tested yet: {counted}", summary)
    assert hint == f"begin with `rms_norm` in {place.backend}, the next: topk"


def test_its_own_tests_have_a_case_as_a_test_and_fail_until_something_is_its_own(place):
    options = inner.options("-vv", "--porthal-backend=newchip", "-k", "available or add or something")
    done = place.run(place.python, "-m", "pytest", *options, place.package)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.findall(r"^FAILED .*::(\w+)", done.stdout, re.M) == ["test_something_of_the_chip_is_tested"]
    assert "nothing of newchip was tested yet; begin with rms_norm" in done.stdout
    assert re.search(r"::test_the_backend_is_available PASSED", done.stdout)
    assert re.search(r"add,T=\S+ PASSED", done.stdout)


def test_one_kernel_is_proved_and_a_wrong_one_caught(place, stubs):
    filled = STUB.sub(lambda _: KERNEL, stubs).replace("from porthal", "import numpy as np\n\nfrom porthal", 1)
    place.backend.write_text(filled)
    done = place.porthal(*CONFORM)
    assert done.returncode == 0, done.stdout
    assert re.fullmatch(r"(\d+) of \1 cases passed \(\d+ own, \d+ refusals\)", done.stdout.splitlines()[-1])
    told = json.loads(place.porthal("explain", "--backend", "newchip", "--json").stdout)
    assert [row["op"] for row in told["ops"] if row["status"] == "own"] == ["rms_norm"]

    place.backend.write_text(filled.replace("+ eps", "- eps"))
    done = place.porthal(*CONFORM)
    assert done.returncode == 1, done.stdout
    assert "begin with" not in done.stdout
    command = next(line.strip() for line in done.stdout.splitlines() if line.startswith("  porthal replay "))
    again = place.porthal(*shlex.split(command)[1:])
    assert again.returncode == 1
    assert again.stdout.startswith("FAIL_VALUE: rms_norm by newchip's own kernel\n")


def test_a_stub_counts_as_own_once_it_is_uncommented_and_then_fails(place, stubs):
    place.backend.write_text(STUB.sub(lambda m: re.sub("^    # ?", "    ", m[0], flags=re.MULTILINE), stubs))
    done = place.porthal(*CONFORM)
    assert done.returncode == 1
    assert "NotImplementedError: rms_norm" in done.stdout
    assert "begin with" not in done.stdout
