"""What starts fast imports little, and what commands print goes where only porthal prints."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"numpy", "ml_dtypes", "torch", "transformers", "tokenizers", "jinja2", "rich", "pydantic"}
NOT_YET = {"porthal.hal.backend", "porthal.hal.binding", "porthal.ops", "porthal.model"}
NO_PLUGINS = {"importlib.metadata"}  # which takes as long as all the rest


@pytest.mark.parametrize(
    ("args", "also"), [(["--help"], NO_PLUGINS), (["explain", "--help"], NO_PLUGINS), (["backends"], set())]
)
def test_help_and_the_list_of_backends_import_little(args: list[str], also: set[str]) -> None:
    program = (
        "import sys\nfrom porthal.cli import main\ntry:\n    main()\nfinally:\n"
        f"    print(sorted({HEAVY | NOT_YET | also} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *args], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout


def prints(source: str) -> bool:
    return any(isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print" for n in ast.walk(ast.parse(source)))


def own(source: str) -> bool:
    """Whether its `print` is that of porthal.cli.text."""
    wanted = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom) and n.module == "porthal.cli.text"]
    return any(alias.name == "print" for n in wanted for alias in n.names)


def test_commands_print_on_our_own_stdout() -> None:
    """The built-in prints where a vendor's banner goes: on stderr."""
    files = {file: file.read_text(encoding="utf-8") for file in (ROOT / "cli").glob("*.py") if file.name != "text.py"}
    printing = [file.name for file, source in files.items() if prints(source)]
    assert "app.py" in printing
    assert [name for name in printing if not own((ROOT / "cli" / name).read_text(encoding="utf-8"))] == []
    assert prints("print(1)") and not own("from porthal.cli import text")
