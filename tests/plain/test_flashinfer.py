"""Data sets of FlashInfer-Bench: written and read as the same calls; what has no contract is named; bad files are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from porthal.bench.flashinfer import read, write
from porthal.bench.scale import Bounds
from porthal.bench.workloads import workload
from porthal.hal import CallSpec, UsageError

BF16 = "bfloat16"
LINE = '{"definition": "%s", "workload": {"axes": {%s}, "inputs": {}}}'
CALLS = [
    ("linear", CallSpec({"T": 3, "K": 96, "N": 32}, {"x": BF16, "w": BF16}, {"out": "x"}, {})),
    ("linear", CallSpec({"T": 5, "K": 96, "N": 32}, {"x": BF16, "w": BF16}, {"out": "x"}, {})),
    ("linear", CallSpec({"T": 3, "K": 96, "N": 32}, {"x": BF16, "w": BF16}, {"out": "float32"}, {})),
    ("rms_norm", CallSpec({"T": 3, "H": 96}, {"x": BF16, "weight": "float32"}, {"eps": 1e-5}, {})),
    ("add_rms_norm", CallSpec({"T": 3, "H": 96}, {"x": BF16, "residual": BF16, "weight": BF16}, {"eps": 1e-5}, {})),
    (
        "sparse_mla",
        CallSpec(
            {"T": 2, "N": 4, "C": 512, "R": 64, "k": 128, "block_size": 64},
            dict.fromkeys(("q_latent", "q_rope", "kv"), BF16),
            {"scale": 0.0625},
            {},
        ),
    ),
]
Run = Callable[..., tuple[int, str, str]]


def facts(op: str, spec: CallSpec) -> Any:
    return op, sorted(spec.dims.items()), sorted(spec.dtypes.items()), sorted(spec.attrs.items())


def test_what_is_written_is_read_as_the_same_calls(tmp_path: Path) -> None:
    assert write(tmp_path, [*CALLS, ("topk", CALLS[0][1]), CALLS[0]], 256) == ["topk"]
    listed, left = read(tmp_path)
    assert left == []
    assert sorted(facts(each.op, each.spec) for each in listed) == sorted(facts(*call) for call in CALLS)
    [attention] = [each for each in listed if each.op == "sparse_mla"]
    assert attention.definition == "dsa_sparse_attention_h4_ckv512_kpe64_topk128_ps64"
    assert attention.requests == ((2, 256, 0),)


def test_definitions_have_the_published_fields(tmp_path: Path) -> None:
    write(tmp_path, CALLS, 256)
    made = json.loads((tmp_path / "definitions/gemm/gemm_n32_k96.json").read_text())
    assert {k: v for k, v in made.items() if k != "reference"} == {
        "name": "gemm_n32_k96",
        "op_type": "gemm",
        "axes": {"M": {"type": "var"}, "N": {"type": "const", "value": 32}, "K": {"type": "const", "value": 96}},
        "inputs": {"A": {"shape": ["M", "K"], "dtype": BF16}, "B": {"shape": ["N", "K"], "dtype": BF16}},
        "outputs": {"C": {"shape": ["M", "N"], "dtype": BF16}},
    }
    lines = (tmp_path / "workloads/gemm/gemm_n32_k96.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert first["workload"].pop("uuid") != second["workload"].pop("uuid")
    assert first == {
        "definition": "gemm_n32_k96",
        "workload": {"axes": {"M": 3}, "inputs": {"A": {"type": "random"}, "B": {"type": "random"}}},
        "solution": None,
        "evaluation": None,
    }
    for file in tmp_path.rglob("definitions/**/*.json"):  # its loader wants a function of that name
        definition = json.loads(file.read_text())
        assert f"def run({', '.join(definition['inputs'])}):" in definition["reference"]
        compile(definition["reference"], file.name, "exec")
    wide = json.loads((tmp_path / "definitions/gemm/gemm_n32_k96_bfloat16_float32.json").read_text())
    assert wide["outputs"]["C"]["dtype"] == "float32" and wide["name"] == "gemm_n32_k96_bfloat16_float32"


def test_they_become_rows_to_be_timed(tmp_path: Path) -> None:
    write(tmp_path, CALLS, 256)
    rows = workload(str(tmp_path), [], "", Bounds()).rows
    assert len(rows) == len(CALLS) and {row.step for row in rows} == {"alone"}
    one = workload(str(tmp_path / "workloads/gemm/gemm_n32_k96.jsonl"), [], "", Bounds())
    assert [row.case.token for row in one.rows] == [f"linear,T={T},N=32,K=96,x:bf16,distinct=4,0" for T in (3, 5)]
    assert one.dtype == BF16


def test_what_has_no_contract_is_named_and_left_out(tmp_path: Path) -> None:
    write(tmp_path, CALLS[:1], 64)
    definition = json.loads((tmp_path / "definitions/gemm/gemm_n32_k96.json").read_text())
    line = (tmp_path / "workloads/gemm/gemm_n32_k96.jsonl").read_text()
    others = {
        "gemm_fp8": definition | {"inputs": {k: v | {"dtype": "float8_e4m3fn"} for k, v in definition["inputs"].items()}},
        "gqa_paged_decode": definition | {"op_type": "gqa_paged"},
        "gemm_scaled": definition | {"inputs": definition["inputs"] | {"A_scale": {"shape": ["M"], "dtype": "float32"}}},
    }
    for name, other in others.items():
        (tmp_path / f"definitions/gemm/{name}.json").write_text(json.dumps(other | {"name": name}))
        (tmp_path / f"workloads/gemm/{name}.jsonl").write_text(line.replace("gemm_n32_k96", name))
    listed, left = read(tmp_path)
    assert [each.definition for each in listed] == ["gemm_n32_k96"]
    assert sorted(left) == [
        "gemm_fp8 is left out: no contract takes float8_e4m3fn",
        "gemm_scaled is left out: no contract has its inputs and outputs",
        "gqa_paged_decode is left out: no contract is of that kind",
    ]
    with pytest.raises(UsageError, match="has no workload that a contract takes: gemm_fp8 is left out"):
        read(tmp_path / "workloads/gemm/gemm_fp8.jsonl")


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("workloads/gemm/x.jsonl", "{", r"line 1 of .*x.jsonl is no workload \(JSONDecodeError"),
        ("workloads/gemm/x.jsonl", "[]\n", r"is no workload \(TypeError"),
        ("workloads/gemm/x.jsonl", LINE % ("none", ""), "is of 'none': expected a definition"),
        ("workloads/gemm/x.jsonl", LINE % ("gemm_n32_k96", ""), r"\(KeyError: 'M'\)"),
        ("workloads/gemm/x.jsonl", LINE % ("gemm_n32_k96", '"M": -1'), r"\(ValueError: M is -1\)"),
        ("definitions/gemm/x.json", "{}", r"x.json is no definition \(KeyError"),
        ("definitions/gemm/x.json", "no", r"x.json is no definition \(JSONDecodeError"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, command_line: Run, file: str, text: str, said: str) -> None:
    write(tmp_path, CALLS[:1], 64)
    (tmp_path / file).write_text(text)
    with pytest.raises(UsageError, match=said):
        read(tmp_path)
    code, _, err = command_line("bench", "--backend", "reference", "--workload", tmp_path)
    assert code == 2 and err.startswith("porthal: ") and err.count("\n") == 1


def test_folders_that_hold_none_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no workloads: expected the folder of a FlashInfer-Bench data set"):
        read(tmp_path)
    (tmp_path / "alone.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"alone.jsonl has no workloads"):
        read(tmp_path / "alone.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write .*: Not a directory"):
        write(tmp_path / "file", CALLS[:1], 64)


def test_trace_writes_what_bench_reads(tmp_path: Path, command_line: Run) -> None:
    code, out, err = command_line("trace", "--flashinfer", tmp_path, "--rows", 2, "--context", 130)
    assert code == 0 and "calls" in out
    assert "left out, since FlashInfer-Bench has no definition of the kind: argmax, " in err
    listed, left = read(tmp_path)
    assert left == [] and {each.op for each in listed} == {"linear", "rms_norm", "add_rms_norm", "sparse_mla"}
    [attention] = [each for each in listed if each.op == "sparse_mla"]
    assert attention.requests[0].q == 2 and attention.requests[0].kv == 192  # whole pages
