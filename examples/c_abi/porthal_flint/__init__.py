"""Flint, a chip that is reached through a C library alone."""

from pathlib import Path

from porthal.hal import Probe

requires = ("numpy",)
LIBRARY = Path(__file__).with_name("libflint.so")


def probe():
    if not LIBRARY.exists():
        return Probe("not here", f"{LIBRARY} is not built: run sh build.sh beside device.c")
    return Probe("available")
