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
    """The package's files as git sees them, named as the wheel must name them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", "porthal", *ROOMS]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    files = {PurePosixPath(name) for name in listed if not (ROOT / name).is_symlink() and (ROOT / name).exists()}
    sources = {file for file in files if file.parts[0] == "backends" and file.parts[2:3] == ("native",)}
    return {str(file if file.parts[0] == "porthal" else "porthal" / file) for file in files - sources}


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
