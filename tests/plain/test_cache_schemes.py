"""A model whose caches hold codes: what lies in them, drafts, batches, copied pages; which scheme is refused, and by whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.bench.scale import Bounds
from porthal.bench.workloads import workload
from porthal.hal import CallSpec, NotClaimed, UsageError, bind, limits, scheme_of
from porthal.hal.calls import distinct
from porthal.model.config import Config
from porthal.model.generate import generate
from porthal.model.glm5 import Glm5
from porthal.model.load import DEMO, load, trace
from porthal.model.tokens import ids_array
from tests.oracles.tiny import PROMPT

BOTH = ("int8_keys", "fp8_latents")


def model(directory: Path, caches: tuple[str, ...] = BOTH, backend: Any = None) -> Glm5:
    return load(directory, bind(backend=backend or Reference()), caches=caches)


def test_a_scheme_belongs_to_one_cache() -> None:
    config = Config.read(DEMO)
    assert (config.keys, config.latents) == ("none", "none")
    made = config.cached(BOTH)
    assert (made.keys, made.latents) == BOTH
    assert config.cached(()) == config
    with pytest.raises(UsageError, match=r"a cache's scheme is 'fp8_block': expected one of int8_keys, .*, fp8_latents"):
        config.cached(["fp8_block"])
    with pytest.raises(UsageError, match="the cache of keys has the schemes int8_keys and fp8_keys: expected one of them"):
        config.cached(["int8_keys", "fp8_keys"])


def test_caches_hold_the_codes_of_what_plain_ones_hold(checkpoints: dict[str, Path]) -> None:
    """In the first layer, whose inputs are the same."""
    found, caches = [], ("int8_half_keys", "int8_tile_latents")
    for each in ((), caches):
        made = model(checkpoints["glm5"], each)
        cache = made.new_cache([len(PROMPT)])
        batch = made.ops.plan(cache.step([cache.new_request()], [len(PROMPT)]))
        made.hidden(made.ops.from_numpy(ids_array(PROMPT)), batch, cache)
        layer = cache.layers[0]
        found.append([made.ops.to_logical(pages) for pages in (layer.keys, layer.kv) if pages])
    for name, field, plain, coded in zip(caches, ("k", "c"), *found):
        wanted = scheme_of(name).quantised(plain[field].astype(np.float64))
        assert coded[field].dtype == wanted["codes"].dtype and coded[field + "_scale"].dtype == wanted["scale"].dtype
        written = np.abs(plain[field]).max(axis=1) > 0
        assert written.sum() == len(PROMPT)
        mine, right = {"codes": coded[field], "scale": coded[field + "_scale"]}, scheme_of(name)
        off = np.abs(right.numbers(mine) - right.numbers(wanted))[written]
        assert off.max() <= np.abs(plain[field]).max() / 14  # a code apart, where float32 rounded what is quantised
        assert not coded[field][~written].any()


def test_drafts_chunks_and_companions_leave_the_text_alone(checkpoints: dict[str, Path]) -> None:
    made = model(checkpoints["glm52"])  # whose layers share selections
    alone = [generate(made, [prompt], 9).tokens[0] for prompt in (PROMPT, PROMPT[:5])]
    assert generate(made, [PROMPT, PROMPT[:5]], 9).tokens == alone
    assert generate(made, [PROMPT, PROMPT[:5]], 9, speculative=2).tokens == alone
    assert generate(made, [PROMPT], 9, prefill_chunk=3).tokens == alone[:1]


def test_a_copied_page_goes_on_as_the_one_it_was_copied_from(checkpoints: dict[str, Path]) -> None:
    made = load(checkpoints["glm5"], bind(backend=Reference()), block_size=16, caches=BOTH)
    ops, cache = made.ops, made.new_cache([16, 16])
    first, fork = cache.new_request(), cache.new_request()

    def step(request: Any, ids: list[int]) -> Any:
        return made.logits(made.hidden(ops.from_numpy(ids_array(ids)), ops.plan(cache.step([request], [len(ids)])), cache))

    step(first, PROMPT[:9])
    fork.pages, fork.length = [cache.free.pop()], 9
    source, target = (ops.from_numpy(np.array(r.pages, np.int32)) for r in (first, fork))
    for layer in cache.layers:
        layer.kv = ops.page_copy(layer.kv, source, target)
        layer.keys = layer.keys and ops.page_copy(layer.keys, source, target)
    assert np.array_equal(step(first, PROMPT[9:11]), step(fork, PROMPT[9:11]))


def test_a_plain_cache_beside_one_of_codes_keeps_its_dtype(checkpoints: dict[str, Path]) -> None:
    """Where one kernel writes both, since it takes the codes of one: what reads the other finds the numbers as they were."""
    seen = set()

    class Keeping(Reference):
        name, widens = "keeping", False

        def sparse_mla(self, q_latent: Any, q_rope: Any, kv: Any, sel: Any, batch: Any, *, scale: float) -> Any:
            seen.update(str(kv[name].dtype) for name in ("c", "kp"))
            return bind("reference").sparse_mla(q_latent, q_rope, kv, sel, batch, scale=scale)

    texts = [generate(model(checkpoints["glm5"], ("int8_keys",), b), [PROMPT[:5]], 3).tokens for b in (Keeping(), Reference())]
    assert texts[0] == texts[1]
    assert seen == {"float32"}


# -- who takes it ----------------------------------------------------------------------------------------------------


class Plain(Reference):
    """A chip whose attention reads numbers, and has nothing to inherit it from."""

    name = "plain"

    def candidates(self, contract: Any) -> Any:
        found = super().candidates(contract)
        return [kernel for kernel in found if contract.name != "sparse_mla" or kernel.owner == self.name]

    @limits(provider="chip.attention")
    def sparse_mla(self, q_latent: Any, q_rope: Any, kv: Any, sel: Any, batch: Any, *, scale: float) -> Any:
        raise AssertionError("it is only asked for")


def test_a_scheme_that_nobody_takes_is_refused_with_the_op(checkpoints: dict[str, Path]) -> None:
    assert model(checkpoints["glm5"], ("int8_keys",), Plain())
    said = (
        r"^plain does not claim sparse_mla \(plain: quantisation scheme of kv is 'int8_latents', the kernel takes none\); "
        "set PORTHAL_FALLBACK=torch or reference to run what is missing there$"
    )
    with pytest.raises(NotClaimed, match=said):
        model(checkpoints["glm5"], ("int8_latents",), Plain())


def test_a_binding_for_plain_caches_is_not_one_for_codes(checkpoints: dict[str, Path]) -> None:
    plain = model(checkpoints["glm5"], ()).ops
    with pytest.raises(NotClaimed, match=r"is bound for other calls than kv_write with .*, pages int8_keys"):
        load(checkpoints["glm5"], plain, caches=("int8_keys",))


def test_ranks_must_have_the_same_caches() -> None:
    config = Config.read(DEMO)
    assert repr(config) != repr(config.cached(["int8_keys"]))  # what `load` lets them agree upon


# -- the program -----------------------------------------------------------------------------------------------------


def test_commands_take_it(command_line: Any) -> None:
    options = ("--backend", "reference", "--cache-scheme", "int8_keys", "--cache-scheme", "int8_latents")
    code, out, _ = command_line("generate", "    def get(self", "--max-new", "4", *options)
    assert (code, out) == (0, "    def get(self, ot")
    code, out, _ = command_line("diff", "--tokens", "9", "--decode", "1", *options)
    assert code == 0 and "No op exceeds its error budget" in out
    code, out, _ = command_line("explain", *options)
    assert code == 0 and "for the demo checkpoint in float32" in out
    code, out, err = command_line("generate", "x", "--cache-scheme", "int8")
    assert (code, out) == (2, "") and err.startswith("porthal: a cache's scheme is 'int8': expected one of int8_keys")


def test_explain_says_why_a_kernel_is_not_used(command_line: Any) -> None:
    _, out, _ = command_line("explain", "--backend", "onnxruntime", "--cache-scheme", "fp8_latents")
    assert "quantisation scheme of kv is 'fp8_latents', the kernel takes one of none" in " ".join(out.split())


def test_a_trace_states_the_scheme_and_its_bytes(command_line: Any, tmp_path: Path) -> None:
    code, out, _ = command_line("trace", "--json", "--context", "512", "--cache-scheme", "fp8_latents", "--dtype", "bfloat16")
    calls = {call["op"]: call for call in json.loads(out)}
    assert code == 0 and calls["sparse_mla"]["operands"]["kv"]["scheme"] == "fp8_latents"
    assert "scheme" not in calls["indexer_topk"]["operands"]["keys"]
    config, sizes = Config.read(DEMO), []
    for caches in ((), ("fp8_latents",)):
        [call] = [c for c in distinct(trace(config.cached(caches), "bfloat16", 1, 512)) if c.op == "sparse_mla"]
        sizes.append(call.bytes)
    selected, plain, coded = config.index_topk, 2 * 576, 512 + 4 * 4 + 2 * 64  # FlashMLA's 656 bytes a row
    assert sizes[0] - sizes[1] == selected * (plain - coded)
    file = tmp_path / "calls.json"
    file.write_text(out)
    tokens = [row.case.token for row in workload(str(file), ["decode"], "", Bounds()).rows if row.case.op == "sparse_mla"]
    assert tokens and all(",kv%fp8_latents," in token for token in tokens)


def test_a_weight_of_codes_has_its_bytes_and_those_of_its_scales() -> None:
    facts = {"T": 1, "K": 300, "N": 256}, {"x": "bfloat16", "w": "bfloat16"}, {"out": "x"}
    plain, coded = (distinct([("linear", CallSpec(*facts, {"w": name}))])[0] for name in ("none", "fp8_block"))
    assert plain.bytes - coded.bytes == 2 * 300 * 256 - (300 * 256 + 4 * 2 * 3)
    assert "w bfloat16%fp8_block[256, 300]" in coded.signature()


def test_a_workload_has_calls_under_the_scheme() -> None:
    made = workload("demo", ["decode"], "", Bounds(), BOTH)
    schemes = {row.case.op: dict(row.case.schemes) for row in made.rows}
    assert schemes["indexer_topk"] == {"keys": "int8_keys"} and schemes["sparse_mla"] == {"kv": "fp8_latents"}
    assert schemes["linear"] == {} and made.facts["caches"] == list(BOTH)
    assert made.whole and made.whole.caches == BOTH
    with pytest.raises(UsageError, match="--cache-scheme int8_keys is for the steps of a model"):
        workload("steps.json", ["decode"], "", Bounds(), BOTH)
