"""The exported model: the same text in plain ONNX Runtime, whole files or none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install -e '.[dev]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[dev]'")

import porthal  # noqa: E402
from porthal.backends.onnxruntime.functions import nodes  # noqa: E402
from porthal.backends.onnxruntime.graph import Graph  # noqa: E402
from porthal.cli.app import app  # noqa: E402
from porthal.hal import Batch, UsageError  # noqa: E402
from porthal.model.export import export  # noqa: E402
from porthal.model.load import DEMO, opened  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TEXT = "The capital of France is"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "model.onnx"
    written = export(*opened(DEMO), out)
    assert [p.name for p in written] == ["model.onnx", "model.onnx.data", "model.draft.onnx"]
    assert {p.name for p in out.parent.iterdir()} == {p.name for p in written}
    return out


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def empty_cache(run, pages):
    return {i.name: np.zeros((pages * 64, i.shape[1]), np.float32) for i in run.get_inputs() if "cache" in i.name}


def arrays(batch):
    names = ("positions", "visible", "slots", "row_request", "kv_len", "block_table", "last_rows")
    return {name: getattr(batch, name) for name in names}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_script_without_porthal_writes_the_text_of_the_reference(dtype, exported, tmp_path):
    script = ROOT / "examples/onnx/generate.py"
    assert "porthal" not in script.read_text(encoding="utf-8")
    model = exported if dtype == "float32" else export(*opened(DEMO), tmp_path / "model.onnx", dtype)[0]
    command = [sys.executable, "-I", str(script), str(model)]
    written = subprocess.run([*command, TEXT, "40"], cwd=tmp_path, capture_output=True, check=True).stdout
    tokens = porthal.model.load(DEMO, porthal.bind("reference"), dtype=dtype).generate(list(TEXT.encode()), 40)
    assert written == TEXT.encode() + bytes(tokens) + b"\n"
    empty = subprocess.run([*command, "", "4"], capture_output=True, text=True)
    for path in (model, model.with_name("model.draft.onnx")):
        made = onnx.load(str(path), load_external_data=False).graph
        kinds = {v.name: v.type.tensor_type.elem_type for v in (*made.input, *made.output)}
        of = {kind for name, kind in kinds.items() if "cache" in name or "hidden" in name}
        assert of == {onnx.TensorProto.FLOAT if dtype == "float32" else onnx.TensorProto.BFLOAT16}
        starts = [int(f.value) for t in made.initializer for f in t.external_data if f.key == "offset"]
        assert starts and not any(start % 4096 for start in starts)  # so that it can be mapped
    said = "the text is empty: expected at least one byte, as a step has at least one row\n"
    assert (empty.returncode, empty.stdout, empty.stderr) == (1, "", said)


def test_caches_of_few_bits_are_codes_and_scales(tmp_path):
    caches = ("int8_half_keys", "int8_tile_latents")
    out, script = tmp_path / "model.onnx", ROOT / "examples/onnx/generate.py"
    options = [part for name in caches for part in ("--cache-scheme", name)]
    assert app(["export", "--out", str(out), *options], standalone_mode=False) == 0
    kinds = {i.name.partition("_")[2].partition("_")[2]: i.type for i in session(out).get_inputs() if "cache" in i.name}
    latents = {"c": "tensor(int8)", "c_scale": "tensor(float)", "kp": "tensor(float)"}
    assert kinds == {**latents, "k": "tensor(int8)", "k_scale": "tensor(float16)"}
    tokens = porthal.model.load(DEMO, porthal.bind("reference"), caches=caches).generate(list(TEXT.encode()), 16)
    own = porthal.model.load(DEMO, porthal.bind("onnxruntime"), caches=caches)
    assert own.generate(list(TEXT.encode()), 4) == tokens[:4]
    written = subprocess.run([sys.executable, "-I", str(script), str(out), TEXT, "16"], capture_output=True, check=True).stdout
    assert written == TEXT.encode() + bytes(tokens) + b"\n"
    with pytest.raises(UsageError, match="a cache is under fp8_keys, which graphs have no codes for: expected int8_keys, "):
        export(*opened(DEMO, ["fp8_keys"]), out)


def test_graphs_are_legal_and_inlined_ones_have_no_functions(exported, tmp_path):
    onnx.checker.check_model(str(exported), full_check=True)
    inline = tmp_path / "inline.onnx"
    assert app(["export", "--out", str(inline), "--inline"], standalone_mode=False) == 0
    made = onnx.load(str(inline), load_external_data=False)
    onnx.checker.check_model(str(inline), full_check=True)
    assert not made.functions and {n.domain for n in made.graph.node} == {""}


def test_a_step_has_few_nodes(exported, tmp_path):
    """As many as the runtime is left with; each costs a microsecond or more, whatever it computes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
    made = onnx.load(str(tmp_path / "optimised.onnx"), load_external_data=False)
    assert len(list(nodes(made.graph))) < 490


def test_the_reference_evaluator_of_onnx_gives_the_same_logits(tmp_path):
    from onnx.reference import ReferenceEvaluator

    inline = tmp_path / "inline.onnx"
    export(*opened(DEMO), inline, inline=True)
    run = session(inline)
    batch = Batch.build([3], [3], [[0]], 64)
    given = {"ids": np.array(list(b"def"), np.int32), **arrays(batch), **empty_cache(run, 1)}
    with np.errstate(divide="ignore"):  # the lowest number is written as the logarithm of 0
        found = ReferenceEvaluator(onnx.load(str(inline))).run(["logits"], given)[0]
    assert np.abs(found - run.run(["logits"], given)[0]).max() < 1e-3


def test_a_batch_of_several_requests_gives_each_its_logits(exported):
    """Two requests in one step, of other lengths than the traced ones, with pages that are not in order."""
    run = session(exported)
    batch = Batch.build([5, 70], [5, 70], [[2], [1, 0]], 64)
    text = [list(b"import"[:5]), list((b"def f(x):\n    return x\n" * 4)[:70])]
    ids = np.array([*text[0], *text[1]], np.int32)
    names = [o.name for o in run.get_outputs()]
    found = dict(zip(names, run.run(None, {"ids": ids, **arrays(batch), **empty_cache(run, 3)})))
    model = porthal.model.load(DEMO, porthal.bind("reference"))
    for logits, one in zip(found["logits"], text):
        wanted = model.forward(one)[-1]
        assert np.abs(logits - wanted).max() < 1e-3 * np.abs(wanted).max()


IDLE = """
import sys, numpy, onnxruntime
for path in sys.argv[1:]:
    run = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    types = {"tensor(float)": "f4", "tensor(int32)": "i4", "tensor(int64)": "i8"}
    sizes = {"rows": 0, "requests": 1, "columns": 1, "slots": 64}
    shapes = {i.name: ([sizes.get(d, d) for d in i.shape], types[i.type]) for i in run.get_inputs()}
    given = {name: numpy.full(shape, "cache" in name, of) for name, (shape, of) in shapes.items()}
    names = [o.name for o in run.get_outputs()]
    found = dict(zip(names, run.run(None, given)))
    print(all((found[name] == given[name[:-6]]).all() for name in names if "cache" in name), found["logits"].shape)
"""


def test_a_step_without_rows_leaves_the_cache(exported):
    """In a process of its own: the runtime's product of turned matrices divides by the count of rows."""
    paths = [str(exported), str(exported.with_name("model.draft.onnx"))]
    done = subprocess.run([sys.executable, "-I", "-c", IDLE, *paths], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True (1, 256)\n" * 2), done.stderr


def test_the_draft_is_that_of_the_model(exported):
    step, draft = session(exported), session(exported.with_name("model.draft.onnx"))
    ids = np.array(list(b"import numpy as np"), np.int32)
    batch = Batch.build([len(ids) - 1], [len(ids) - 1], [[0]], 64)
    names = [o.name for o in step.get_outputs()]
    found = dict(zip(names, step.run(None, {"ids": ids[:-1], **arrays(batch), **empty_cache(step, 1)})))
    given = {"ids": ids[1:], "hidden": found["hidden"], **arrays(batch), **empty_cache(draft, 1)}
    logits = dict(zip([o.name for o in draft.get_outputs()], draft.run(None, given)))["logits"]

    ops = porthal.bind("reference")
    model = porthal.model.load(DEMO, ops)
    cache = model.new_cache([len(ids)])
    planned = model.ops.plan(batch)
    hidden = model.hidden(ids[:-1], planned, cache)
    drafted, _ = model.mtp.hidden(ids[1:], model.embed, hidden, planned, cache.layers[-1], None)
    wanted = model.logits(drafted)[-1]
    assert np.abs(logits[0] - wanted).max() < 1e-3 * np.abs(wanted).max()


def full(*_):
    raise OSError(28, "No space left on device")


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    config, source = opened(DEMO)
    (tmp_path / "folder.draft.onnx").mkdir()
    for name in ("missing/model.onnx", "model.txt", ".", "folder.onnx"):
        with pytest.raises(UsageError, match=r"cannot be written: expected a file that ends in .onnx, in a folder that exists"):
            export(config, source, tmp_path / name)
    with monkeypatch.context() as patch, pytest.raises(UsageError, match=r"cannot write .*: No space left.*, give a writable"):
        patch.setattr(Graph, "weights_in", full)
        export(config, source, tmp_path / "model.onnx")
    read, count = source.read, 0

    def broken(*args):
        nonlocal count
        count += 1
        if count > 40:
            raise UsageError("the checkpoint ends here")
        return read(*args)

    source.read = broken
    with pytest.raises(UsageError, match="the checkpoint ends here"):
        export(config, source, tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == ["folder.draft.onnx"]
    with pytest.raises(UsageError, match="onnxruntime:graph only records a model, for porthal export: name another backend"):
        porthal.model.load(DEMO, porthal.bind("onnxruntime:graph"))


def test_weights_are_written_a_piece_at_a_time(monkeypatch, exported):
    """Whatever the size of a tensor, so much of it is in memory at once."""
    from porthal.backends.onnxruntime import graph

    sizes = []
    monkeypatch.setattr(graph, "PIECE", 4096)
    made = graph.Graph()
    with open(os.devnull, "wb") as sink:
        made.weights_in(sink, "x")
        spec = porthal.hal.WeightSpec("linear", "w", (1000, 16), "float32")

        def read(rows):
            sizes.append(rows.stop - rows.start)
            return np.zeros((sizes[-1], 16), np.float32)

        made.prepare(spec, read)
    assert sum(sizes) == 1000 and max(sizes) * 64 <= 4096
