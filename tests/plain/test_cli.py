"""The commands as a user meets them: what they print where, what they refuse, and how they exit."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import porthal
from porthal import conformance
from porthal.cli.stream import Printer
from porthal.cli.text import check_writable
from porthal.hal import contracts
from porthal.model import load
from porthal.model.tokens import Bytes

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-c", "from porthal.cli import main; main()"]


@pytest.fixture(autouse=True)
def no_policy(monkeypatch):
    for name in ("PORTHAL_BACKEND", "PORTHAL_OPS", "PORTHAL_FALLBACK", "PORTHAL_CHECK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(command_line):
    return command_line


def process(*args, **environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PORTHAL_")}
    return subprocess.run(
        [*PROGRAM, *map(str, args)], cwd=ROOT, env=inherited | environment, capture_output=True, timeout=120
    )


# -- help, version ---------------------------------------------------------------------------------------------------


def test_version(run):
    assert run("--version") == (0, f"porthal {porthal.__version__}\n", "")


def test_without_a_command_help_is_printed_and_nothing_is_done(run):
    code, out, err = run()
    assert (code, err) == (2, "")
    assert out.startswith("Usage: porthal")
    assert all(name in out for name in ("backends", "explain", "generate", "trace", "conform", "replay"))


# -- backends --------------------------------------------------------------------------------------------------------


def test_backends_lists_all_and_marks_the_first_available(run):
    code, out, _ = run("backends", "--json")
    said = json.loads(out)
    states = {row["name"]: row["state"] for row in said["backends"]}
    assert code == 0
    assert tuple(states) == porthal.hal.backend_names()
    assert states["reference"] == "available"
    assert said["selected"] == next(name for name, state in states.items() if state == "available")
    assert [row["name"] for row in said["backends"] if row["selected"]] == [said["selected"]]
    assert all(row["why"] for row in said["backends"] if row["state"] != "available")


def test_backends_names_the_rule(run, monkeypatch):
    assert run("backends")[1].endswith(" (the first available in this order)\n")
    monkeypatch.setenv("PORTHAL_BACKEND", "reference")
    _, out, _ = run("backends")
    assert out.endswith("* is selected: reference (PORTHAL_BACKEND)\n")
    assert [line.split()[1] for line in out.splitlines() if line.startswith("*  ")] == ["reference"]


def test_backends_refuses_a_selection_that_does_not_exist(run, monkeypatch):
    monkeypatch.setenv("PORTHAL_BACKEND", "referense")
    code, out, err = run("backends")
    assert code == 2
    assert "reference" in out and "is selected" not in out
    assert err.startswith("porthal: unknown backend 'referense', did you mean 'reference'?")


# -- explain ---------------------------------------------------------------------------------------------------------


def test_explain_says_for_every_op_whose_kernel_it_is(run, checkpoints):
    code, out, _ = run("explain", "--model", checkpoints["glm5"], "--backend", "reference", "--json")
    said = json.loads(out)
    ops = {row["op"]: row for row in said["ops"]}
    assert (code, said["backend"], said["place"]) == (0, "reference", "hardware")
    assert sorted(ops) == sorted(contracts())
    assert {row["status"] for row in ops.values()} == {"own"}
    assert said["counts"] == {"own": len(ops), "inherited": 0, "composed": 0, "fallback": 0, "missing": 0}
    assert ops["sparse_mla"]["needed"] and not ops["gather_logprob"]["needed"]


def test_explain_follows_the_policy_and_ends_with_counts(run, checkpoints, monkeypatch):
    monkeypatch.setenv("PORTHAL_BACKEND", "reference")
    monkeypatch.setenv("PORTHAL_OPS", "moe_layer=composed")
    _, out, _ = run("explain", "--model", checkpoints["glm52"], "--dtype", "bfloat16")
    row = next(line for line in out.splitlines() if line.startswith("moe_layer"))
    assert row.split() == ["moe_layer", "composed", "by", "policy"]
    count = len(contracts())
    assert out.splitlines()[-1] == (
        f"reference (hardware), for {checkpoints['glm52']} in bfloat16: {count - 1} own, 0 inherited, 1 composed"
    )


@pytest.mark.parametrize(("name", "fails"), [("argmax", 1), ("topk", 0), ("sample", 0)])
def test_explain_shows_what_is_missing_and_fails(run, checkpoints, monkeypatch, name, fails):
    """Where greedy text needs it: top-k is inside a composite that has a kernel of its own."""
    kernels = porthal.hal.Backend.refuses

    def refuses(self, op, kernel, spec):
        return "k = 16, the kernel takes 1" if op == name else kernels(self, op, kernel, spec)

    monkeypatch.setattr(porthal.hal.Backend, "refuses", refuses)
    code, out, _ = run("explain", "--model", checkpoints["glm5"], "--backend", "reference")
    row = next(line for line in out.splitlines() if line.startswith(name))
    assert code == fails
    assert row.split()[1] == "missing" and "k = 16, the kernel takes 1" in row
    assert out.splitlines()[-1].endswith(" 1 missing")


# -- generate --------------------------------------------------------------------------------------------------------


def test_generate_prints_the_text_and_nothing_else(run, texts):
    prompt, binding = "def é(", porthal.bind("reference")
    ids = load(texts, binding).generate(list(prompt.encode()), 12)
    code, out, err = run("generate", prompt, "--model", texts, "--max-new", 12, "--backend", "reference")
    assert (code, out) == (0, prompt + Bytes().decode([i for i in ids if i]))
    assert err.startswith(f"reference (hardware), float32: {len(ids)} tokens in ")
    assert err.endswith(" 1.00 per forward of the main model\n") and err.count("\n") == 1


def test_speculation_changes_the_forwards_and_not_the_text(run, texts):
    plain, drafted = (
        json.loads(run("generate", "x", "--model", texts, "--speculative", n, "--backend", "reference", "--json")[1])
        for n in (0, 3)
    )
    assert plain["tokens"] == drafted["tokens"] and plain["text"] == drafted["text"]
    assert plain["forwards"] == len(plain["tokens"]) >= drafted["forwards"]


def test_a_seed_gives_one_text(run, texts):
    def sampled(seed):
        args = ("--temperature", 1, "--seed", seed, "--max-new", 16, "--backend", "reference")
        return run("generate", "x", "--model", texts, *args)[1]

    assert sampled(1) == sampled(1) != sampled(2)


def test_bytes_that_are_no_text_survive_as_an_argument(texts):
    done = process("generate", "--model", texts, "--max-new", 0, b"\xff\xc3".decode("utf-8", "surrogateescape"))
    assert (done.returncode, done.stdout) == (0, b"\xff\xc3")


def test_no_character_is_printed_before_its_last_byte(capsys):
    printer, shown = Printer(Bytes(), "> ", without=(0,), silent=False), []
    for byte in "aé€😀".encode() + b"\0\xe2":
        printer.add([byte])
        shown.append(capsys.readouterr().out)
    printer.close()
    assert shown == ["> a", "", "é", "", "", "€", "", "", "", "😀", "", ""]
    assert capsys.readouterr().out == "\ufffd"
    assert printer.text == "aé€😀\ufffd"


# -- trace -----------------------------------------------------------------------------------------------------------


def test_trace_counts_calls_with_shapes_and_work(run, checkpoints):
    args = ("trace", "--model", checkpoints["glm5"], "--rows", 3, "--context", 100)
    calls = json.loads(run(*args, "--json")[1])
    (attention,) = [c for c in calls if c["op"] == "sparse_mla"]
    assert attention["count"] == 5  # four layers and the MTP layer
    assert attention["operands"]["q_latent"] == {"kind": "array", "dtype": "float32", "shape": [3, 4, 32]}
    assert attention["operands"]["kv"] == {"kind": "Pages", "dtype": "float32", "fields": {"c": 32, "kp": 8}}
    assert attention["operands"]["sel"] == {"kind": "Selection", "dtype": "", "shape": [3, 16]}
    assert attention["results"] == {"o": {"kind": "array", "dtype": "float32", "shape": [3, 4, 32]}}
    assert attention["flops"] == 2 * 3 * 4 * 16 * (2 * 32 + 8)
    assert attention["bytes"] == 4 * (3 * 4 * (2 * 32 + 8) + 3 * 16 * (32 + 8))
    _, out, _ = run(*args)
    row = next(line for line in out.splitlines() if " sparse_mla " in line)
    assert row.startswith("5      sparse_mla") and "q_latent float32[3, 4, 32]" in row and "scale=" in row
    assert out.splitlines()[-1].startswith(f"{sum(c['count'] for c in calls)} calls, {len(calls)} distinct")


def test_trace_expands_composites(run, checkpoints):
    args = ("trace", "--model", checkpoints["glm5"], "--dtype", "bfloat16", "--json")
    whole = {c["op"] for c in json.loads(run(*args)[1])}
    parts = json.loads(run(*args, "--expand")[1])
    assert {"mla_prolog", "moe_layer"} <= whole and not {"mla_prolog", "moe_layer"} & {c["op"] for c in parts}
    written = next(c for c in parts if c["op"] == "kv_write" and len(c["operands"]["pages"]["fields"]) == 2)
    assert written["operands"]["pages"] == {"kind": "Pages", "dtype": "bfloat16", "fields": {"a": 32, "b": 8}}


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["explain", "--backend", "torhc"], "porthal: unknown backend 'torhc', did you mean 'torch'?"),
        (["explain", "--model", "{none}"], "porthal: {none} holds no config.json: expected a model directory, or one of glm-5"),
        (["trace", "--model", "{none}"], "porthal: {none}/config.json does not exist"),
        (["trace", "--model", "{tiny}", "--rows", "-1"], "porthal: --rows is -1 and --context -1: expected 1 <= rows"),
        (["trace", "--model", "{tiny}", "--rows", "4", "--context", "2"], "porthal: --rows is 4 and --context 2"),
        (["generate", "x", "--model", "{none}"], "porthal: {none}/config.json does not exist"),
        (["generate", "x", "--model", "{tiny}"], "porthal: {tiny} has no tokenizer.json"),
        (["generate", "x", "--model", "{texts}", "--max-new", "-1"], "porthal: max_new_tokens is -1: expected"),
        (["generate", "x", "--model", "{texts}", "--speculative", "-2"], "porthal: speculative is -2: expected"),
        (["generate", "x", "--model", "{texts}", "--temperature", "nan"], "porthal: temperature is nan"),
        (["generate", "", "--model", "{texts}"], "porthal: the prompt is empty"),
        (["generate", "x", "--dtype", "int3"], "'int3' is not one of"),
        (["generate"], "Missing argument"),
        (["explian"], "No such command 'explian'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(run, checkpoints, texts, tmp_path, monkeypatch, args, sentence):
    if "--backend" not in args:
        monkeypatch.setenv("PORTHAL_BACKEND", "reference")
    places = {"none": tmp_path / "none", "tiny": checkpoints["glm5"], "texts": texts}
    code, out, err = run(*(a.format(**places) for a in args))
    assert (code, out) == (2, "")
    assert sentence.format(**places) in err
    assert "Traceback" not in err and (err.count("\n") == 1 or "Usage:" in err)


def test_a_misspelt_op_in_the_policy(run, monkeypatch):
    monkeypatch.setenv("PORTHAL_OPS", "topkk=reference")
    code, _, err = run("explain", "--backend", "reference")
    assert code == 2
    assert err.startswith("porthal: unknown op 'topkk' in the overrides (PORTHAL_OPS), did you mean 'topk'?")


def test_an_interrupt_is_quiet(run, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(porthal.hal, "probes", interrupt)
    assert run("backends") == (130, "", "")


@pytest.mark.parametrize("command", [["conform", "--op", "add"], ["replay", "add,T=1,H=7,0"]])
def test_conformance_tests_the_backend_itself(run, monkeypatch, command):
    """What the policy takes from elsewhere would be neither tested nor said."""
    here(monkeypatch)
    monkeypatch.setenv("PORTHAL_OPS", "add=torch")
    code, out, err = run(*command, "--backend", "reference")
    assert (code, out) == (2, "")
    assert err == "porthal: PORTHAL_OPS is 'add=torch', but every kernel of reference is tried itself here: unset it\n"


# -- terminals -------------------------------------------------------------------------------------------------------


def on_a_terminal(*args, **environment):
    """What a command writes to stdout when that is a terminal."""
    leader, follower = pty.openpty()
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PORTHAL_") and k != "NO_COLOR"}
    inherited |= {"TERM": "xterm-256color", "COLUMNS": "100"} | environment
    child = subprocess.Popen([*PROGRAM, *args], cwd=ROOT, env=inherited, stdout=follower, stderr=subprocess.DEVNULL)
    os.close(follower)
    written = b""
    try:
        while piece := os.read(leader, 4096):
            written += piece
    except OSError:  # Linux: the other end is closed
        pass
    os.close(leader)
    assert child.wait(60) == 0
    return written.decode()


def test_colour_is_for_terminals_that_want_it():
    green = "\x1b[32mavailable"
    assert green in on_a_terminal("backends")
    plain = on_a_terminal("backends", NO_COLOR="1")
    assert green not in plain and "available" in plain
    assert b"\x1b" not in process("backends", TERM="xterm-256color").stdout


# -- conform and replay ----------------------------------------------------------------------------------------------


def test_conform_passes_and_writes_its_report(run, tmp_path):
    file = tmp_path / "report.json"
    args = ("conform", "--backend", "reference", "--op", "rms_norm", "--op", "add", "--dtype", "float32", "--json", file)
    code, out, err = run(*args)
    report = json.loads(file.read_text())
    done, op = err.split()[:2]  # of whichever worker was first
    assert (code, done, op in ("rms_norm", "add")) == (0, f"1/{len(report['results'])}", True)
    assert (report["backend"], report["place"], report["level"]) == ("reference", "hardware", "bring-up")
    assert {(r["op"], r["verdict"], r["dtype"]) for r in report["results"]} == {
        ("rms_norm", "PASS", "float32"),
        ("add", "PASS", "float32"),
    }
    assert out.splitlines()[-1].startswith(f"{len(report['results'])} of {len(report['results'])} cases passed")
    assert out.isascii() and "\x1b" not in out  # neither colours nor frames


def here(monkeypatch):
    """Cases run in this process, so that a test can change a kernel."""
    for name in ("run", "replay"):
        monkeypatch.setattr(conformance, name, partial(getattr(conformance, name), isolate=False), raising=False)


def test_conform_fails_where_a_kernel_is_wrong_and_replay_repeats_it(run, tmp_path, monkeypatch):
    from porthal.backends.reference.backend import Reference

    def rms_norm(self, x, weight, *, eps=1e-5):
        return (x * weight).astype(x.dtype)

    here(monkeypatch)
    monkeypatch.setattr(Reference, "rms_norm", rms_norm, raising=False)
    file = tmp_path / "report.json"
    code, out, _ = run("conform", "--backend", "reference", "--op", "rms_norm", "--json", file)
    failed = next(r for r in json.loads(file.read_text())["results"] if r["verdict"] == "FAIL_VALUE" and r["token"] in out)
    assert code == 1
    code, out, _ = run("replay", failed["token"], "--backend", "reference")
    assert (code, out.startswith("FAIL_VALUE: rms_norm")) == (1, True)
    monkeypatch.delattr(Reference, "rms_norm")
    code, out, _ = run("replay", failed["token"], "--backend", "reference")
    assert (code, out.startswith("PASS: rms_norm")) == (0, True)


def test_conform_says_when_nothing_was_tested(run, monkeypatch):
    here(monkeypatch)
    monkeypatch.setattr(porthal.hal.Backend, "refuses", lambda self, op, kernel, spec: "not today")
    code, out, _ = run("conform", "--backend", "reference", "--op", "rms_norm")
    assert code == 2
    *_, summary, hint = out.splitlines()
    assert re.fullmatch(r"nothing of reference was tested yet: 0 of (\d+) cases passed; \1 UNCLAIMED", summary)
    assert hint.startswith("begin with `rms_norm` in ")
    code, out, _ = run("replay", "rms_norm,T=1,H=7,0", "--backend", "reference")
    assert code == 2 and "does not claim rms_norm (reference: not today)" in out and "PORTHAL_FALLBACK" not in out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"PORTHAL_FALLBACK": "torch"}, "PORTHAL_FALLBACK=torch"),
        ({"PORTHAL_FALLBACK": "error"}, ""),
    ],
)
def test_a_policy_that_conformance_does_not_use_is_named_once(run, monkeypatch, given, said):
    here(monkeypatch)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    for command in (["conform", "--op", "add"], ["replay", "add,T=2,H=7,0"]):
        code, _, err = run(*command, "--backend", "reference")
        notes = [line for line in err.splitlines() if line.startswith("porthal: ")]
        end = "; conform, check and replay test the backend's own kernels"
        assert (code, notes) == (0, [f"porthal: not used here: {said}{end}"] if said else [])


def test_an_op_that_is_inherited_is_not_the_chips_and_still_shown(run, monkeypatch):
    from porthal.backends.reference.backend import Reference

    class Chip(Reference):
        name = "chip"

    here(monkeypatch)
    for place in ("porthal.hal", "porthal.conformance.runner.runs"):
        monkeypatch.setattr(f"{place}.create", lambda name, emulated: Chip())
    code, out, _ = run("conform", "--backend", "reference", "--op", "take_rows")
    assert code == 2
    assert re.search(r"^take_rows +(\d+)/\1 +none \(inherited\) +0/\d+  \d+ inherited, \d+ refusals$", out, re.M)
    assert out.splitlines()[-1].startswith("begin with `take_rows` in ")


def test_a_pass_on_an_emulated_device_says_so():
    pytest.importorskip("torch")
    done = process("conform", "--backend", "ascend", "--emulated", "--op", "rms_norm", "--dtype", "bfloat16", "--workers", 1)
    first, *_, last = done.stdout.decode().splitlines()
    assert (done.returncode, first) == (0, "ascend:0 (emulated device), level bring-up")
    assert re.fullmatch(r"(\d+) of \1 cases passed \(\d+ own, \d+ refusals\)", last)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["conform", "--op", "rms_nrom"], "porthal: unknown op 'rms_nrom'"),
        (["conform", "--level", "easy"], "for '--level': 'easy' is not one of 'bring-up', 'standard', 'strict'."),
        (["conform", "--dtype", "half"], "for '--dtype': 'half' is not one of 'float32', 'bfloat16', 'float16'."),
        (["conform", "--op", "add", "--op", "topk", "--dtype", "bf16"], "porthal: dtype bfloat16 does not apply to topk,"),
        (["conform", "--json", "{tmp}/r", "--html", "{tmp}/r"], "porthal: --json and --html are both {tmp}/r: give each"),
        (["conform", "--html", "{tmp}/r", "--junit", "{tmp}/x/../r"], "porthal: --html and --junit are both {tmp}/x/../r:"),
        (["conform", "--json", "{tmp}/r", "--html", "{tmp}/r.journal"], "porthal: --html and --resume are both {tmp}/r"),
        (["conform", "--json", "{tmp}/none/r.json"], "porthal: cannot write {tmp}/none/r.json"),
        (["conform", "--html", "{tmp}"], "porthal: cannot write {tmp}: Is a directory, expected a file name"),
        (["conform", "--html", "/proc/porthal.html"], "porthal: cannot write /proc/porthal.html: "),
        (["conform", "--json", "/dev/stdout"], "porthal: --json is /dev/stdout, where the table is printed: expected the"),
        (["conform", "--emulated"], "porthal: --emulated with reference (PORTHAL_BACKEND): expected one of ascend"),
        (["conform", "--emulated", "--backend", "cpu"], "porthal: --emulated with cpu (--backend): expected one of ascend"),
        (["replay", "liner,T=2,K=3,N=4,0"], "unknown op 'liner', did you mean 'linear'?"),
        (["replay", "nonsense"], "porthal: 'nonsense' is not a case token"),
        (["replay", "rms_norm,T=7,what,0"], "porthal: case token part 'what' does not apply to rms_norm"),
        (["replay", "add,T=1,H=7,0", "--backend", "nope"], "porthal: unknown backend 'nope'"),
    ],
)
def test_conform_refuses_with_a_sentence(run, tmp_path, monkeypatch, args, sentence):
    monkeypatch.setenv("PORTHAL_BACKEND", "reference")
    code, out, err = run(*(a.format(tmp=tmp_path) for a in args))
    assert (code, out) == (2, "")
    assert sentence.format(tmp=tmp_path) in err
    assert "Traceback" not in err and (err.count("\n") == 1 or "Usage:" in err)


def test_the_check_before_the_work_leaves_files_as_they_are(tmp_path):
    kept, new, link = tmp_path / "kept", tmp_path / "new", tmp_path / "link"
    kept.write_text("old")
    link.symlink_to(new)
    for file in (kept, new, link, None, Path("/dev/null")):
        check_writable(json=file)
    assert sorted(tmp_path.iterdir()) == [kept, link] and link.is_symlink() and kept.read_text() == "old"


def test_at_80_columns_tables_fit_and_commands_are_whole():
    ops = ("--op", "speculative_verify", "--op", "rms_norm", "--op", "mla_output")
    shown = on_a_terminal("conform", "--backend", "reference", "--workers", "1", *ops, COLUMNS="80")
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in shown.splitlines()]
    first, last = (next(i for i, line in enumerate(lines) if line.startswith(word)) for word in ("op ", "GLM-5:"))
    assert "\u2026" not in shown and last - first > 3 and max(map(len, lines[first:last])) <= 80
    assert any(re.fullmatch(r"  porthal replay '\S+' --backend reference", line) for line in lines)


# -- the plugin of the porting guide ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """The guide's files, with the metadata that an installation would write."""
    root = tmp_path_factory.mktemp("plugin")
    guide = (ROOT / "docs" / "porting.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"^`([\w/]+\.\w+)`.*?^```\w+\n(.*?)^```", guide, re.MULTILINE | re.DOTALL))
    for name, content in blocks.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(content)
    entry = blocks["pyproject.toml"].partition('[project.entry-points."porthal.backends"]\n')[2].splitlines()[0]
    info = root / "porthal_mychip-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: porthal-mychip\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[porthal.backends]\n" + entry.replace('"', ""))
    return {"PYTHONPATH": os.pathsep.join([str(root), str(ROOT)])}


def test_the_guides_plugin_is_found_first(plugin):
    first, *_ = json.loads(process("backends", "--json", **plugin).stdout)["backends"]
    assert first == {"name": "mychip", "state": "available", "why": "", "selected": True}


def test_the_guides_plugin_owns_one_op_and_inherits_the_rest(plugin, checkpoints):
    done = process("explain", "--backend", "mychip", "--model", checkpoints["glm5"], "--json", **plugin)
    ops = {row["op"]: row for row in json.loads(done.stdout)["ops"]}
    assert done.returncode == 0, done.stderr
    assert [op for op, row in ops.items() if row["status"] == "own"] == ["topk"]
    assert (ops["topk"]["provider"], ops["topk"]["tie"]) == ("numpy.argpartition", "any")
    assert {row["status"] for row in ops.values()} == {"own", "inherited", "composed"}
    assert ops["rms_norm"]["owner"] == "reference"


def test_the_guides_plugin_conforms_and_generates_the_same_text(plugin, texts):
    done = process("conform", "--op", "topk", "--workers", 1, **plugin)
    assert done.returncode == 0, done.stdout
    assert b"mychip (hardware)" in done.stdout
    here, there = (
        process("generate", "x", "--model", texts, "--max-new", 8, "--backend", name, **plugin).stdout
        for name in ("mychip", "reference")
    )
    assert here == there
    assert len(here) > 1
