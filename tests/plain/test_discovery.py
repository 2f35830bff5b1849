"""Which backends exist and which are here: plugins made on the spot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from porthal.hal import Probe, UsageError, backend_names, best, create, discovery, probe
from tests.plugins import EMPTY, install, installed

ROOT = Path(__file__).resolve().parents[2]
VENDORS = ("ascend", "cambricon", "cuda", "kunlunxin", "moore_threads")
BUILT_IN = (*VENDORS, "cpu", "torch", "onnxruntime", "reference")  # by rank, then by name


class Site:
    """A folder on sys.path with plugins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, name: str, init: str = "", backend: str | None = EMPTY) -> None:
        install(self.folder, name, init, backend)

    def run(self, program: str) -> Any:
        """What `program` gives as `answer`; `attempt` gives an error's type and text."""
        scope: dict[str, Any] = {"attempt": attempt, "sys": sys, "discovery": discovery}
        with installed(self.folder), pytest.MonkeyPatch.context() as patch:
            for name in [n for n in os.environ if n.startswith("PORTHAL_")]:
                patch.delenv(name)
            exec("from porthal.hal import *\n" + dedent(program), scope)
        return json.loads(json.dumps(scope["answer"]))


def attempt(call: Any, *args: Any, **kwargs: Any) -> str:
    try:
        return str(call(*args, **kwargs))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_an_empty_plugin_is_a_backend_that_ranks_first(site: Site) -> None:
    site.install("zeta")
    site.install("alpha")
    answer = site.run(
        """
        bound = bind(overrides={}, fallback="error")
        cls = type(bound.backend)
        answer = {
            "names": list(backend_names()), "best": best(), "probe": probe("alpha").state, "bound": str(bound.backend),
            "class": [cls.__name__, cls.name, cls.__module__], "counts": bound.counts(), "summary": bound.summary(),
            "owners": sorted({c.owner for c in bound.choices.values() if c.status == "inherited"}),
        }
        """
    )
    names = answer["names"]
    assert names[:2] == ["alpha", "zeta"]
    assert names.index("zeta") < names.index("cpu")
    assert names[2:] == [n for n in BUILT_IN if n in names]
    assert (answer["best"], answer["probe"], answer["bound"]) == ("alpha", "available", "alpha")
    assert answer["class"] == ["Chip", "alpha", "alpha_plugin.backend"]
    assert answer["summary"].startswith("0 own, ")
    assert answer["owners"] == ["reference"]
    assert answer["counts"]["fallback"] == answer["counts"]["missing"] == 0


def test_one_kernel_of_a_plugin_counts_as_its_own(site: Site) -> None:
    site.install(
        "one",
        backend="""
        from porthal.backends.reference.backend import Reference

        class Chip(Reference):
            def add(self, a, b):
                return a + b
        """,
    )
    assert site.run('answer = bind("one", overrides={}).summary()').startswith("1 own, ")


BROKEN = {
    "init": ({"init": "raise RuntimeError('no driver')"}, "bad_plugin: RuntimeError: no driver (__init__.py:1)"),
    "probe": ({"init": "def probe():\n    raise OSError('bus error')"}, "bad_plugin: OSError: bus error (__init__.py:2)"),
    "requires": ({"init": "requires = (7,)"}, "bad_plugin: requires is (7,), expected a tuple of names of modules"),
    "variables": (
        {"init": "variables = 'CHIP'"}, "bad_plugin: variables is 'CHIP', expected a tuple of names of environment variables"
    ),
}


@pytest.mark.parametrize("where", BROKEN)
def test_a_plugin_that_fails_when_looked_at_is_broken_and_hides_nothing(site: Site, where: str) -> None:
    files, message = BROKEN[where]
    site.install("bad", **files)
    site.install("good")
    answer = site.run(
        """
        answer = [probe("bad").state, probe("bad").why, best(), attempt(create, "bad"), attempt(create, "good"),
                  attempt(create, "reference"), attempt(probe, "rubbish")]
        """
    )
    assert answer[:3] == ["broken", message, "good"]
    assert answer[3] == f"Unavailable: backend 'bad' is broken: {message}"
    assert answer[4:6] == ["good", "reference"]
    assert f"bad (broken: {message})" in answer[6]


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("raise RuntimeError('library is too old')", "bad_plugin: RuntimeError: library is too old (backend.py:1)"),
        ("import no_such_module", "bad_plugin: ModuleNotFoundError: No module named 'no_such_module' (backend.py:1)"),
        (None, "bad_plugin: ModuleNotFoundError: No module named 'bad_plugin.backend'"),
        ("", "bad_plugin.backend has no class, expected one backend"),
        (EMPTY + "\n    class Other(Reference): ...", "bad_plugin.backend has Chip and Other, expected one backend"),
    ],
)
def test_a_plugin_that_fails_when_used_says_so_and_hides_nothing(site: Site, backend: str | None, message: str) -> None:
    site.install("bad", backend=backend)
    site.install("good")
    answer = site.run('answer = [attempt(create, "bad"), attempt(bind, "bad"), str(create("good")), best()]')
    assert answer[0] == answer[1] == f"Unavailable: backend 'bad' is broken: {message}"
    # Nobody has used it yet, so it still ranks: a chip somebody installed fails loudly rather than give way in silence.
    assert answer[2:] == ["good", "bad"]


def test_a_plugin_whose_requirement_is_missing_is_not_here(site: Site) -> None:
    site.install("far", init="requires = ('json', 'torch_far')")
    site.install("farther", init="requires = ('torch_far.runtime',)")
    site.install("asks", init="from porthal.hal import Probe\ndef probe():\n    return Probe('not here', 'no device')")
    answer = site.run(
        """
        answer = [[probe(n).state, probe(n).why] for n in ("far", "farther", "asks")]
        answer += [attempt(create, "far"), best() in ("ascend", "cpu", "torch", "reference")]
        """
    )
    assert answer[0] == ["not here", "needs the Python package torch_far"]
    assert answer[1] == ["not here", "needs the Python package torch_far.runtime"]
    assert answer[2] == ["not here", "no device"]
    assert answer[3:] == ["Unavailable: backend 'far' is not here: needs the Python package torch_far", True]


def test_a_plugin_whose_base_is_not_here_names_the_base(site: Site) -> None:
    site.install("far", init="requires = ('torch_far',)", backend="import torch_far")
    site.install("near", backend="from far_plugin.backend import Chip\nclass Near(Chip): ...")
    assert site.run('answer = attempt(create, "near")') == (
        "Unavailable: backend 'near' is broken: near_plugin: ModuleNotFoundError: No module named 'torch_far' (backend.py:1)"
    )


def test_a_base_by_name_as_it_was_written_before_says_what_to_write(site: Site) -> None:
    old = """
        from porthal.hal import Backend

        class Chip(Backend):
            base = "torch"
    """
    site.install("old", backend=old)
    site.install("none", backend=old.replace('"torch"', "None"))
    answer = site.run('answer = [attempt(create, "old"), attempt(create, "none")]')
    assert answer[0] == (
        "Unavailable: backend 'old' has base = 'torch': write it as a base class instead, class Chip(Torch), after "
        "from porthal.backends.torch.backend import Torch"
    )
    assert answer[1] == "none"


def test_a_plugin_may_stand_on_a_plugin(site: Site) -> None:
    site.install("lower")
    site.install("upper", backend="from lower_plugin.backend import Chip\nclass Upper(Chip):\n    def add(self, a, b): ...")
    answer = site.run(
        """
        mro = [vars(c).get("name") for c in type(create("upper")).__mro__ if "name" in vars(c)]
        ops = bind("upper", overrides={})
        answer = [mro, ops.choices["add"].owner, ops.choices["cast"].owner, ops.summary()]
        """
    )
    assert answer[0] == ["upper", "lower", "reference", ""]
    assert answer[1:3] == ["upper", "reference"]
    assert answer[3].startswith("1 own, ")


def test_a_rank_decides_what_is_chosen_and_none_is_never_chosen_by_itself(site: Site) -> None:
    """A plugin that states none was installed on purpose; a folder of porthal's own without one is only chosen by name."""
    site.install("modest", init="rank = 5")
    site.install("keen", init="rank = 2000")
    site.install("usual")
    answer = site.run(
        """
        names = list(backend_names())
        discovery._packages()["sketch"] = {"porthal.backends.sketch"}
        sys.modules["porthal.backends.sketch"] = type(sys)("sketch")
        sketched = list(backend_names()), probe("sketch").state
        for name in names:
            discovery._packages().pop(name)
        answer = [names, sketched, attempt(best)]
        """
    )
    names, (sketched, state), found = answer
    ours = [name for name in names if name not in VENDORS]
    assert ours == ["keen", "usual", "cpu", "torch", "modest", "onnxruntime", "reference"]
    assert "sketch" in sketched and state == "available"
    assert found == "Unavailable: no backend is available: reinstall porthal"


def test_looking_imports_no_framework_and_no_requirement(site: Site) -> None:
    (site.folder / "vendor_kit").mkdir()
    (site.folder / "vendor_kit" / "__init__.py").write_text("raise SystemExit('imported')")
    site.install("kit", init="requires = ('vendor_kit', 'vendor_kit.ops')", backend="raise SystemExit('imported')")
    program = """
        import sys
        from porthal.hal import backend_names, best, probe
        states = {n: probe(n).state for n in backend_names()}
        heavy = {"numpy", "torch", "torch_npu", "transformers", "ml_dtypes", "vendor_kit", "kit_plugin.backend"}
        print(states["kit"], states["reference"], best(), sorted(heavy & set(sys.modules)))
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PORTHAL_")} | {"PYTHONPATH": str(site.folder)}
    done = subprocess.run([sys.executable, "-c", dedent(program)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("available available kit []\n", "")


# -- in this process -------------------------------------------------------------------------------------------------


def test_known_backends_stand_in_order() -> None:
    names = backend_names()
    assert [n for n in names if n in BUILT_IN] == list(BUILT_IN)
    assert probe("reference") == Probe("available")
    assert probe(best()).state == "available"


@pytest.mark.parametrize("spec", ["reference:1", "reference:foo", "reference:cpu:0"])
def test_a_backend_without_devices_refuses_one(spec: str) -> None:
    name, _, device = spec.partition(":")
    with pytest.raises(UsageError, match=f"^{name} has no device '{device}': expected '{name}' alone$"):
        create(spec)


def test_a_class_with_a_constructor_of_its_own_says_what_its_devices_are(site: Site) -> None:
    site.install("plain")
    site.install(
        "dual",
        backend="""
        from porthal.hal import Unavailable
        from porthal.backends.reference.backend import Reference

        class Chip(Reference):
            def __init__(self, device=""):
                if device not in ("", "0", "1"):
                    raise Unavailable(f"dual has no device {device!r}: expected 0 or 1")
                super().__init__(device or "0")
        """,
    )
    answer = site.run('answer = [attempt(create, s) for s in ("plain:3", "dual", "dual:1", "dual:2")]')
    assert answer == [
        "UsageError: plain has no device '3': expected 'plain' alone",
        "dual:0",
        "dual:1",
        "Unavailable: dual has no device '2': expected 0 or 1",
    ]


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(UsageError, match=r"^unknown backend 'refrence', did you mean 'reference'\? known are "):
        create("refrence")
    with pytest.raises(UsageError, match=r"^unknown backend 'CPU', did you mean 'cpu'\? known are "):
        create("CPU")
    with pytest.raises(UsageError, match=r"^unknown backend '';  ?known are "):
        create("")


def test_best_takes_the_first_that_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"torch"}
    monkeypatch.setattr(discovery, "probe", lambda name: Probe("available" if name in here else "not here"))
    assert best() == "torch"
    here.clear()
    here.add("reference")  # the last of them has rank 0
    assert best() == "reference"
    here.clear()
    with pytest.raises(discovery.Unavailable, match=r"^no backend is available: reinstall porthal$"):
        best()
