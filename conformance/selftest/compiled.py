"""The C++ kernels of the cpu backend with one source edited, compiled and loaded beside the real ones.

Every object and library is kept under a hash of all that it is made of, so an edit costs its own source and the linker.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType, ModuleType

from porthal.hal import UsageError, probe

HERE = Path(__file__).resolve().parents[2] / "backends" / "cpu" / "native"
BUILT = HERE.parents[2] / "build" / "planted"
SOURCES = tuple(sorted(path.name for path in HERE.glob("*.[ch]pp")))  # those that can be edited
OPTIONS = ("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden")
# The loops are compiled for the instruction set that the real ones use, under the one name that is there on any CPU.
AVX512 = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl"
ISA = {"baseline": "", "avx2": "-mavx2 -mfma -mf16c", "avx512": AVX512, "avx512bf16": f"{AVX512} -mavx512vnni -mavx512bf16"}
ISA["amx"] = ISA["avx512bf16"]  # tiles need Linux's permission, for which such a module does not ask
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
    """The native module of one operator with `text` in the place of one source; UsageError where that does not compile.

    `name` begins with the operator's, and a slash. Other operators, of which it may be composed, are the real ones.
    """
    from porthal.backends.cpu import _native  # type: ignore[attr-defined]  # C++

    built = library([name.partition("/")[0], "plan"], (), {source: text}, name)  # a batch is planned before any call
    # pybind11 keeps modules by their name, of which only the end must be that of the sources.
    spec = importlib.util.spec_from_file_location(f"{built.name}._native", built)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.set_num_threads(THREADS)
    module.__getattr__ = lambda name: getattr(_native, name)  # type: ignore[method-assign]
    return module


def library(
    ops: Sequence[str], options: Sequence[str], edits: Mapping[str, str] = MappingProxyType({}), name: str = ""
) -> Path:
    """The native module of these operators, built for the best instruction set here with these options; `edits` are texts
    that take the place of sources."""
    texts = {path: (HERE / path).read_text("utf-8") for path in SOURCES} | dict(edits)
    units = sorted({unit for op in ops for unit in _needed(texts, op)})
    made = [(unit, loops) for unit in units for loops in (False, True) if _stands(texts, unit, loops)]
    name = name or ", ".join(ops)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda one: _object(texts, one[0], one[1], name, options), made))
    return _made(EXTENSION_SUFFIXES[0], ["-shared", "-pthread", *options, *map(str, objects)], name)


def _stands(texts: Mapping[str, str], unit: str, loops: bool) -> bool:
    """Whether a source has loops, or, compiled without an instruction set, something else."""
    return "PORTHAL_LOOPS(" in texts[unit] if loops else unit not in ("coded.cpp", "mix.cpp", "panel.cpp")


def _needed(texts: dict[str, str], op: str) -> list[str]:
    """The sources that the module of one operator is linked of: its own, and those whose headers they include."""
    found: list[str] = []
    names = [f"PORTHAL_OP({name}," for name in (op, f"{op}_codes")]  # the latter under a scheme
    own = [unit for unit, text in texts.items() if unit.endswith(".cpp") and any(name in text for name in names)]
    left = ["module.cpp", "limits.cpp", "meeting.cpp", "panel.cpp", *own]
    while left:
        unit = left.pop()
        if unit in texts and unit not in found:
            found.append(unit)
            left += [f"{header}.cpp" for header in _included(texts, unit)]
    return sorted(unit for unit in found)


def _included(texts: dict[str, str], unit: str) -> set[str]:
    """The stems of all headers of ours that a source includes, also through others."""
    found: set[str] = set()
    left = [unit]
    while left:
        new = set(re.findall(r'^#include "(\w+)\.hpp"', texts[left.pop()], re.M)) - found
        found |= new
        left += [f"{header}.hpp" for header in new]
    return found


def _object(texts: dict[str, str], unit: str, loops: bool, name: str, more: Sequence[str]) -> Path:
    import pybind11

    from porthal.backends.cpu import _native  # type: ignore[attr-defined]  # C++

    options = [*OPTIONS, f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", *more]
    if unit in ("module.cpp", "meeting.cpp"):
        options.append("-O1")  # they compute nothing, and are done sooner so
    if loops:
        options = ["-DPORTHAL_ISA=baseline", *ISA[_native.isas()[-1]].split(), *options]
    files = {file: texts[file] for file in [unit, *sorted(f"{header}.hpp" for header in _included(texts, unit))]}
    return _made(".o", [*options, "-c", unit], name, files)


def _made(suffix: str, options: Sequence[str], name: str, files: Mapping[str, str] = MappingProxyType({})) -> Path:
    """What the compiler makes in a folder with these files, once for each content."""
    content = "\0".join([_version(), version("pybind11"), *options, *(part for item in files.items() for part in item)])
    target = BUILT / (hashlib.sha256(content.encode()).hexdigest()[:32] + suffix)
    if not target.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=BUILT) as folder:  # moved when whole: other processes may make the same
            for file, text in files.items():
                (Path(folder) / file).write_text(text, encoding="utf-8")
            command = [*_compiler(), *options, "-o", target.name]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
                raise UsageError(f"{name}: the edited source does not compile; renew the edit: {said}")
            (Path(folder) / target.name).replace(target)
    return target


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


@cache
def _version() -> str:
    return subprocess.run([*_compiler(), "--version"], capture_output=True, text=True).stdout
