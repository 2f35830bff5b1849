"""Other people's code at every place where porthal calls it: it fails, ends the process, gives nothing, or prints.

Each fault costs its own backend alone: an exit code, and one sentence that names the package.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import pytest

from porthal import conformance
from porthal.hal import Unavailable
from porthal.hal.errors import foreign, message_of
from porthal.model.load import profile
from tests.plugins import EMPTY, announce, install, installed

ROOT = Path(__file__).resolve().parents[2]
RAISES, EXITS, NOTHING, SEVEN, PRINTS = (
    "raise RuntimeError('boom')",
    "raise SystemExit(3)",
    "return None",
    "return 7",
    "print('banner')",
)
FAULTS = {"raises": RAISES, "exits": EXITS, "nothing": NOTHING, "seven": SEVEN, "prints": PRINTS}
PROFILE = cache(profile)
Run = Callable[..., tuple[int, str, str]]
TOKEN = "rms_norm,T=1,H=7,0"


@pytest.fixture
def run(command_line: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """(exit code, stdout, stderr) of a command line, run in this process, the cases of conform as well."""
    for name in ("PORTHAL_BACKEND", "PORTHAL_OPS", "PORTHAL_FALLBACK", "PORTHAL_CHECK"):
        monkeypatch.delenv(name, raising=False)
    for name in ("run", "replay"):
        monkeypatch.setattr(conformance, name, partial(getattr(conformance, name), isolate=False), raising=False)
    monkeypatch.setattr(sys.modules["porthal.model.load"], "profile", PROFILE)
    return command_line


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    with installed(tmp_path):
        yield tmp_path


def alongside(site: Path) -> dict[str, str]:
    """The environment of a process that sees the plugins."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PORTHAL_")}
    return environment | {"PYTHONPATH": os.pathsep.join([str(site), environment.get("PYTHONPATH", "")])}


def a_sentence(err: str, *words: str) -> None:
    assert err.startswith("porthal: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert all(word in err for word in words), err


def method(name: str, fault: str, also: str = "") -> str:
    """A backend whose method of this name has a fault; where it only prints, it then does what it should."""
    inherited = f"self.derive(contracts()[{name!r}])" if name in ("rms_norm", "linear") else f"super().{name}"
    return f"""
from porthal.backends.reference.backend import Reference
from porthal.hal import contracts

class Chip(Reference):
    {also}
    def {name}(self, *args, **kwargs):
        {fault}
        return {inherited}(*args, **kwargs)
{LINEAR if name == "prepare" else ""}
"""


LINEAR = """
    def linear(self, *args, **kwargs):  # a kernel of its own, which its own `prepare` packs for
        return self.derive(contracts()["linear"])(*args, **kwargs)
"""


# -- what lists the backends -----------------------------------------------------------------------------------------

INIT = {
    "import raises": (RAISES, "RuntimeError: boom (__init__.py:1)"),
    "import exits": (EXITS, "SystemExit: 3 (__init__.py:1)"),
    "import is not Python": ("def", "SyntaxError: invalid syntax"),
    "requires is text": ("requires = 'torch'", "requires is 'torch', expected a tuple of names of modules"),
    "requires is nothing": ("requires = None", "requires is None, expected a tuple of names of modules"),
    "requires numbers": ("requires = ('json', 3)", "requires is ('json', 3), expected a tuple of names of modules"),
    "rank is text": ("rank = '5'", "rank is '5', expected a whole number"),
    "rank is nothing": ("rank = None", "rank is None, expected a whole number"),
    "rank is a fraction": ("rank = 1.5", "rank is 1.5, expected a whole number"),
    "probe raises": ("def probe():\n    " + RAISES, "RuntimeError: boom (__init__.py:2)"),
    "probe exits": ("def probe():\n    " + EXITS, "SystemExit: 3 (__init__.py:2)"),
    "probe interrupts": ("def probe():\n    raise KeyboardInterrupt", "KeyboardInterrupt: no message (__init__.py:2)"),
    "probe gives nothing": ("def probe(): return None", "its probe returned None, expected a Probe of available, not here"),
    "probe gives True": ("def probe(): return True", "its probe returned True, expected a Probe"),
    "probe gives text": ("def probe(): return 'here'", "its probe returned 'here', expected a Probe"),
    "probe gives another state": (
        "from porthal.hal import Probe\ndef probe(): return Probe('here')",
        "its probe returned Probe(state='here', why='', mistake=False), expected a Probe of available, not here, broken",
    ),
    "probe is a number": ("probe = 7", "TypeError: 'int' object is not callable"),
    "probe takes arguments": ("def probe(device): ...", "TypeError: probe() missing 1 required positional argument: 'device'"),
}


def test_broken_packages_are_listed_with_why_and_the_rest_works(site: Path, run: Run) -> None:
    names = {f"chip{i}": case for i, case in enumerate(INIT)}
    for name, case in names.items():
        install(site, name, INIT[case][0])
    announce(site, "nowhere", "no_such_package")
    code, out, err = run("backends", "--json")
    said = json.loads(out)
    rows = {row["name"]: row for row in said["backends"]}
    assert (code, err) == (0, "")
    for name, case in names.items():
        assert rows[name]["state"] == "broken", case
        assert rows[name]["why"].startswith(f"{name}_plugin: {INIT[case][1]}"), (case, rows[name])
    assert rows["nowhere"]["why"] == "no_such_package: ModuleNotFoundError: No module named 'no_such_package'"
    assert said["selected"] in ("ascend", "cpu", "torch", "reference")
    code, out, err = run("explain", "--backend", "chip3")
    assert (code, out) == (2, "")
    a_sentence(err, "backend 'chip3' is broken: chip3_plugin: requires is 'torch'")
    assert run("replay", TOKEN, "--backend", "reference")[0] == 0


def test_a_package_that_interrupts_as_it_is_imported_is_an_interrupt(site: Path, run: Run) -> None:
    """In the main thread it cannot be told from the user's."""
    install(site, "chip", "raise KeyboardInterrupt")
    assert run("backends") == (130, "", "")


def test_a_probe_that_hangs_is_left_behind(site: Path) -> None:
    """The process ends without it, and whoever it is does not become the default."""
    install(site, "chip", "import time\ndef probe():\n    print('asking')\n    time.sleep(60)")
    program = "from porthal.hal import discovery\ndiscovery.PATIENCE = 0.2\nfrom porthal.cli import main\nmain()"
    for args, code in ((("backends", "--json"), 0), (("explain", "--backend", "chip"), 2)):
        done = subprocess.run(
            [sys.executable, "-c", program, *args], cwd=ROOT, env=alongside(site), capture_output=True, text=True, timeout=30
        )
        assert done.returncode == code
        assert "chip_plugin: its probe did not answer within 0.2 s" in (done.stderr if code else done.stdout)
        assert "asking" in done.stderr and "asking" not in done.stdout
        assert code or json.loads(done.stdout)["selected"] != "chip"


def test_a_name_is_that_of_one_package(site: Path, run: Run) -> None:
    """Neither another plugin's nor porthal's own is taken over in silence."""
    install(site, "reference")
    install(site, "chip")
    install(site, "sound")
    announce(site, "chip", "other_plugin")
    rows = {row["name"]: row for row in json.loads(run("backends", "--json")[1])["backends"]}
    assert rows["chip"]["why"].startswith("chip_plugin and other_plugin both have the name chip: uninstall one")
    assert rows["reference"]["why"].startswith("porthal.backends.reference and reference_plugin both have the name")
    assert {rows[name]["state"] for name in ("chip", "reference")} == {"broken"}
    assert rows["sound"] == {"name": "sound", "state": "available", "why": "", "selected": True}
    code, _, err = run("explain", "--backend", "reference")
    assert code == 2
    a_sentence(err, "backend 'reference' is broken: porthal.backends.reference and reference_plugin both")


# -- what makes a backend --------------------------------------------------------------------------------------------

BACKEND = {
    "import raises": (RAISES, "RuntimeError: boom (backend.py:1)"),
    "import exits": (EXITS, "SystemExit: 3 (backend.py:1)"),
    "no class": ("", "has no class, expected one backend"),
    "not a class": ("Chip = 7", "has no class, expected one backend"),
    "its body raises": (f"{EMPTY}        {RAISES}".replace(": ...", ":"), "RuntimeError: boom (backend.py:"),
    "its body exits": (f"{EMPTY}        {EXITS}".replace(": ...", ":"), "SystemExit: 3 (backend.py:"),
    "unknown base": ("class Chip(Vendor): ...", "NameError: name 'Vendor' is not defined"),
    "base of nowhere": ("from no_such_chip.backend import Chip", "ModuleNotFoundError: No module named 'no_such_chip'"),
    "a circle": ("from chip_plugin.backend import Chip", "ImportError: cannot import name 'Chip' from partially"),
    "an old base": ("from porthal.hal import Backend\nclass Chip(Backend): base = 'nope'", "has base = 'nope': write it as"),
    "__init__ raises": (method("__init__", RAISES), "RuntimeError: boom (backend.py:8)"),
    "__init__ exits": (method("__init__", EXITS), "SystemExit: 3 (backend.py:8)"),
    "__init__ gives 7": (method("__init__", SEVEN), "TypeError: __init__() should return None"),
    "__init__ takes nothing": (method("__init__", "pass").replace("*args, **kwargs", ""), "TypeError: Chip.__init__() takes 1"),
    "place raises": (method("place", RAISES, "@property"), "RuntimeError: boom (backend.py:8)"),
    "place is nothing": (method("place", NOTHING, "@property"), "TypeError: place is None, expected one of hardware, "),
    "place is elsewhere": (method("place", "return 'cloud'", "@property"), "TypeError: place is 'cloud', expected one of"),
    "__str__ exits": (method("__str__", EXITS), "SystemExit: 3 (backend.py:8)"),
    "__str__ gives 7": (method("__str__", SEVEN), "TypeError: __str__ returned non-string"),
}


@pytest.mark.parametrize("case", BACKEND)
def test_a_backend_that_cannot_be_made_says_so(site: Path, run: Run, case: str) -> None:
    source, why = BACKEND[case]
    install(site, "chip", backend=source)
    code, out, err = run("generate", "x", "--backend", "chip", "--json")
    assert (code, out) == (2, "")
    a_sentence(err, "backend 'chip' ", why)
    assert why.startswith("has base") or "chip_plugin" in err


def test_a_constructor_that_keeps_nothing_is_one(site: Path, run: Run) -> None:
    """It need not call that of its base."""
    install(site, "chip", backend=method("__init__", NOTHING))
    assert run("replay", TOKEN, "--backend", "chip")[0] == 0


STAND_IN = {
    "raises": ("raise RuntimeError('boom')", "RuntimeError: boom (emulated.py:1)"),
    "exits": ("def install():\n    raise SystemExit(3)", "SystemExit: 3 (emulated.py:2)"),
    "lacks it": ("", "AttributeError: module 'chip_plugin.emulated' has no attribute 'install'"),
    "needs a package": ("import no_such_chip", "ModuleNotFoundError: No module named 'no_such_chip' (emulated.py:1)"),
}


@pytest.mark.parametrize("case", STAND_IN)
def test_a_stand_in_that_does_not_start_says_so(site: Path, run: Run, case: str) -> None:
    source, why = STAND_IN[case]
    install(site, "chip", emulated=source)
    code, out, err = run("replay", TOKEN, "--backend", "chip", "--emulated")
    assert (code, out) == (2, "")
    a_sentence(err, f"backend 'chip' cannot be emulated: chip_plugin.emulated: {why}")


# -- what runs on it -------------------------------------------------------------------------------------------------

AT = {"raises": "RuntimeError: boom (backend.py:8)", "exits": "SystemExit: 3 (backend.py:8)"}
SERVICES = ("from_numpy", "to_numpy", "empty", "alloc_pages", "plan", "prepare", "rms_norm")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("hook", SERVICES)
def test_a_model_meets_a_fault(site: Path, run: Run, texts: Path, hook: str, fault: str) -> None:
    install(site, "chip", backend=method(hook, FAULTS[fault]))
    code, out, err = run("generate", "x", "--model", texts, "--max-new", 2, "--backend", "chip", "--json")
    if fault == "prints":
        assert code == 0 and len(json.loads(out)["tokens"]) == 2
        assert set(err.splitlines()) == {"banner"}
    else:
        assert (code, out) == (2, "")
        a_sentence(err)
        assert fault not in AT or f"running on chip of chip_plugin failed: {AT[fault]}" in err


def test_what_is_no_weight_is_named(site: Path, run: Run, texts: Path) -> None:
    install(site, "chip", backend=method("prepare", NOTHING))
    _, _, err = run("generate", "x", "--model", texts, "--backend", "chip")
    a_sentence(err, "chip: prepare returned None for linear.w, expected a Weight")


@pytest.mark.parametrize("command", ["explain", "diff --tokens 2 --decode 0"])
@pytest.mark.parametrize("hook", ["refuses", "derive", "candidates"])
def test_a_claim_that_fails_is_a_sentence(site: Path, run: Run, texts: Path, hook: str, command: str) -> None:
    install(site, "chip", backend=method(hook, EXITS))
    code, out, err = run(*command.split(), "--model", texts, "--backend", "chip")
    assert (code, out) == (2, "")
    a_sentence(err, "running on chip of chip_plugin failed: SystemExit: 3 (backend.py:8)")


# -- what judges it --------------------------------------------------------------------------------------------------

CALLS = {
    "rms_norm,T=1,H=7,0": ("from_numpy", "to_numpy", "empty", "rms_norm"),
    "linear,T=1,K=3,N=2,0": ("prepare",),
    "kv_write,T=7,A=2,B=3,batch=mixed,block_size=1,0": ("from_logical", "to_logical", "plan"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("token", "hook"), [(token, hook) for token, hooks in CALLS.items() for hook in hooks])
def test_a_case_meets_a_fault(site: Path, run: Run, token: str, hook: str, fault: str) -> None:
    install(site, "chip", backend=method(hook, FAULTS[fault]))
    code, out, err = run("replay", token, "--backend", "chip")
    if fault == "prints":
        assert (code, out.startswith("PASS: "), set(err.splitlines())) == (0, True, {"banner"})
    elif code == 2:  # arrays are tried before the first case
        assert hook in ("from_numpy", "to_numpy") and out == ""
        a_sentence(err, "chip", AT.get(fault, "").partition(" (")[0])
    else:
        assert (code, err) == (1, "")
        assert out.startswith("FAIL_ERROR: " if fault != "seven" else "FAIL_")
        assert AT.get(fault, "").partition(" (")[0] in out and "Traceback" not in out


def test_a_kernel_that_ends_its_process_fails_its_case_alone(site: Path) -> None:
    """In worker processes, whose banners stay out of stdout."""
    install(site, "chip", "print('banner')", method("rms_norm", "print('banner'); raise SystemExit(3)"))
    command = ["conform", "--backend", "chip", "--op", "rms_norm", "--op", "add", "--workers", "1"]
    done = subprocess.run(
        [sys.executable, "-c", "from porthal.cli import main; main()", *command],
        cwd=ROOT,
        env=alongside(site),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "banner" not in done.stdout
    (passed,) = re.findall(r"^add +(\d+)/\1 ", done.stdout, re.MULTILINE)
    assert int(passed) > 10
    (failed,) = re.findall(r"FAIL_ERROR in (\d+) cases of rms_norm: SystemExit: 3", done.stdout)
    assert int(failed) > 30 and done.stdout.endswith(f" {failed} FAIL_ERROR\n")
    assert "CRASH" not in done.stdout


def test_stdout_is_ours_from_c_too(site: Path, texts: Path) -> None:
    """A banner at every place, by Python, through the descriptor, and from C, whose buffer is written when the process ends."""
    banner = "print('banner'); os.write(1, b'banner'); ctypes.CDLL(None).puts(b'banner')"
    places = ("__init__", "prepare", "plan", "rms_norm")
    head, _, _ = method("plan", banner).partition("    def")
    bodies = (method(name, banner).partition("class Chip(Reference):")[2] for name in places)
    install(site, "chip", f"import ctypes, os\n{banner}", f"import ctypes, os\n{banner}\n{head}" + "".join(bodies))
    program = "from porthal.cli import main; main()"

    def said(*args: str) -> bytes:
        command = [sys.executable, "-c", program, "generate", "x", "--model", str(texts), "--max-new", "4", *args]
        done = subprocess.run(command, cwd=ROOT, env=alongside(site), capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert ("chip" in args) == (b"banner" in done.stderr)
        return done.stdout

    assert said("--backend", "chip") == said("--backend", "reference")
    assert len(json.loads(said("--backend", "chip", "--json"))["tokens"]) == 4


def test_an_error_whose_text_cannot_be_read_is_a_sentence() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError("again")

    assert message_of(Odd()) == "Odd: its message raises RuntimeError"
    assert message_of(ValueError("one\n\n two \nthree\nfour")) == "ValueError: one; two; three"
    assert message_of(ValueError("\udc80")) == "ValueError: ?"


def test_a_broken_pipe_of_a_plugin_is_one_of_its_errors() -> None:
    with pytest.raises(Unavailable, match=r"^chip: BrokenPipeError: gone"), foreign("chip"):
        raise BrokenPipeError("gone")


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB"


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (f"RuntimeError({OUT_OF_MEMORY!r})", f"RuntimeError: {OUT_OF_MEMORY}"),
        ("MemoryError()", "MemoryError: no message"),
    ],
)
def test_memory_that_is_not_enough_is_one_sentence(site: Path, run: Run, texts: Path, raised: str, said: str) -> None:
    install(site, "chip", backend=method("embedding", f"raise {raised}"))
    code, _, err = run("generate", "ab", "--backend", "chip", "--model", texts, "--max-new", 2)
    assert code == 2
    a_sentence(err, "running on chip of chip_plugin failed: ", said, "; take a smaller model, batch or context, or several")
