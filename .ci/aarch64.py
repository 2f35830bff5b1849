"""The cpu backend on aarch64, emulated by qemu-user: `python .ci/aarch64.py [option of porthal conform ...]`.

Compiles the native module for aarch64 and runs `porthal conform --backend cpu` with it in Debian's Python for aarch64, of which
nothing is installed: packages and wheels are unpacked in build/aarch64, once. An emulated device: nothing here says how fast.
Exit code that of conform, 2 where it cannot be built or run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

from sanitize import FINDER

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "build" / "aarch64"
SYSTEM, SITE, BUILT, RUN = HERE / "system", HERE / "site", HERE / "built", HERE / "run"
TOOLS = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user", "cmake": "cmake", "apt-get": "apt",
    "dpkg-deb": "dpkg",
}  # fmt: skip
EMULATED = """from porthal.hal.backend import Backend
Backend.place = property(lambda self: "emulated device")
"""


def lacking() -> str:
    """Why it cannot be done here, or ""."""
    missing = {tool: package for tool, package in TOOLS.items() if not shutil.which(tool)}
    return f"there is no {' and no '.join(missing)}; install Debian's {', '.join(missing.values())}" if missing else ""


def system() -> None:
    """Debian's Python for aarch64 with its headers and all that it needs, by an apt with a state of its own."""
    if SYSTEM.exists():
        return
    apt, made = HERE / "apt", HERE / "unpacked"
    for folder in (apt / "state" / "lists" / "partial", apt / "cache" / "archives" / "partial", made):
        folder.mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    options = {
        "APT::Architecture": "arm64", "APT::Architectures": "arm64", "APT::Sandbox::User": "", "Debug::NoLocking": "1",
        "Dir::State": apt / "state", "Dir::State::status": apt / "status", "Dir::Cache": apt / "cache",
    }  # fmt: skip
    command = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    subprocess.run([*command, "update"], check=True)
    packages = ["python3-minimal", "libpython3-stdlib", "libpython3-dev", "libstdc++6"]
    subprocess.run([*command, "-y", "--no-install-recommends", "--download-only", "install", *packages], check=True)
    for package in (apt / "cache" / "archives").glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, made], check=True)
    made.rename(SYSTEM)  # whole


def site(version: str) -> None:
    """What porthal needs, as wheels for aarch64."""
    if SITE.exists():
        return
    needed = [line for line in requires("porthal") or () if ";" not in line]
    platforms = [f"--platform=manylinux_2_{glibc}_aarch64" for glibc in (17, 27, 28)]
    command = [sys.executable, "-m", "pip", "install", "-q", "--only-binary=:all:", f"--python-version={version}", *platforms]
    subprocess.run([*command, "--target", HERE / "fetched", *needed], check=True)
    (HERE / "fetched").rename(SITE)


def build(version: str) -> Path:
    """The native module for aarch64, compiled anew where a source changed."""
    import pybind11

    definitions = {
        "CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64", "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++", "CMAKE_CXX_FLAGS": f"-isystem {SYSTEM / 'usr/include'}",
        "Python_EXECUTABLE": sys.executable, "Python_INCLUDE_DIR": SYSTEM / "usr/include" / f"python{version}",
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }  # fmt: skip
    subprocess.run(["cmake", "-S", ROOT, "-B", BUILT, "-Wno-dev", *(f"-D{k}={v}" for k, v in definitions.items())], check=True)
    subprocess.run(["cmake", "--build", BUILT, "-j2"], check=True)
    return next((BUILT / "backends" / "cpu" / "native").glob("_native.*.so"))


def conform(version: str, module: Path, arguments: list[str]) -> int:
    RUN.mkdir(exist_ok=True)
    (RUN / "sitecustomize.py").write_text(FINDER.format(file=str(module)) + EMULATED, encoding="utf-8")
    python = RUN / "python"  # by which Python starts workers: the system cannot execute what is for aarch64
    python.write_text(f'#!/bin/sh\nexec qemu-aarch64 -0 "$0" -L {SYSTEM} {SYSTEM}/usr/bin/python{version} "$@"\n', "utf-8")
    python.chmod(0o755)
    env = os.environ | {"PYTHONHOME": str(SYSTEM / "usr"), "PYTHONPATH": os.pathsep.join(map(str, (RUN, SITE, ROOT)))}
    command = [python, "-c", "from porthal.cli import main; main()", "conform", "--backend", "cpu", *arguments]
    return subprocess.run(command, env=env).returncode


def main(arguments: list[str]) -> int:
    if why := lacking():
        print(f"the cpu backend cannot be built and run for aarch64 here: {why}", file=sys.stderr)
        return 2
    system()
    version = (SYSTEM / "usr" / "bin" / "python3").readlink().name.removeprefix("python")
    site(version)
    return conform(version, build(version), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
