"""examples/jax: a chip whose arrays are immutable and whose kernels are compiled per shape."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed: pip install -e '.[dev]' brings it from Python 3.11 on")

import porthal  # noqa: E402
from porthal.cli.app import app  # noqa: E402
from porthal.conformance.cases.case import Case  # noqa: E402
from porthal.conformance.cases.copies import build  # noqa: E402
from porthal.conformance.cases.legal import elements  # noqa: E402
from porthal.conformance.cases.plan import cases  # noqa: E402
from porthal.conformance.execution.bindings import Bindings  # noqa: E402
from porthal.conformance.execution.placing import place  # noqa: E402
from porthal.conformance.execution.traits import left_out  # noqa: E402
from porthal.conformance.runner.check import check  # noqa: E402
from porthal.hal import Backend, Operand, Unavailable, UsageError, contracts, discovery  # noqa: E402
from porthal.model import load  # noqa: E402

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "jax"
INHERITED = {"cast", "dequantize", "gather_logprob", "grouped_gemm", "log_softmax", "moe_permute", "moe_unpermute"}
INHERITED |= {"page_copy", "quantize"}
COMPOSED = {"index_prolog", "mla_output", "mla_prolog", "moe_layer", "mtp_input"}
OWN = sorted(contracts().keys() - INHERITED - COMPOSED)
PROMPT = list(b"def get(")  # as long as what `diff` reads, whose programs are compiled then


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The plugin as an installer leaves it, in this process alone."""
    import tomllib

    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    info = tmp_path_factory.mktemp("site") / f"porthal_xla-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    ((group, entries),) = project["entry-points"].items()
    (info / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(EXAMPLE), str(info.parent), *sys.path])
        discovery._packages.cache_clear()
        yield
    discovery._packages.cache_clear()


@pytest.fixture(scope="module")
def xla() -> Backend:
    return porthal.hal.create("xla")


@pytest.fixture(scope="module")
def binding() -> porthal.Binding:
    return porthal.bind("xla", overrides={}, fallback="error")


def some(op: str, quantised: bool = False) -> list[Case]:
    """A part of bring-up: every sixteenth of the cases that are small and neither a view nor a mistake.

    Quantised are those under a scheme: no kernel of the chip takes one.
    """
    small = [c for c in cases(contracts()[op]) if elements(c) < 2**19 and not c.view and not c.fault]
    return [c for c in small if bool(c.schemes) == quantised][::16]


# -- its kernels ---------------------------------------------------------------------------------------------------------


def test_it_is_found_and_owns_what_a_model_calls(binding: porthal.Binding, capsys: pytest.CaptureFixture[str]) -> None:
    found = {word: {op for op, choice in binding.choices.items() if choice.status == word} for word in binding.counts()}
    assert found == {"own": set(OWN), "inherited": INHERITED, "composed": COMPOSED, "fallback": set(), "missing": set()}
    with pytest.raises(SystemExit) as left:
        app(["explain", "--backend", "xla"], "porthal")
    assert not left.value.code
    assert f"in float32: {len(OWN)} own, {len(INHERITED)} inherited, {len(COMPOSED)} composed" in capsys.readouterr().out


@pytest.mark.parametrize("op", contracts())
def test_a_part_of_bring_up_passes(op: str, xla: Backend) -> None:
    bindings = Bindings(xla)
    results = [check(case, bindings) for case in some(op)]
    assert [r.explain() for r in results if r.failed] == []
    found = Counter(r.status for r in results if r.tested)
    assert set(found) == {"own" if op in OWN else "inherited" if op in INHERITED else "composed"}


@pytest.mark.parametrize("op", [op for op in contracts() if some(op, quantised=True)])
def test_quantised_calls_pass_and_are_never_its_own(op: str, xla: Backend) -> None:
    bindings = Bindings(xla)
    results = [check(case, bindings) for case in some(op, quantised=True)]
    assert [r.explain() for r in results if r.failed] == []
    composed = op in COMPOSED or op in ("indexer_topk", "moe_experts")  # of these two its kernels replace a composition
    assert {r.status for r in results if r.tested} == {"composed" if composed else "inherited"}


def traced(binding: Any, case: Case) -> Any:
    """The op as JAX sees it when it traces all of it, its operands taken apart: there are no values to be read."""
    inputs = build(case)
    operands = {name: place(binding, name, value)[0] for name, value in inputs.operands.items()}

    def native(value: Any) -> Any:
        return value.native if isinstance(value, Operand) else value

    def call(natives: dict[str, Any]) -> Any:
        made = {n: replace(v, native=natives[n]) if isinstance(v, Operand) else natives[n] for n, v in operands.items()}
        found = getattr(binding, case.op)(*made.values(), **inputs.attrs)
        return tuple(map(native, found if type(found) is tuple else (found,)))

    return jax.eval_shape(call, {name: native(value) for name, value in operands.items()})


@pytest.mark.parametrize("op", OWN)
def test_an_own_kernel_reads_no_value_on_the_host(op: str, binding: porthal.Binding) -> None:
    for case in some(op):
        for got, result in zip(traced(binding, case), build(case).contract.signature.results):
            assert jax.tree.leaves(got), result.name


def test_numpy_between_arguments_and_results_would_be_seen(xla: Backend) -> None:
    numpys = type("Numpys", (type(xla),), {"name": "numpys", "add": lambda self, a, b: self.from_numpy(np.add(a, b))})
    binding = porthal.bind(backend=numpys(), overrides={}, fallback="error")
    with pytest.raises(jax.errors.TracerArrayConversionError):
        traced(binding, some("add")[0])


# -- its arrays ----------------------------------------------------------------------------------------------------------


def test_its_traits_leave_out_only_views_and_captured_calls(xla: Backend) -> None:
    """It has no arrays for the one and no graphs for the other; four fifths of the cases ask for neither."""
    planned = [case for op in OWN for case in cases(contracts()[op], "standard") if not case.schemes]
    left = [case for case in planned if left_out(case, xla)]
    assert left and all(case.view or case.capture for case in left)
    assert len(left) <= 0.2 * len(planned)


def test_xla_reads_denormals_as_zero(xla: Backend) -> None:
    least = np.array([1e-39, 2.0**-126], np.float32)
    zero = jax.jit(lambda x: x == 0)(xla.from_numpy(least))
    assert xla.traits.flushes_denormals and xla.to_numpy(zero).tolist() == [True, False]


def test_an_array_is_a_copy_with_all_its_bits(xla: Backend) -> None:
    given = np.zeros((64, 64), np.float32)
    array = xla.from_numpy(given)
    given[...] = 1
    assert isinstance(array, jax.Array) and not xla.to_numpy(array).any()
    with pytest.raises(UsageError, match=r"^JAX makes int32 of int64 "):
        xla.from_numpy(np.array([2**40]))


def test_a_device_that_is_not_there_is_refused() -> None:
    for device in ("99", "-1", "cpu"):
        with pytest.raises(Unavailable, match=f"^JAX has no device '{device}' here: expected one of 0"):
            porthal.hal.create(f"xla:{device}")


def test_the_cache_is_written_in_its_own_memory(xla: Backend, binding: porthal.Binding) -> None:
    pages = binding.alloc_pages(porthal.hal.PagesSpec((("c", 8), ("kp", 4)), "float32", 3, 4))
    batch = binding.plan(porthal.hal.Batch.build([2, 1], [5, 0], [[2, 0], []], 4))
    before = {name: pages[name].unsafe_buffer_pointer() for name in ("c", "kp")}
    rows = np.arange(36, dtype=np.float32).reshape(3, 12) + 1
    written = binding.kv_write(pages, batch, xla.from_numpy(rows[:, :8]), xla.from_numpy(rows[:, 8:]))
    assert {name: written[name].unsafe_buffer_pointer() for name in ("c", "kp")} == before
    wanted = np.zeros((12, 12), np.float32)
    wanted[11], wanted[0] = rows[:2]  # positions 3 and 4; the third row belongs to a padded request
    assert np.array_equal(np.concatenate(list(binding.to_logical(written).values()), axis=1), wanted)


# -- the model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speculative", [0, 3])
def test_greedy_text_is_the_references(binding: porthal.Binding, speculative: int) -> None:
    model, right = load(binding=binding), load(binding=porthal.bind("reference", overrides={}))
    copies = binding.backend.host_copies
    text = model.generate(PROMPT, 16, speculative=speculative)
    assert len(text) == 16 and text == right.generate(PROMPT, 16)
    assert 0 < binding.backend.host_copies - copies <= 16  # one per step: the tokens


def test_in_lockstep_no_op_is_at_fault(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        app(["diff", "--backend", "xla", "--tokens", str(len(PROMPT)), "--decode", "1"], "porthal")
    out = capsys.readouterr().out
    assert not left.value.code, out
    assert "No op exceeds its error budget: " in out
