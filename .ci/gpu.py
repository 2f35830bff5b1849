"""One visit to a GPU, in nine minutes: `python3 .ci/gpu.py wheels` prepares it here, `python3 .ci/gpu.py run OUT` is the visit.

The machine may be bare but for Python, PyTorch and Triton, and may reach no registry, so what porthal needs is carried
along in build/gpu/wheels, at most 64 MiB. The most telling parts come first; a part that would not end in time is cut off
or left out. What was found stays in OUT, with run.json to say how each part ended. Exit code 1 where one failed.

`run --dry OUT` makes each part's commands small and gives them Triton's interpreter in place of the GPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
WHEELS, VENV, CACHE = (ROOT / "build" / "gpu" / name for name in ("wheels", "venv", "cache"))
REPORTS = ("bring-up", "standard", "strict", "bench")  # the first has the device's name
CARRIED = 64 << 20  # bytes
NEEDED = ("jinja2", "ml_dtypes", "rich", "typer")  # NumPy comes with PyTorch
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
VISIT, LEAST = 540, 15  # seconds of all, and of a part that is worth its start
TEXT = "    def get(self, name):\n        if "
SANITIZED = (
    "sparse_mla,T=5,N=20,C=512,R=64,k=128,scale=0.0625,q_latent:bf16,batch=mixed,block_size=64,0",
    "indexer_topk,T=7,G=8,D=128,k=16,scale=0.015625,iq:bf16,batch=mixed,block_size=64,0",
    "grouped_gemm,M=64,N=96,K=96,E=33,x:bf16,counts~waist,0",
)
SMALL = "silu_mul,T=3,I=96,x:fp32,0"


@dataclass
class Part:
    """A part of the visit: seconds that it may take, what it runs, how that ended, and the exit code that it should have."""

    name: str
    most: float
    command: Sequence[str]
    code: int = 0
    seconds: float = 0.0
    ended: str = "left out, as no time was left"


def parts(out: Path, dry: bool) -> list[Part]:
    porthal = [str(VENV / "bin" / "python"), "-c", "from porthal.cli import main; main()"]
    workers = str(1 if dry else min(10, os.cpu_count() or 1))
    emulated = ["--emulated"] if dry else []
    one = ["--op", "silu_mul"] if dry else []
    conform = [*porthal, "conform", "--backend", "cuda", "--workers", workers, *emulated, *one]

    def level(name: str) -> list[str]:
        kept = [f"--{kind}={out / name}.{kind}" for kind in ("json", "html", "resume")]
        return [*conform, "--level", "bring-up" if dry else name, *kept]

    timed = ["--workload", "demo", "--seconds", "5"] if dry else ["--seconds", "110"]
    short = ["--decode", "1"] if dry else []
    sides = "torch" if dry else "cuda,torch:cuda"  # an emulated device has no speed, which is what tune says of it
    sanitizer = [] if dry else ["compute-sanitizer", "--error-exitcode", "1"]
    made = [
        Part("backends", 30, [*porthal, "backends"]),
        Part("bring-up", 120, level("bring-up")),
        Part("text", 60, [*porthal, "generate", TEXT, "--backend", "cuda", "--max-new", "4" if dry else "135"]),
        Part("lockstep", 60, [*porthal, "diff", "--backend", "cuda", "--tokens", "2" if dry else "64", *emulated, *short]),
        Part("tune", 75, [*porthal, "tune", "--backend", "cuda", "--memory", "4", "--seconds", "50"], 2 if dry else 0),
        Part("speed", 150, [*porthal, "bench", "--backend", sides, *timed, *one, "--json", f"{out}/bench.json"]),
        Part("standard", 240, level("standard")),
    ]
    for token in [SMALL] if dry else SANITIZED:
        made.append(Part("sanitizer", 40, [*sanitizer, *porthal, "replay", token, "--backend", "cuda", *emulated]))
    return [*made, Part("strict", VISIT, level("strict"))]


def run(out: Path, dry: bool) -> int:
    end = time.monotonic() + (inf if dry else VISIT)
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PORTHAL_CACHE": str(CACHE)}
    if dry:  # PyTorch and Triton of the environment that this runs in
        environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]), "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", VENV], check=True)
    install = [VENV / "bin" / "python", "-m", "pip", "install", "-q", "--no-index", "--find-links", WHEELS, *NEEDED]
    subprocess.run(install, env=environment, check=True)
    visit = parts(out, dry)
    for i, part in enumerate(visit):
        left = end - time.monotonic()
        if left >= LEAST:
            start = time.monotonic()
            with open(out / f"{i}-{part.name}.txt", "w", encoding="utf-8") as file:
                part.ended = _ended(part, None if dry else min(left, part.most), file, environment)
            part.seconds = round(time.monotonic() - start, 1)
        print(f"{part.name}: {part.ended}, {part.seconds:g} s", flush=True)
        (out / "run.json").write_text(json.dumps([asdict(p) for p in visit], indent=1), encoding="utf-8")
    named(out)
    return int(any(part.ended.startswith("failed") for part in visit))


def named(out: Path) -> None:
    """Reports as docs/results keeps them and tables as the backend's package does, in OUT/results: with the device's name."""
    (kept := out / "results").mkdir(exist_ok=True)
    reports = [file for name in REPORTS if (file := out / f"{name}.json").is_file()]
    for report in reports:
        device = re.sub(r"[^a-z0-9]+", "-", json.loads(reports[0].read_text(encoding="utf-8"))["device"].lower())
        shutil.copy(report, kept / f"cuda-{device.strip('-')}-{report.name}")
    for table in CACHE.glob("tuned-*.json"):
        shutil.copy(table, kept)


def _ended(part: Part, seconds: float | None, file: IO[str], environment: dict[str, str]) -> str:
    """How a part ends; one that takes too long is ended with all that it has started."""
    try:
        child = subprocess.Popen(
            part.command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
    except OSError as error:
        return f"failed: {error}"
    try:
        code = child.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        return "cut off"
    return "good" if code == part.code else f"failed with {code}"


def wheels() -> int:
    """Those of every Python that the machine may have."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    for python in PYTHONS:
        command = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", "--python-version", python]
        subprocess.run([*command, "-d", WHEELS, *NEEDED], check=True)
    for numpy in WHEELS.glob("numpy-*"):
        numpy.unlink()
    size = sum(wheel.stat().st_size for wheel in WHEELS.iterdir())
    print(f"{len(list(WHEELS.iterdir()))} wheels, {size / 2**20:.1f} MiB, at most {CARRIED >> 20}")
    return int(size > CARRIED)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    sys.exit(wheels() if what == "wheels" else run(Path(rest[-1]), "--dry" in rest))
