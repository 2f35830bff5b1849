"""The README's kernel, as it is and with the mistake that it tells of: each prints what stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import plugins

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
CLASS = TEXT[TEXT.index("```python\n") + len("```python\n") :].partition("```")[0]
LINE, MISTAKE = re.search(r"^ +(mean = .*)$", CLASS, re.M)[1], re.search(r"`(mean = .*)`", TEXT)[1]


@pytest.mark.parametrize(("block", "source"), [("repaired", CLASS), ("failing", CLASS.replace(LINE, MISTAKE))])
def test_conform_prints_what_the_readme_shows(tmp_path, block, source):
    shown = TEXT.partition(f"<!-- output: conform, {block} -->\n```\n")[2].partition("```")[0].splitlines()
    plugins.install(tmp_path, "mychip", backend=source)
    command = [sys.executable, "-c", "from porthal.cli import main; main()", *shown[0].removeprefix("$ porthal ").split()]
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=120)
    assert done.returncode == (block == "failing"), done.stderr
    pattern = "\n".join(".*" if line == "..." else re.escape(line) for line in shown[1:])
    assert re.fullmatch(pattern + "\n", done.stdout, re.DOTALL), done.stdout
