"""`porthal diff` names the op and the layer of a defect planted in one op of one layer, and nothing where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import porthal
from porthal import bind
from porthal.cli.app import app
from porthal.conformance import replay
from porthal.conformance.diff.model import Difference, lockstep
from porthal.conformance.judgement.saved import read
from porthal.hal import Rows, Selection, Weight, contracts, discovery
from tests.checkpoints import Tensors, variant
from tests.oracles.tiny import PROMPT

ROOT = Path(__file__).resolve().parents[2]
LANES_ON_THE_BACKEND = 3  # each of them calls a kernel once per call of the model


class Parts(discovery.backend_class("reference")):
    """The reference's kernels, with every composite made of its parts."""

    name = "parts"


@pytest.fixture(scope="module")
def drafting(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dense layer, one with experts, and the MTP layer."""

    def shorten(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(("model.layers.2.", "model.layers.3."))]:
            del tensors[name]
        for name in [n for n in tensors if n.startswith("model.layers.4.")]:
            tensors[name.replace("layers.4.", "layers.2.")] = tensors.pop(name)

    return variant(checkpoints["glm5"], tmp_path_factory.mktemp("diff") / "drafting", shorten, num_hidden_layers=2)


@pytest.fixture(scope="module")
def short(drafting: Path) -> Path:
    """The same without the MTP layer."""
    return variant(drafting, drafting.parent / "short", num_nextn_predict_layers=0)


def run(model: Path, binding: porthal.Binding, tokens: int = 20, decode: int = 0, dtype: str = "float32") -> Difference:
    return lockstep(binding, PROMPT[:tokens], model, dtype, decode)


def parts(**options: Any) -> porthal.Binding:
    return bind(backend=options.pop("backend", None) or Parts(), overrides={}, fallback="error", **options)


@pytest.fixture(scope="module")
def honest(short: Path) -> Difference:
    return run(short, parts())


@pytest.fixture(scope="module")
def honest_drafts(drafting: Path) -> Difference:
    return run(drafting, parts(), decode=1)


# -- planted defects -------------------------------------------------------------------------------------------------

Defect = Callable[..., Any]


def planted(found: Difference, label: str, defect: Defect, step: int = 0) -> Callable[[str, Any], Any]:
    """A wrap that replaces the kernel of one call: the first at `label` in `step` of an honest run."""
    op = label.split(" / ")[-1]
    calls = [c for c in found.calls if c.op == op]
    at = next(i for i, c in enumerate(calls) if (c.label, c.step) == (label, step))
    made = 0

    def wrap(name: str, function: Any) -> Any:
        def call(*args: Any, **attrs: Any) -> Any:
            nonlocal made
            made += 1
            here = (made - 1) // LANES_ON_THE_BACKEND == at
            return defect(function, *args, **attrs) if here else function(*args, **attrs)

        return call if name == op else function

    return wrap


def no_eps(f, x, w, *, eps):
    return f(x, w, eps=1e-12)


def no_bias(f, x, w, bias, *, eps):
    return f(x, w, bias * 0, eps=eps)


def no_residual(f, x, residual, w, *, eps):
    return f(x, residual * 0, w, eps=eps)


def half_pairs(f, x, batch, **attrs):
    return f(x, batch, **attrs | {"layout": "half"})


def last_slice(f, x, batch, **attrs):
    return f(x, batch, **attrs | {"start": x.shape[2] - attrs["width"]})


def no_last_column(f, x, w, **attrs):
    x = x.copy()
    x[:, -1] = 0
    return f(x, w, **attrs)


def transposed_heads(f, x, w):
    heads, rows, columns = w.spec.shape
    return f(x, Weight(w.spec, w.native.reshape(heads, columns, rows).swapaxes(1, 2)))


def one_slot_on(f, pages, batch, first, second=None):
    return f(pages, batch, np.roll(first, 1, axis=0), second)


def spills(slot, f, pages, *args):
    pages = f(pages, *args)
    for name, _ in pages.spec.fields:
        pages[name][slot] += 1
    return pages


def bias_weighs(f, logits, bias, **attrs):
    ids, _ = f(logits, bias, **attrs)
    s = np.take_along_axis(1 / (1 + np.exp(-logits)) + bias, ids, axis=1)
    return ids, (attrs["scale"] * s / s.sum(1, keepdims=True)).astype(np.float32)


def no_weights(f, rows, source, weights):
    return f(rows, source, weights * 0 + 1)


def drops_an_expert(f, x, w13, w2, ids, weights, *rest, **attrs):
    return f(x, w13, w2, np.where(ids == ids.max(), -1, ids), weights, *rest, **attrs)


def lowest_scores(f, *args, scale, **attrs):
    return f(*args, scale=scale, **attrs) * np.float32(-1)


def one_too_few(f, *args, k):
    chosen = f(*args, k=k)
    rows = Rows(chosen.native.indices.copy(), np.maximum(chosen.native.length - 1, 0))
    rows.indices[np.arange(len(rows.length)), rows.length] = -1
    return Selection(chosen.spec, rows)


def higher_among_ties(f, scores, batch, *, k):
    """Without ties, a sort that loses the last bits makes some."""
    return f((scores * 0).astype(np.float32), batch, k=k)


def ignores_the_last(f, q_latent, q_rope, kv, sel, batch, **attrs):
    rows = Rows(sel.native.indices, np.maximum(sel.native.length - 1, 0))
    return f(q_latent, q_rope, kv, Selection(sel.spec, rows), batch, **attrs)


def swapped_halves(f, x):
    return f(np.concatenate(np.split(x, 2, axis=-1)[::-1], axis=-1))


def next_id(f, ids, table):
    return f((ids + 1) % table.spec.shape[0], table)


def second_best(f, logits):
    return np.argsort(logits, axis=-1)[:, -2].astype(np.int32)


def other_order(f, a, b):
    return f(b, a)


def scribbles(f, x, w, **attrs):
    y = f(x, w, **attrs)
    x[0, 0] = 0
    return y


def writes_what_it_reads(f, q_latent, q_rope, kv, *args, **attrs):
    kv["c"][1, 0] = 7
    return f(q_latent, q_rope, kv, *args, **attrs)


def reorders_its_selection(f, q_latent, q_rope, kv, sel, *args, **attrs):
    sel.native.indices[-1, :2] = sel.native.indices[-1, 1::-1]
    return f(q_latent, q_rope, kv, sel, *args, **attrs)


def as_wide_as_the_scores(f, scores, batch, *, k):
    return f(scores, batch, k=scores.shape[1])


def a_list(f, x):
    return f(x).tolist()


def raises(f, *args, **attrs):
    raise RuntimeError("out of scratch memory")


@pytest.mark.parametrize(
    ("label", "defect", "says"),
    [
        ("layer 1 / mla_prolog / rms_norm", no_eps, "times its error budget"),
        ("layer 1 / index_prolog / layer_norm", no_bias, "times its error budget"),
        ("layer 0 / add_rms_norm", no_residual, "times its error budget"),
        ("layer 1 / mla_prolog / rope", half_pairs, "times its error budget"),
        ("layer 1 / index_prolog / rope", last_slice, "times its error budget"),
        ("layer 0 / linear", no_last_column, "times its error budget"),
        ("layer 1 / mla_output / head_linear", transposed_heads, "times its error budget"),
        ("layer 1 / mla_prolog / kv_write", one_slot_on, "expected exactly"),
        (
            "layer 1 / index_prolog / kv_write",
            partial(spills, 63),
            "[63, 0] is 1.0, expected 0.0 outside the slots it writes",
        ),
        ("layer 1 / moe_route", bias_weighs, "weights"),
        ("layer 1 / moe_layer / moe_experts / moe_unpermute", no_weights, "times its error budget"),
        ("layer 1 / indexer_topk / indexer_scores", lowest_scores, "expected -inf"),
        ("layer 1 / indexer_topk / topk", one_too_few, "sel row 0 (k = 16) has 0 entries, expected 1"),
        ("layer 1 / indexer_topk / topk", higher_among_ties, "below the k-th score"),
        ("layer 0 / sparse_mla", ignores_the_last, "times its error budget"),
        ("layer 0 / silu_mul", swapped_halves, "times its error budget"),
        ("input / embedding", next_id, "expected exactly"),
        ("head / argmax", second_best, "below the k-th score"),
        ("layer 1 / moe_layer / linear", scribbles, "its input x[0, 0] is 0.0, expected"),
        ("layer 0 / mla_output / linear", raises, "it raised RuntimeError: out of scratch memory; raised in call at "),
        ("layer 1 / sparse_mla", writes_what_it_reads, "its input kv.c[1, 0] is 7.0, expected "),
        ("layer 0 / sparse_mla", reorders_its_selection, "its input sel.indices["),
        ("layer 1 / indexer_topk / topk", as_wide_as_the_scores, "sel.indices has shape [20, 20], expected [20, 16]"),
        ("layer 0 / silu_mul", a_list, "silu_mul returned list for y, expected a NumPy array"),
    ],
)
def test_a_planted_defect_is_named(short, honest, label, defect, says):
    found = run(short, parts(wrap=[planted(honest, label, defect)]))
    assert found.at_fault and found.at_fault.label == label
    assert says in found.at_fault.fault
    assert found.exit_code == 1


@pytest.mark.parametrize(("defect", "op"), [(raises, "embedding"), (as_wide_as_the_scores, "topk")])
def test_a_run_that_ends_early_praises_nothing(short, honest, defect, op):
    label = next(c.label for c in honest.calls if c.op == op)
    found = run(short, parts(wrap=[planted(honest, label, defect)]))
    assert found.halted and found.exit_code == 1 and found.calls[-1].label == label
    assert found.flips == f"The run ended in {label}, step 0: nothing was compared after it."
    assert json.loads(found.json())["halted"] is True


@pytest.mark.parametrize(
    ("label", "defect", "step"),
    [
        ("mtp / mtp_input / concat", other_order, 3),
        ("mtp / sparse_mla", ignores_the_last, 5),
        ("layer 1 / moe_layer / add", scribbles, 1),
    ],
)
def test_a_defect_of_decoding_or_drafting_is_named_with_its_step(drafting, honest_drafts, label, defect, step):
    found = run(drafting, parts(wrap=[planted(honest_drafts, label, defect, step)]), decode=1)
    assert found.at_fault and (found.at_fault.label, found.at_fault.step) == (label, step)


def test_a_write_to_another_page_is_the_writers_and_not_the_readers(short):
    """The page that a decode step spills to belongs to the same request, and sparse_mla reads it before the step ends."""
    label, tokens = "layer 1 / mla_prolog / kv_write", 64  # the prompt fills page 0, the first step begins page 1
    honest = run(short, parts(), tokens, decode=1)
    found = run(short, parts(wrap=[planted(honest, label, partial(spills, 5), step=1)]), tokens, decode=1)
    assert found.at_fault and (found.at_fault.label, found.at_fault.step) == (label, 1)
    assert [c.label for c in found.calls if c.fault] == [label]


@pytest.mark.parametrize(
    ("op", "defect"), [("moe_layer", drops_an_expert), ("mla_prolog", no_last_column), ("sparse_mla", ignores_the_last)]
)
def test_a_fused_composite_is_named_as_a_whole(short, op, defect):
    def first(name, function):
        return partial(defect, function) if name == op else function

    found = run(short, bind("reference", overrides={}, fallback="error", wrap=[first]))
    assert found.at_fault and found.at_fault.label == ("layer 1 / " if op == "moe_layer" else "layer 0 / ") + op


class Swapped(Parts):
    """Swaps the halves of the rows of the n-th expert weight that it prepares: layer 1's w13 and w2, then the MTP's."""

    def __init__(self, nth: int, lies: bool = False) -> None:
        super().__init__()
        self.left, self.lies, self.swapped = nth, lies, None

    def grouped_gemm(self, x, w, counts):  # a kernel is given what its own class prepares
        return PARTS.grouped_gemm(x, w, counts)

    def prepare(self, spec, read, into=None):
        made = super().prepare(spec, read, into)
        if spec.op == "grouped_gemm":
            self.left -= 1
            if self.left < 0 and self.swapped is None:
                self.swapped = made = Weight(spec, np.roll(made.native, spec.shape[1] // 2, axis=1))
        return made

    def to_logical(self, operand):
        if self.lies and operand is self.swapped:
            operand = Weight(operand.spec, np.roll(operand.native, -(operand.spec.shape[1] // 2), axis=1))
        return super().to_logical(operand)


@pytest.mark.parametrize(
    ("nth", "layer", "which", "lies"), [(0, "layer 1", 0, False), (1, "layer 1", 1, True), (3, "mtp", 1, False)]
)
def test_a_weight_prepared_wrongly_is_its_ops_fault(drafting, nth, layer, which, lies):
    found = run(drafting, parts(backend=Swapped(nth, lies)))
    label = f"{layer} / moe_layer / moe_experts / grouped_gemm"
    first = [c for c in found.calls if c.label == label][which]
    assert found.at_fault is first
    assert ("its weight w was prepared wrongly" in first.fault) != lies


# -- no defect -------------------------------------------------------------------------------------------------------


def rounds(name, function):
    """A fused kernel that rounds wherever the contract permits it: honest, and not what the reference gives."""
    decomposition = contracts()[name].decomposition
    return partial(decomposition, PARTS) if decomposition and name != "indexer_topk" else function


PARTS = parts()


def test_the_reference_beside_itself_is_without_fault(drafting, honest_drafts):
    fused = run(drafting, bind("reference", overrides={}, fallback="error"), decode=1)
    for found in (honest_drafts, fused):
        assert found.at_fault is None and found.first_flip is None and found.exit_code == 0
        assert [layer.name for layer in found.layers] == ["input", "layer 0", "layer 1", "head", "mtp"]
        assert all(layer.accumulated == 0 and layer.worst.worst <= 1 for layer in found.layers)
    assert {c.op for c in fused.calls} >= {
        "mla_prolog",
        "index_prolog",
        "sparse_mla",
        "moe_layer",
        "speculative_verify",
    }
    assert "kv_write" in {c.op for c in honest_drafts.calls} - {c.op for c in fused.calls}


@pytest.mark.parametrize(("kind", "tokens"), [("glm5", 32), ("glm52", 64)])
def test_an_honest_backend_grows_its_error_and_flips_honestly(checkpoints, kind, tokens):
    theirs = bind("reference", overrides={}, fallback="error", wrap=[rounds])
    found = run(checkpoints[kind], theirs, tokens, dtype="bfloat16")
    assert found.at_fault is None
    growth = [layer.accumulated for layer in found.layers if layer.name.startswith("layer ")]
    assert growth == sorted(growth) and 1e-4 < growth[0] < growth[3] < 0.1
    assert found.first_flip and sum(x.honest for x in found.layers) > 0 and sum(x.wrong for x in found.layers) == 0


@pytest.mark.parametrize("tokens", [1, 32])
def test_a_lean_within_the_budget_is_named(short, tokens):
    """Truncation to bfloat16: each error is within what bring-up permits, and only their direction is wrong."""

    def truncates(name, function):
        def call(x, w, *, out="x"):
            y = function(x, w, out="float32")
            return (y.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(x.dtype) if out == "x" else y

        return call if name == "linear" else function

    found = run(short, parts(wrap=[truncates]), tokens, dtype="bfloat16")
    assert found.at_fault and found.at_fault.op == "linear" and "toward zero" in found.at_fault.fault
    assert found.at_fault.worst < 4


def test_a_wrong_choice_is_no_honest_flip(short, honest):
    label = "layer 1 / indexer_topk / topk"
    found = run(short, parts(wrap=[planted(honest, label, higher_among_ties)]))
    assert found.first_flip and found.first_flip.label == label
    assert found.first_flip.wrong > 0 == found.first_flip.honest


# -- report and command ----------------------------------------------------------------------------------------------


def test_a_call_at_fault_is_saved_to_be_replayed(short, honest, tmp_path):
    label = "layer 1 / mla_prolog / rope"
    found = run(short, parts(wrap=[planted(honest, label, half_pairs)]), dtype="bfloat16")
    file = found.save(tmp_path)
    assert file == tmp_path / "layer1-mla_prolog-rope.npz"
    inputs, kept = read(file), np.load(file)
    assert (inputs.origin, kept["call"], kept["token"], kept["backend"]) == (label, label, "", "parts")
    assert inputs.operands["x"].dtype.name == "bfloat16" and inputs.attrs["layout"] == "interleaved"
    off = np.abs(kept["got/y"] - kept["golden/y"])
    assert off[0].max() < 0.1 < off[1:].max()  # position 0 does not turn
    assert replay(inputs, "reference").verdict == "PASS"  # in a worker
    done = subprocess.run([sys.executable, "-I", file.with_suffix(".py")], capture_output=True, text=True)
    title, line = done.stdout.splitlines()
    assert title == f"{label} on parts: permitted is 4 times the error budget"
    assert float(line.split("worst by ")[1].split()[0]) > 4


def test_an_honest_run_saves_nothing(honest, tmp_path):
    assert honest.save(tmp_path) is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("op", ["kv_write", "sparse_mla", "topk", "grouped_gemm", "moe_route"])
def test_a_saved_call_has_every_kind_of_operand(short, honest, tmp_path, op):
    label = next(c.label for c in honest.calls if c.op == op)
    found = run(short, parts(wrap=[planted(honest, label, raises)]))
    file = found.save(tmp_path)
    assert not [key for key in np.load(file) if key.startswith(("got/", "chosen/"))]
    inputs = read(file)
    assert inputs.spec == found.at_fault.inputs.spec
    assert replay(inputs, Parts()).verdict == "PASS"


@pytest.fixture
def command(capsys):
    """(exit code, stdout, stderr) of `porthal diff`."""

    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            app(["diff", *map(str, args)], prog_name="porthal")
        return left.value.code or 0, *capsys.readouterr()

    return call


def test_the_command_finds_nothing_on_the_reference(command, tmp_path):
    file = tmp_path / "report.json"
    code, out, _ = command("--backend", "reference", "--tokens", 8, "--decode", 1, "--json", file, "--save", tmp_path)
    report = json.loads(file.read_text())
    assert code == 0
    assert out.splitlines()[-2:] == [
        report["sentence"],
        "Running freely, the backend makes every discrete choice as the reference does.",
    ]
    assert report["sentence"].startswith("No op exceeds its error budget: ")
    assert (report["at_fault"], report["faults"], report["tokens"], report["decode"]) == (None, [], 8, 1)
    assert [row["layer"] for row in report["layers"]] == ["input", "layer 0", "layer 1", "layer 2", "head", "mtp"]
    assert list(tmp_path.iterdir()) == [file]


def test_the_command_names_and_saves_what_is_at_fault(command, tmp_path, monkeypatch):
    class Broken(Parts):
        def silu_mul(self, x):
            return np.zeros((*x.shape[:-1], x.shape[-1] // 2), x.dtype)

    monkeypatch.setattr("porthal.hal.create", lambda name, emulated: Broken())
    file, folder = tmp_path / "report.json", tmp_path / "saved"
    code, out, err = command("--text", "def f", "--decode", 0, "--json", file, "--save", folder)
    report = json.loads(file.read_text())
    assert code == 1
    assert "layer 0 / silu_mul is the first at fault, in step 0: " in out
    script, file = folder / "layer0-silu_mul.py", folder / "layer0-silu_mul.npz"
    assert err == f"saved: `python {script}` measures it, `porthal replay {file}` judges it again\n"
    assert (report["at_fault"]["layer"], report["at_fault"]["op"], report["tokens"]) == ("layer 0", "silu_mul", 5)
    assert {f["op"] for f in report["faults"]} == {"silu_mul"}
    assert script.is_file() and read(file).origin == "layer 0 / silu_mul"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--tokens", "0"], "porthal: --tokens is 0: expected a whole number of at least 1"),
        (["--decode", "-1"], "porthal: --decode is -1: expected a whole number of at least 0"),
        (["--json", "/none/report.json"], "porthal: cannot write /none/report.json"),
        (["--model", "/none"], "porthal: /none"),
    ],
)
def test_the_command_refuses_with_a_sentence(command, args, sentence):
    code, out, err = command("--backend", "reference", *args)
    assert (code, out) == (2, "")
    assert err.startswith(sentence), err
