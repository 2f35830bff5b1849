"""`porthal diff` under schemes names op, layer and operand: scales, codes, or what was written to a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from porthal.conformance.diff.model import Difference, lockstep
from porthal.hal import ANY_SCHEME, Pages, Weight, bind, discovery, limits
from porthal.model.quantising import quantise
from tests.checkpoints import variant
from tests.oracles.tiny import PROMPT

CACHES = ("int8_keys", "fp8_latents")


class Parts(discovery.backend_class("reference")):
    """The reference's kernels, with every composite made of its parts."""

    name = "parts"
    width = 0


def planted(*kernels: Any, **services: Any) -> Any:
    """A chip with these kernels, which take all schemes."""
    made = {kernel.__name__: limits(schemes=ANY_SCHEME)(kernel) for kernel in kernels}
    return type("Planted", (Parts,), made | services)()


@pytest.fixture(scope="module")
def coded(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dense layer and one with experts, of int8."""
    out = tmp_path_factory.mktemp("coded")

    def shorten(tensors: Any) -> None:
        for name in [n for n in tensors if n.startswith(("model.layers.2.", "model.layers.3.", "model.layers.4."))]:
            del tensors[name]

    short = variant(checkpoints["glm5"], out / "short", shorten, num_hidden_layers=2, num_nextn_predict_layers=0)
    quantise(short, out / "int8", "int8")
    return out / "int8"


def run(model: Path, backend: Any, caches: tuple[str, ...] = ()) -> Difference:
    return lockstep(bind(backend=backend, overrides={}, fallback="error"), PROMPT[:9], model, decode=1, caches=caches)


def test_right_kernels_are_not_blamed(coded: Path) -> None:
    found = run(coded, Parts(), CACHES)
    assert found.at_fault is None, found.sentence
    assert {c.op for c in found.calls} >= {"grouped_gemm", "indexer_scores", "sparse_mla", "kv_write"}


def changed(w: Weight, **parts: Any) -> Weight:
    return Weight(w.spec, {**w.native, **parts})


@pytest.mark.parametrize(("part", "said"), [("scale", "scale[1, 0, 0] is "), ("codes", "codes[1, 0, 0] is ")])
def test_what_was_packed_wrongly(coded: Path, part: str, said: str) -> None:
    """The second expert's, in which the first's lies: as of a loader that counts rows of another size."""

    def prepare(self: Any, spec: Any, read: Any, into: Any = None) -> Any:
        w = Parts.prepare(self, spec, read, into)
        if spec.op == "grouped_gemm" and spec.quantised:
            w.native[part][1] = w.native[part][0]
        return w

    def grouped_gemm(self: Any, x: Any, w: Any, counts: Any) -> Any:
        return bind("reference").grouped_gemm(x, w, counts)

    found = run(coded, planted(grouped_gemm, prepare=prepare))
    assert found.at_fault and found.at_fault.place == ("layer 1", "moe_layer", "moe_experts", "grouped_gemm")
    assert f"its weight w was prepared wrongly: {said}" in found.at_fault.fault


def as_unsigned(w: Weight) -> Weight:
    return changed(w, codes=np.abs(w.native["codes"]))


def of_the_next(w: Weight) -> Weight:
    return changed(w, scale=np.roll(w.native["scale"], 1, axis=-2))


@pytest.mark.parametrize(("wrong", "what"), [(as_unsigned, "codes"), (of_the_next, "scales")])
def test_what_a_kernel_reads_wrongly_of_a_weight(coded: Path, wrong: Any, what: str) -> None:
    def grouped_gemm(self: Any, x: Any, w: Any, counts: Any) -> Any:
        return bind("reference").grouped_gemm(x, wrong(w), counts)

    found = run(coded, planted(grouped_gemm))
    assert found.at_fault and found.at_fault.place == ("layer 1", "moe_layer", "moe_experts", "grouped_gemm")
    assert found.at_fault.fault.endswith(f"; with all {what} of w 1 it is right")
    assert f"with all {what} of w 1 it is right" in found.sentence


def test_what_a_kernel_reads_wrongly_of_a_cache(coded: Path) -> None:
    """FlashMLA's decode on one chip cuts scales to powers of two."""

    def sparse_mla(self: Any, q_latent: Any, q_rope: Any, kv: Any, sel: Any, batch: Any, *, scale: float) -> Any:
        cut = np.exp2(np.floor(np.log2(np.maximum(kv["c_scale"], 1e-30)))).astype(np.float32)
        kv = Pages(kv.spec, kv.native | {"c_scale": cut})
        return bind("reference").sparse_mla(q_latent, q_rope, kv, sel, batch, scale=scale)

    found = run(coded, planted(sparse_mla), CACHES)
    assert found.at_fault and found.at_fault.place == ("layer 0", "sparse_mla")
    assert found.at_fault.fault.endswith("; with all scales of kv 1 it is right")


@pytest.mark.parametrize(("field", "place"), [("k_scale", "index_prolog"), ("c", "mla_prolog")])
def test_what_a_kernel_writes_wrongly_to_a_cache(coded: Path, field: str, place: str) -> None:
    def kv_write(self: Any, pages: Any, batch: Any, first: Any, second: Any = None) -> Any:
        made = bind("reference").kv_write(pages, batch, first, second)
        slot = int(batch.slots[-1])
        if field in made.native:
            made.native[field][slot] = made.native[field][slot] * 0 + 2
        return made

    found = run(coded, planted(kv_write), CACHES)
    assert found.at_fault and found.at_fault.place == ("layer 0", place, "kv_write")
    under = CACHES[field == "c"]
    assert f"pages.{field}[" in found.at_fault.fault and f" under {under}" in found.at_fault.fault


def test_what_is_written_beside_the_slots_of_a_step(coded: Path) -> None:
    def kv_write(self: Any, pages: Any, batch: Any, first: Any, second: Any = None) -> Any:
        made = bind("reference").kv_write(pages, batch, first, second)
        if "k_scale" in made.native:
            made.native["k_scale"][-1] = 3
        return made

    found = run(coded, planted(kv_write), CACHES)
    assert found.at_fault and found.at_fault.place == ("layer 0", "index_prolog", "kv_write")
    assert "pages.k_scale[63, 0] is 3.0, expected 0.0 outside the slots it writes" in found.at_fault.fault
