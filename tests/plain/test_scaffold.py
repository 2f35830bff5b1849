"""What `porthal new-backend` writes: the files, the stubs against their contracts, and what it refuses."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from datetime import date
from pathlib import Path

import pytest

from porthal.backends.reference.backend import Reference
from porthal.cli.app import app
from porthal.cli.scaffold import groups, new_backend, next_step, stub
from porthal.conformance.cases.plan import cases
from porthal.conformance.report.waivers import parse
from porthal.hal import Backend, UsageError, contracts, limits


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return new_backend("my_chip", folder=tmp_path_factory.mktemp("made") / "here")


def uncommented(source):
    """The file after an editor has uncommented everything from the first stub on."""
    head, mark, stubs = source.partition("    # -- primitives")
    return head + mark + re.sub(r"^    #(?! -- ) ?", "    ", stubs, flags=re.MULTILINE)


def backend_class(source, tmp_path):
    file = tmp_path / "backend.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location("made_backend", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MyChip


def test_the_package_is_complete(package):
    files = {file.relative_to(package).as_posix() for file in package.rglob("*") if file.is_file()}
    assert files == {
        "README.md",
        "ci.sh",
        "porthal_my_chip/__init__.py",
        "porthal_my_chip/backend.py",
        "porthal_my_chip/waivers.toml",
        "pyproject.toml",
        "tests/test_conformance.py",
    }
    assert [name for name in sorted(files) if (package / name).stat().st_mode & 0o111] == ["ci.sh"]
    for name in files:
        text = (package / name).read_text()
        assert text.endswith("\n") and not re.search(r"\{[{%]|[ \t]$|\n\n\n\n", text, re.MULTILINE), name
    for file in package.rglob("*.py"):
        ast.parse(file.read_text())
    said = [line[:2] for line in (package / "README.md").read_text().splitlines() if line[:1].isdigit()]
    assert said == ["1.", "2.", "3.", "4.", "5."]


def test_the_project_declares_the_backend_and_ships_its_waivers(package):
    tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11 on")
    told = tomllib.loads((package / "pyproject.toml").read_text())
    assert told["project"]["name"] == "porthal-my_chip"
    assert told["project"]["dependencies"] == ["porthal"]
    assert told["project"]["entry-points"] == {"porthal.backends": {"my_chip": "porthal_my_chip"}}
    assert told["tool"]["setuptools"]["packages"] == ["porthal_my_chip"]
    assert told["tool"]["setuptools"]["package-data"] == {"porthal_my_chip": ["waivers.toml"]}


def test_waivers_are_empty_and_their_examples_valid(package):
    text = (package / "porthal_my_chip" / "waivers.toml").read_text()
    assert parse(text) == ()
    unsupported, known_failure = parse(re.sub(r"^# ?(?=\[\[|\w+ = )", "", text, flags=re.MULTILINE))
    assert (unsupported.kind, unsupported.expires) == ("unsupported", None)
    assert (known_failure.kind, known_failure.expires) == ("known_failure", date(2099, 1, 1))
    for waiver in (unsupported, known_failure):
        assert any(waiver.matches(case.token) for c in contracts().values() for case in cases(c, "bring-up"))


def test_a_new_class_owns_nothing_and_every_stub_makes_it_own_one_op(package, tmp_path):
    source = (package / "porthal_my_chip" / "backend.py").read_text()
    empty = backend_class(source, tmp_path)
    assert empty.__bases__ == (Reference,)
    assert [op for op in contracts() if op in vars(empty)] == []
    full = backend_class(uncommented(source), tmp_path)
    assert [op for op in contracts() if op not in vars(full)] == []


@pytest.mark.parametrize("op", contracts())
def test_a_stub_has_the_contracts_signature_and_raises(op):
    contract, names = contracts()[op], {}
    exec(stub(contract), names)  # under this file's `annotations`: they stay text
    method, wanted = names[op], inspect.signature(contract.reference).parameters
    (this, *given) = inspect.signature(method).parameters.values()
    assert this.name == "self"
    assert [(p.name, p.kind) for p in given] == [(p.name, p.kind) for p in wanted.values()]
    optional = {o.name for o in contract.signature.operands if o.optional}
    for p in given:
        if p.kind == p.KEYWORD_ONLY:
            assert (p.default, p.annotation) == (wanted[p.name].default, contract.attributes[p.name].type.__name__)
        else:
            assert p.default is (None if p.name in optional else p.empty)
    formula, _, shapes = inspect.getdoc(method).partition("\n\n")
    assert formula == contract.__doc__.partition("\n\n")[0]
    assert " ".join(shapes.split()).startswith(contract.signature.text)
    with pytest.raises(NotImplementedError, match=f"^{op}$"):
        method(None, *given[: len(contract.signature.operands)], **dict.fromkeys(contract.attributes))


def test_stubs_say_what_dtypes_are():
    assert "    x: float32 | bfloat16 | float16; weight: like x | float32; y: like x\n" in stub(contracts()["rms_norm"])
    assert "y: as out says" in stub(contracts()["linear"])
    assert stub(contracts()["add_rms_norm"]).endswith('raise NotImplementedError("add_rms_norm")  # return y, r')


def test_stubs_stand_in_the_order_of_need():
    primitives, composites, others = ([re.match(r"def (\w+)", s)[1] for s in g.stubs] for g in groups())
    known = contracts()
    assert primitives[:2] == ["rms_norm", "embedding"]
    assert primitives.index("kv_write") < primitives.index("sparse_mla") < primitives.index("argmax")
    assert not any(known[op].decomposition for op in primitives)
    assert set(composites) == {op for op, contract in known.items() if contract.decomposition}
    assert "page_copy" in others
    assert sorted([*primitives, *composites, *others]) == list(known)


def test_a_torch_base_is_asked_for(tmp_path):
    folder = new_backend("far", "torch", tmp_path / "far")
    assert 'requires = ("torch",)' in (folder / "porthal_far" / "__init__.py").read_text()
    source = (folder / "porthal_far" / "backend.py").read_text()
    assert '\nclass Far(Torch):\n' in source and 'super().__init__(f"far:{device or 0}")' in source


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    assert (new_backend("near", folder=tmp_path / "empty") / "pyproject.toml").is_file()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("My", "'My' cannot name a backend: expected a Python identifier in lower case, such as mychip"),
        ("my-chip", "'my-chip' cannot name a backend: expected"),
        ("7up", "'7up' cannot name a backend: expected"),
        ("", "'' cannot name a backend: expected"),
        ("é", "'é' cannot name a backend: expected"),
        ("class", "'class' cannot name a backend: expected"),
        ("cpu", "backend 'cpu' exists already: choose a name other than "),
        ("composed", "'composed' is reserved by porthal: choose a name other than backend, composed, error"),
    ],
)
def test_a_name_is_refused_with_a_sentence(tmp_path, name, sentence):
    with pytest.raises(UsageError, match="^" + re.escape(sentence)):
        new_backend(name, folder=tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_nothing_is_overwritten(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in (tmp_path, file):
        with pytest.raises(
            UsageError, match=f"^{folder} exists and is not an empty folder: give a new one with --dir$"
        ):
            new_backend("near", folder=folder)
    with pytest.raises(
        UsageError, match=f"^cannot write {file}/inside: Not a directory; give another folder with --dir$"
    ):
        new_backend("near", folder=file / "inside")
    assert (list(tmp_path.iterdir()), file.read_text()) == ([file], "mine")


# -- the command, and the hint -----------------------------------------------------------------------------------------


def command(capsys, *args):
    with pytest.raises(SystemExit) as left:
        app([str(a) for a in args], prog_name="porthal")
    return left.value.code or 0, *capsys.readouterr()


def test_the_command_says_what_to_type_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(capsys, "new-backend", "near")
    assert (code, err) == (0, "")
    assert out.splitlines()[-2:] == ["pip install -e porthal-near", "porthal conform --backend near"]
    assert Path("porthal-near/porthal_near/backend.py").is_file()
    code, out, err = command(capsys, "new-backend", "near")
    sentence = "porthal: porthal-near exists and is not an empty folder: give a new one with --dir\n"
    assert (code, out, err) == (2, "", sentence)


class Chip(Backend):
    name = "chip"


def test_the_next_steps_are_those_ops_of_a_run_that_a_model_calls_first():
    begin = f"begin with `{{}}` in {Path(__file__)}"
    assert next_step(Chip(), list(contracts())) == begin.format("rms_norm") + ", the next: embedding, linear, rope"
    assert next_step(Chip(), ["topk", "embedding"]) == begin.format("embedding") + ", the next: topk"
    assert next_step(Chip(), ["page_copy"]) == begin.format("page_copy")


class Chosen(Chip):
    @limits(k=3)
    def topk(self, scores, *, k): ...


def test_the_next_step_of_a_kernel_that_took_no_call_is_to_look_at_its_limits():
    told = f"`topk` in {Path(__file__)} took none of these calls: its @limits say what it takes"
    assert next_step(Chosen(), ["embedding", "topk"]) == told
