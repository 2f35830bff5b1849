"""Does a wheel hold exactly the package, and does it work where nothing else of this tree is?

    python .ci/check_wheel.py build/dist/porthal-*.whl
"""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted(link.name for link in (ROOT / "porthal").iterdir() if link.is_symlink())

IMPORTS = f"""
import importlib.util
for room in {ROOMS}:
    assert importlib.util.find_spec(room) is None, f"the wheel installs a top-level {{room}}"
    __import__(f"porthal.{{room}}")
from porthal.backends.cpu import _native
"""


def expected() -> set[str]:
    """The files of the rooms and of porthal/ itself, named as the wheel must name them."""
    files = {f"porthal/{name}" for name in ("__init__.py", "__main__.py", "py.typed")}
    for room in ROOMS:
        for file in (ROOT / room).rglob("*"):
            built = file.suffix in (".pyc", ".so") or file.match("backends/*/native/*")
            of_a_clone = file.match("bench/test_*.py") or file.is_relative_to(ROOT / "bench" / "peers")
            if file.is_file() and not built and not of_a_clone:
                files.add(f"porthal/{file.relative_to(ROOT).as_posix()}")
    return files


def main(wheel: str) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    native = {name for name in names if PurePosixPath(name).match("porthal/backends/cpu/_native.*")}
    if len(native) != 1:
        sys.exit(f"{wheel} has {len(native)} files porthal/backends/cpu/_native.*, expected one.")
    if names - native != expected():
        difference = sorted((names - native) ^ expected())
        sys.exit(f"{wheel} and the tree differ in {', '.join(difference)}: see wheel.exclude in pyproject.toml.")

    place = ROOT / "build" / "check"
    venv.create(place, clear=True, with_pip=True)
    for command in (
        ["bin/pip", "install", "--quiet", str(Path(wheel).resolve())],
        ["bin/python", "-I", "-c", IMPORTS],
        ["bin/porthal", "generate", "def "],
    ):
        subprocess.run(command, cwd=place, check=True)
    print(f"{wheel}: {len(names)} files, all under porthal/, installed and run on their own.")


if __name__ == "__main__":
    main(*sys.argv[1:])
