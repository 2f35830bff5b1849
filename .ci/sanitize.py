"""The C++ kernels under the sanitizers of GCC: `python .ci/sanitize.py address|thread [op ...]`, by default of all own ops.

Builds the native module once more for the best instruction set here, preloads the sanitizer's library, and runs the cases of
bring-up on it. Exit code 0 where all pass and no sanitizer says anything, 1 where not, 2 where it cannot be built or run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import MappingProxyType

from porthal.conformance.selftest import compiled
from porthal.hal import bind

KINDS = {
    "address": (["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"], ["libasan.so", "libubsan.so"]),
    "thread": (["-fsanitize=thread"], ["libtsan.so"]),
}
FOLDER = compiled.BUILT.parent / "sanitized"
FINDER = """import sys
from importlib.util import spec_from_file_location
class Finder:
    def find_spec(self, name, path=None, target=None):
        return spec_from_file_location(name, {file!r}) if name == "porthal.backends.cpu._native" else None
sys.meta_path.insert(0, Finder())
"""


def lacking(kind: str) -> str:
    """Why it cannot be done here, or ""."""
    if why := compiled.lacking():
        return why
    missing = [name for name, path in libraries(kind).items() if not path.is_absolute()]
    return f"the compiler has no {' and no '.join(missing)}; install GCC's sanitizer libraries" if missing else ""


def libraries(kind: str) -> dict[str, Path]:
    """The sanitizer's libraries, by name; a path that is not absolute is one that the compiler does not have."""
    compiler = os.environ.get("CXX", "c++").split()
    asked = ((name, [*compiler, f"-print-file-name={name}"]) for name in KINDS[kind][1])
    return {name: Path(subprocess.run(command, capture_output=True, text=True).stdout.strip()) for name, command in asked}


def build(kind: str, ops: Sequence[str], edits: Mapping[str, str]) -> Path:
    """A folder that, on PYTHONPATH, puts the sanitized module of these operators in the place of the real one."""
    library = compiled.library([*ops, "plan"], [*KINDS[kind][0], "-g1", "-O1"], edits)
    folder = FOLDER / f"{kind}-{library.stem[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"_native{EXTENSION_SUFFIXES[0]}"
    shutil.copyfile(library, file)
    (folder / "sitecustomize.py").write_text(FINDER.format(file=str(file)), encoding="utf-8")
    return folder


def run(
    kind: str, ops: Sequence[str], edits: Mapping[str, str] = MappingProxyType({}), dtypes: Sequence[str] = ()
) -> tuple[int, str]:
    """Exit code, and what was said; of the cases in these dtypes where some are given."""
    if why := lacking(kind):
        return 2, f"the {kind} sanitizer cannot be used here: {why}"
    ops = ops or [op for op, choice in bind("cpu").choices.items() if choice.status == "own"]
    folder = build(kind, ops, edits)
    for old in folder.glob("log*"):
        old.unlink()
    options = f"log_path={folder / 'log'}:detect_leaks=0:halt_on_error=1:abort_on_error=1"
    preload = " ".join(map(str, libraries(kind).values()))
    env = os.environ | {"PYTHONPATH": str(folder), "LD_PRELOAD": preload, "PORTHAL_THREADS": "3", "PORTHAL_ISA": ""}
    env |= dict.fromkeys(("ASAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS"), options)
    command = [sys.executable, "-c", "from porthal.cli import main; main()", "conform", "--backend", "cpu", "--workers", "1"]
    command += [part for op in ops for part in ("--op", op)] + [part for dtype in dtypes for part in ("--dtype", dtype)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    said = "".join(file.read_text("utf-8", "replace") for file in sorted(folder.glob("log*")))
    return int(bool(said) or done.returncode != 0), said or done.stdout + done.stderr * bool(done.returncode)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in KINDS:
        print(f"usage: python .ci/sanitize.py {'|'.join(KINDS)} [op ...]", file=sys.stderr)
        sys.exit(2)
    code, text = run(sys.argv[1], sys.argv[2:])
    print(text)
    sys.exit(code)
