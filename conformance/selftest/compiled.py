"""The C++ kernels of the cpu backend with one source edited, compiled and loaded beside the real ones.

Every object and library is kept under a hash of all that it is made of, so an edit costs its own source and the linker.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

from porthal.hal import UsageError, probe

HERE = Path(__file__).resolve().parents[2] / "backends" / "cpu" / "native"
BUILT = HERE.parents[2] / "build" / "planted"
UNITS = ("module.cpp", "dispatch.cpp", "threads.cpp", "rms_norm.cpp", "topk.cpp", "moe_experts.cpp", "kernels.cpp")
OPTIONS = ("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden")
# The loops are compiled for the instruction set that the real ones use, under the one name that is there on any CPU.
AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl"
ISA = {"baseline": "", "avx2": "-mavx2 -mfma", "avx512": AVX512, "avx512bf16": f"{AVX512} -mavx512bf16"}
THREADS = 2  # of an edited module, however many this machine has: some mistakes need a second one


def lacking() -> str:
    """Why no edited kernel can be built here, or ""."""
    if not HERE.is_dir():
        return "their sources are not part of a wheel; run the self-test in a clone"
    if probe("cpu").state != "available":
        return "the cpu backend is not built; run pip install -e . in the clone"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is missing; run pip install pybind11"
    if shutil.which(_compiler()[0]) is None:
        return f"there is no C++ compiler {_compiler()[0]!r}; install one, or name it in CXX"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python.h is missing; install Python's headers"
    return ""


def load(source: str, text: str, name: str) -> ModuleType:
    """The native module with `text` in the place of one source; UsageError where that does not compile."""
    objects = [_object(unit, text if unit == source else (HERE / unit).read_text("utf-8"), name) for unit in UNITS]
    library = _made(EXTENSION_SUFFIXES[0], ["-shared", "-pthread", *map(str, objects)], name)
    # pybind11 keeps modules by their name, of which only the end must be that of the sources.
    spec = importlib.util.spec_from_file_location(f"{library.name}._native", library)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.set_num_threads(THREADS)
    return module


def _object(unit: str, text: str, name: str) -> Path:
    import pybind11

    from porthal.backends.cpu import _native  # type: ignore[attr-defined]  # C++

    headers = [HERE, pybind11.get_include(), sysconfig.get_path("include")]
    options = [*OPTIONS, *(f"-I{path}" for path in headers), "-c", "-xc++", "-"]
    if unit == "module.cpp":
        options.insert(-3, "-O1")  # it checks arguments and computes nothing, and is done sooner so
    elif unit == "kernels.cpp":
        options = ["-DPORTHAL_ISA=baseline", *ISA[_native.isas()[-1]].split(), *options]
    return _made(".o", options, name, text)


def _made(suffix: str, options: Sequence[str], name: str, text: str = "") -> Path:
    """What the compiler makes of the text on its input, once for each content."""
    content = "\0".join([_version(), _headers(), *options, text])
    target = BUILT / (hashlib.sha256(content.encode()).hexdigest()[:32] + suffix)
    if not target.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=BUILT) as folder:  # moved when whole: other processes may make the same
            made = Path(folder) / target.name
            command = [*_compiler(), *options, "-o", str(made)]
            done = subprocess.run(command, input=text, capture_output=True, text=True)
            if done.returncode:
                said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
                raise UsageError(f"{name}: the edited source does not compile; renew the edit: {said}")
            made.replace(target)
    return target


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


@cache
def _version() -> str:
    return subprocess.run([*_compiler(), "--version"], capture_output=True, text=True).stdout


@cache
def _headers() -> str:
    """The text of the headers, and which pybind11 is beside them."""
    import pybind11

    return "\0".join([pybind11.__version__, *(path.read_text("utf-8") for path in sorted(HERE.glob("*.hpp")))])
