"""docs/schemes.md: what each scheme is, whose calls take it, and what reports say of each op under it.

`python -m porthal.conformance.report.schemes A.json B.json > docs/schemes.md`, of reports that `porthal conform --json` wrote.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from porthal.conformance.cases.case import Case
from porthal.conformance.report.report import Report
from porthal.conformance.report.results import Result
from porthal.hal import SCHEMES, Scheme, contracts
from porthal.hal.scheme import ACTIVATIONS, KEYS, LATENTS, WEIGHTS

HEAD = """# Schemes

How codes and scales say the numbers of weights, activations and caches ([hal/scheme.py](../hal/scheme.py),
[decision 15](decisions/0015-schemes.md)). `reference` and `torch` take all of them; a vendor's kernel states its own,
`@limits(schemes="fp8_keys")`. A checkpoint's matrices stay under a scheme where the kernels take it
([checkpoints.md](checkpoints.md)); caches are put under one by `--cache-scheme`. This page is made by
`python -m porthal.conformance.report.schemes A.json B.json`, of reports of `porthal conform --json`.

| scheme | of | codes | a scale for | which is | the other operand |
|---|---|---|---|---|---|"""
CALLS_HEAD = """
## Whose calls take it

Read from vendors' schemas and sources. Where a backend here makes such a call, it says so in `porthal explain`.

| scheme | calls |
|---|---|"""
# What takes a scheme, as read; a scheme that is not here is taken by none that was read.
CALLS = {
    "int8_channel": "npu_quant_matmul, npu_grouped_matmul, npu_grouped_matmul_swiglu_quant_v2 (torch-npu); scaled_matmul, "
    "smooth_quant_group_gemm (Cambricon); moe_fc (Kunlunxin)",
    "fp8_block": "DeepGEMM and MATE: m_grouped_fp8_gemm_nt_contiguous, _masked",
    "mxfp4": "none with x as it is: Ascend 950's W4A8 and W4A4 quantise x as well",
    "int8_token": "npu_dynamic_quant (torch-npu)",
    "int8_half_keys": "npu_quant_lightning_indexer on A2 and A3, which wants query and key rotated first",
    "int8_keys": "I8_mqa_logits, I8_paged_mqa_logits (Kunlunxin)",
    "fp8_keys": "fp8_mqa_logits, fp8_paged_mqa_logits (DeepGEMM and MATE): 132 bytes a key, a page's keys before its scales",
    "fp8_latents": "flash_mla_with_kvcache (FlashMLA): 656 bytes a row; npu_kv_quant_sparse_flash_attention on 950",
    "int8_tile_latents": "npu_kv_quant_sparse_flash_attention on A2 and A3: 656 bytes a row, scales last",
}
RESULTS_HEAD = """
## What was measured

The worst error of an element in units of its budget, over the cases of an op under a scheme, and whose kernel computed it.
Codes are judged exactly: where they are the result, there is no error to tell.
"""
USES = (("a weight", WEIGHTS), ("activations", ACTIVATIONS), ("index keys", KEYS), ("latents", LATENTS))
OF_MATRIX = {(1, 0): "a row", (0, 0): "the matrix"}


def page(reports: Sequence[Report]) -> str:
    """The whole page."""
    return "\n".join(lines(reports)) + "\n"


def head() -> str:
    """What follows from the schemes alone."""
    return "\n".join(lines(()))


def lines(reports: Sequence[Report]) -> Iterator[str]:
    yield HEAD
    for scheme in SCHEMES.values():
        other = f"`{scheme.other}`" if scheme.other else "as it is"
        whole = ", under one of float32 for the matrix" if scheme.scale == "float8_e4m3fn" else ""
        shared = OF_MATRIX.get(scheme.block) or f"{scheme.block[0]} x {scheme.block[1]}"
        beside = other if scheme.name not in ACTIVATIONS or scheme.name in WEIGHTS else ""
        yield f"| `{scheme.name}` | {_uses(scheme)} | {scheme.codes} | {shared} | {scheme.scale}{whole} | {beside} |"
    yield CALLS_HEAD
    yield from (f"| `{name}` | {CALLS.get(name, 'none that was read')} |" for name in SCHEMES)
    if reports:
        yield RESULTS_HEAD
        yield from (f"- {_about(report)}" for report in reports)
        yield f"\n| op | scheme | {' | '.join(report.backend for report in reports)} |\n|---|---|{'---|' * len(reports)}"
        yield from _rows(reports)


def _uses(scheme: Scheme) -> str:
    return ", ".join(use for use, names in USES if scheme.name in names)


def _about(report: Report) -> str:
    return f"**{report.backend}** ({report.place}), level {report.level}, {report.date[:10]}"


def _rows(reports: Sequence[Report]) -> Iterator[str]:
    found: dict[tuple[str, str], list[list[Result]]] = {}
    for op, contract in contracts().items():
        names = [*contract.cases.get("scheme", ()), *(name for each in contract.schemes.values() for name in each)]
        found |= {(op, str(name)): [[] for _ in reports] for name in dict.fromkeys(names)}
    for at, report in enumerate(reports):
        for result in report.results:
            if "fault=" in result.token or result.status == "refusal":
                continue
            case = Case.from_token(result.token)
            given = {case.scheme(operand) for operand in case.contract.schemes} | {str(case.attributes.get("scheme", ""))}
            for key in ((result.op, name) for name in given):
                if key in found:
                    found[key][at].append(result)
    for (op, scheme), each in found.items():
        yield f"| {op} | `{scheme}` | {' | '.join(map(_cell, each))} |"


def _cell(results: Sequence[Result]) -> str:
    """Whose kernel, how many cases, and the worst error."""
    if not results:
        return "not run"
    failed = [r for r in results if r.failed]
    whose = ", ".join(dict.fromkeys(r.status for r in results))
    worst = max(r.worst for r in results)
    counted = f"{len(results) - len(failed)} of {len(results)}" if failed else f"{len(results)}"
    return f"{whose}, {counted} passed{f', {worst:.2g}' if worst else ''}"


if __name__ == "__main__":
    print(page([Report.from_json(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]]), end="")
