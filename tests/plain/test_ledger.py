"""Faults planted in the tensors of a checkpoint: the logits stay right, or one sentence names the tensor.

Tensors of every role have them: the projections and norms of a dense layer, of one with experts, and of the MTP layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from porthal import Binding, UsageError
from porthal.hal import bind, recorded
from porthal.model import Config, Glm5, load
from porthal.model.checkpoint import Blank, Checkpoint, TensorFile
from tests.checkpoints import Tensors, variant
from tests.oracles import published, tiny
from tests.oracles.tiny import PROMPT

TOKENS = PROMPT[:24]  # more than index_topk
BLOCK = 32
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}}
Q_A = "model.layers.1.self_attn.q_a_proj.weight"
EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"
MTP = "model.layers.4."
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def exact(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """glm52 with numbers that bfloat16, float16 and float32 all hold."""

    def halve(tensors: Tensors) -> None:
        for name, values in tensors.items():
            short = values.astype(ml_dtypes.bfloat16).astype(np.float32)
            tensors[name] = np.where(np.abs(short) < 2**-14, np.float32(0), short)

    return variant(checkpoints["glm52"], tmp_path_factory.mktemp("exact"), halve)


@pytest.fixture(scope="module")
def tensors(exact: Path) -> Tensors:
    return load_file(exact / "model.safetensors")


@pytest.fixture(scope="module")
def roles(tensors: Tensors) -> list[str]:
    """One tensor of each kind, where layers 0 (dense), 1 (experts) and 4 (MTP) are of different kinds."""
    first: dict[str, str] = {}
    for name in tensors:
        if not name.startswith(("model.layers.2.", "model.layers.3.")):
            first.setdefault(re.sub(r"experts\.\d+", "experts", name), name)
    return list(first.values())


Check = Callable[..., None]


@pytest.fixture
def right(exact: Path, tmp_path: Path, reference: Binding) -> Check:
    """A changed checkpoint gives the same text, drafts included, bit for bit."""
    whole = answers(load(exact, reference))

    def check(change: Callable[[Tensors], object] = lambda tensors: None, source: Path = exact, **config: Any) -> None:
        assert answers(load(variant(source, tmp_path, change, **config), reference)) == whole

    return check


@pytest.fixture
def refused(exact: Path, tensors: Tensors, tmp_path: Path, reference: Binding) -> Check:
    """A changed checkpoint is refused in one sentence that holds these parts."""
    raw = json.loads((exact / "config.json").read_text())

    def check(change: Callable[[Tensors], object], *parts: str, dtype: str = "float32", **config: Any) -> None:
        changed = {name: values.copy() for name, values in tensors.items()}
        change(changed)
        save_file(changed, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(raw | config))
        refusal(lambda: load(tmp_path, reference, dtype=dtype), *parts)

    return check


def answers(model: Glm5) -> tuple[bytes, list[int]]:
    return model.forward(TOKENS).tobytes(), model.generate(TOKENS, 4, speculative=3)


def refusal(call: Callable[[], object], *parts: str) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    text = str(caught.value)
    assert [part for part in parts if part not in text] == [], text
    assert "\n" not in text


# -- one tensor --------------------------------------------------------------------------------------------------------

FAULTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "one row more": lambda x: np.concatenate([x, x[:1]]),
    "one row less": lambda x: x[1:],
    "flat": lambda x: x.reshape(-1, 1),
    "int32": lambda x: np.ones(x.shape, np.int32),
    "float64": lambda x: x.astype(np.float64),
    "float8 without a scale": lambda x: x.astype(ml_dtypes.float8_e4m3fn),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_that_is_not_as_expected(roles: list[str], refused: Check, fault: str) -> None:
    for name in roles[[*FAULTS].index(fault) % 2 :: 2]:
        refused(lambda tensors, name=name: tensors.update({name: FAULTS[fault](tensors[name])}), repr(name))


def test_a_tensor_that_is_missing(roles: list[str], refused: Check) -> None:
    for name in roles:
        refused(lambda tensors, name=name: tensors.pop(name), f"lacks tensor {name!r}")


def test_a_tensor_of_another_name(roles: list[str], refused: Check) -> None:
    for name in roles[::2]:
        refused(lambda tensors, name=name: tensors.update({name + "s": tensors.pop(name)}), f"lacks tensor {name!r}")


def test_a_tensor_that_nobody_uses(roles: list[str], tensors: Tensors, refused: Check) -> None:
    """A bias beside each tensor, an expert or a layer too many, a rotation, a scale beside what is not quantised."""
    extra = {name.removesuffix("weight") + "bias" for name in roles if name.endswith("weight")} - tensors.keys()
    extra |= {name.replace(".5.", ".8.") for name in (EXPERT,)} | {"model.layers.5.input_layernorm.weight", "rot.weight"}
    extra |= {name + ("_scale_inv", "_scale")[i % 2] for i, name in enumerate(roles)} | {Q_A + "_zero_point"}
    for name in sorted(extra):
        refused(lambda tensors, name=name: tensors.update({name: np.ones((1, 1), np.float32)}), repr(name))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_numbers_in_another_dtype_are_the_same_numbers(right: Check, dtype: Any) -> None:
    right(lambda tensors: tensors.update({n: t.astype(dtype) for n, t in tensors.items()}))


def test_more_tensors_than_one_are_counted(refused: Check) -> None:
    extra = {f"rot.{i}": np.ones(1, np.float32) for i in range(3)}
    refused(lambda tensors: tensors.update(extra), "'rot.0' and 2 more", "makes no use")


@pytest.mark.parametrize("name", [Q_A, EXPERT, EMBED, HEAD, MTP + "eh_proj.weight", "model.layers.0.mlp.down_proj.weight"])
def test_a_number_beyond_float16(exact: Path, tmp_path: Path, refused: Check, reference: Binding, name: str) -> None:
    def enlarge(tensors: Tensors) -> None:
        tensors[name][-1, -1] = -1e5

    refused(enlarge, f"{name!r} holds -100000.0, too large for float16", dtype="float16")
    assert load(variant(exact, tmp_path / "other", enlarge), reference, dtype="bfloat16").dtype == "bfloat16"


# -- FP8 ---------------------------------------------------------------------------------------------------------------


def blocks(values: np.ndarray) -> np.ndarray:
    """The scale of each block of the last two axes: a power of two, so that dequantising is exact."""
    *stacked, high, wide = values.shape
    grid = (-(-high // BLOCK), -(-wide // BLOCK))
    return np.exp2(np.random.default_rng(3).integers(-9, -5, (*stacked, *grid))).astype(np.float32)


def spread(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.repeat(np.repeat(scale, BLOCK, -2), BLOCK, -1)[..., : shape[-2], : shape[-1]]


def quantise(tensors: Tensors, name: str, end: str = "_scale_inv") -> np.ndarray:
    """FP8 numbers and their scale in place of a tensor; the numbers that they stand for."""
    scale = blocks(tensors[name])
    each = spread(scale, tensors[name].shape)
    tensors[name] = (tensors[name] / each).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    tensors[name + end] = scale
    return tensors[name].astype(np.float32) * each


@pytest.mark.parametrize("end", ["_scale_inv", "_scale"])
@pytest.mark.parametrize("fused", [False, True])
def test_fp8_numbers_are_multiplied_by_their_scale(
    exact: Path, tmp_path: Path, reference: Binding, end: str, fused: bool
) -> None:
    def plain(tensors: Tensors) -> None:
        if fused:
            fuse(tensors)
        for name in [n for n in tensors if re.search("_proj$|_proj.weight$", n) and "weights_proj" not in n]:
            tensors[name] = quantise(dict(tensors), name)

    def fp8(tensors: Tensors) -> None:
        if fused:
            fuse(tensors)
        for name in [n for n in tensors if re.search("_proj$|_proj.weight$", n) and "weights_proj" not in n]:
            quantise(tensors, name, end)

    expected = load(variant(exact, tmp_path / "plain", plain), reference)
    assert answers(load(variant(exact, tmp_path / "fp8", fp8, **FP8), reference)) == answers(expected)


@pytest.mark.parametrize("name", [Q_A, EXPERT, MTP + "eh_proj.weight", "model.layers.0.self_attn.kv_b_proj.weight"])
@pytest.mark.parametrize("wrong", [np.nan, 0.0, -0.5, np.inf])
def test_a_scale_that_is_no_scale(refused: Check, name: str, wrong: float) -> None:
    def spoil(tensors: Tensors) -> None:
        quantise(tensors, name)
        tensors[name + "_scale_inv"][-1, -1] = wrong

    refused(spoil, f"'{name}_scale_inv' holds {wrong}", "finite numbers above 0", **FP8)


def siblings(tensors: Tensors, name: str) -> list[str]:
    """The tensors that are quantised alike: those of all experts of a layer."""
    layer, experts, _ = name.partition("experts.")
    return [n for n in tensors if n.startswith(layer + experts) and n.endswith("proj.weight")] if experts else [name]


@pytest.mark.parametrize("name", [Q_A, EXPERT])
def test_fp8_faults(refused: Check, name: str) -> None:
    def nan(tensors: Tensors) -> None:
        for each in siblings(tensors, name):
            quantise(tensors, each)
        tensors[name][3, 5] = np.nan

    def small(tensors: Tensors) -> None:
        quantise(tensors, name)
        tensors[name + "_scale_inv"] = tensors[name + "_scale_inv"][:, :1]

    def twice(tensors: Tensors) -> None:
        quantise(tensors, name)
        tensors[name + "_scale"] = tensors[name + "_scale_inv"]

    refused(nan, f"{name!r} holds NaN", **FP8)
    refused(small, f"'{name}_scale_inv' has shape", "expected", **FP8)
    refused(twice, f"{name!r} has weight_scale_inv and weight_scale beside it, expected one scale", **FP8)


def test_experts_of_a_layer_are_quantised_alike(refused: Check) -> None:
    said = f"{EXPERT!r} is float8_e4m3fn with a scale of float32 for {BLOCK} x {BLOCK}, expected the experts of a layer alike"
    refused(lambda tensors: quantise(tensors, EXPERT), said, "is not quantised", **FP8)


# -- experts, copies, what is skipped ------------------------------------------------------------------------------------


def fuse(tensors: Tensors) -> None:
    """Experts as transformers holds them: [E, 2I, H] and [E, H, I]."""
    for prefix in sorted({n.split("experts.0.")[0] + "experts." for n in tensors if "mlp.experts.0." in n}):
        each = [[tensors.pop(f"{prefix}{e}.{p}_proj.weight") for p in ("gate", "up", "down")] for e in range(8)]
        tensors[prefix + "gate_up_proj"] = np.stack([np.concatenate([gate, up]) for gate, up, _ in each])
        tensors[prefix + "down_proj"] = np.stack([down for _, _, down in each])


def test_fused_experts(right: Check, refused: Check) -> None:
    right(fuse)
    down = "model.layers.2.mlp.experts.down_proj"

    def lose(tensors: Tensors) -> None:
        fuse(tensors)
        del tensors[down]

    def turn(tensors: Tensors) -> None:
        fuse(tensors)
        tensors[down] = tensors[down].swapaxes(1, 2).copy()

    def both(tensors: Tensors) -> None:
        single = tensors[EXPERT]
        fuse(tensors)
        tensors[EXPERT] = single

    refused(lose, f"lacks tensor {down!r}")
    refused(turn, f"{down!r} has shape [8, 48, 96], expected [8, 96, 48]")
    refused(both, repr(EXPERT), "makes no use")


@pytest.mark.parametrize(("copy", "main"), [(MTP + "embed_tokens.weight", EMBED), (MTP + "shared_head.head.weight", HEAD)])
def test_the_mtp_layers_own_embedding_and_head(
    right: Check, refused: Check, caplog: pytest.LogCaptureFixture, copy: str, main: str
) -> None:
    right(lambda tensors: tensors.update({copy: tensors[main]}))
    assert "tensors not used: 1, since they repeat the embedding or the head" in caplog.text
    refused(lambda tensors: tensors.update({copy: tensors[main] * 2}), f"{copy!r} differs from {main!r}")
    refused(lambda tensors: tensors.update({copy: tensors[main][1:]}), f"{copy!r} has shape")


def test_a_head_beside_a_tied_embedding(exact: Path, tmp_path: Path, refused: Check, reference: Binding) -> None:
    refused(lambda tensors: None, f"{HEAD!r} differs from {EMBED!r}", tie_word_embeddings=True)
    tied = variant(exact, tmp_path / "tied", lambda tensors: tensors.pop(HEAD), tie_word_embeddings=True)
    both = variant(exact, tmp_path / "both", lambda t: t.update({HEAD: t[EMBED]}), tie_word_embeddings=True)
    assert answers(load(both, reference)) == answers(load(tied, reference))


def test_what_is_skipped_is_said(exact: Path, tmp_path: Path, reference: Binding, caplog: pytest.LogCaptureFixture) -> None:
    pattern = {"indexer_types": None, "index_topk_pattern": "FSSS", "num_nextn_predict_layers": 0}
    model = load(variant(exact, tmp_path, **pattern), reference)
    said = [record.getMessage().removeprefix(f"{tmp_path}: ") for record in caplog.records]
    mtp = len([n for n in load_file(tmp_path / "model.safetensors") if n.startswith(MTP)])
    assert sorted(said, key=len) == [
        f"tensors not used: {mtp}, since num_nextn_predict_layers is 0",
        "tensors not used: 5, since their layers share the selection of a layer below",
    ]
    assert model.mtp is None


def test_a_checkpoint_without_leftovers_is_loaded_without_a_word(
    exact: Path, reference: Binding, caplog: pytest.LogCaptureFixture
) -> None:
    load(exact, reference)
    assert not caplog.records


@pytest.mark.parametrize(("raw", "count"), [(published.GLM5, 59_870), (published.GLM52, 59_585)], ids=["5", "5.2"])
def test_a_published_model_asks_for_as_many_tensors_as_were_published(raw: dict[str, Any], count: int) -> None:
    class Asked(Blank):
        def __init__(self) -> None:
            self.names: set[str] = set()

        def holds(self, prefix: str) -> bool:
            return not prefix.endswith("experts.gate_up_proj")

        def read(self, name: str, shape: Sequence[int], rows: slice) -> np.ndarray:
            self.names.add(name)
            return super().read(name, shape, rows)

    source = Asked()
    recorded(lambda ops: Glm5(Config.parse(raw), source, ops))
    assert len(source.names) == count


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(exact: Path, tensors: Tensors, tmp_path: Path) -> Path:
    tiny.build(tmp_path, "glm52", shards=2)
    for file in tmp_path.glob("*.safetensors"):
        save_file({name: tensors[name] for name in load_file(file)}, file)
    return tmp_path


def reindexed(shards: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def file_of(shards: Path, name: str) -> tuple[Path, Path]:
    """The file that the index names for a tensor, and the other one."""
    index = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    there = shards / index[name]
    return there, next(file for file in shards.glob("*.safetensors") if file != there)


@pytest.mark.parametrize("name", [Q_A, EXPERT, HEAD, MTP + "enorm.weight"])
def test_faults_of_an_index(shards: Path, reference: Binding, name: str) -> None:
    there, other = file_of(shards, name)
    reindexed(shards, lambda where: where.update({name: "elsewhere.safetensors"}))
    refusal(lambda: load(shards, reference), "elsewhere.safetensors does not exist", repr(name))
    reindexed(shards, lambda where: where.update({name: other.name}))
    refusal(lambda: load(shards, reference), f"{other} does not hold {name!r}")
    reindexed(shards, lambda where: where.pop(name))
    refusal(lambda: load(shards, reference), f"{there} holds {name!r}", "does not name")


@pytest.mark.parametrize("name", [Q_A, EXPERT, HEAD, MTP + "enorm.weight"])
def test_of_a_tensor_in_two_files_the_indexed_one_counts(
    exact: Path, shards: Path, reference: Binding, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    there, other = file_of(shards, name)
    save_file({**load_file(other), name: np.zeros((3, 5), np.float32)}, other)
    assert answers(load(shards, reference)) == answers(load(exact, reference))
    [line] = [record.getMessage() for record in caplog.records]
    assert line == f"{other} holds {name!r} too: used is that of {there.name}, which the index names"


def test_an_index_beside_a_whole_file(exact: Path, shards: Path, reference: Binding) -> None:
    (shards / "model.safetensors").write_bytes((exact / "model.safetensors").read_bytes())
    refusal(lambda: load(shards, reference), "both model.safetensors and model.safetensors.index.json")


@pytest.mark.parametrize("cut", [1, 1000, 100_000])
def test_a_file_cut_short_names_its_last_tensor(exact: Path, tmp_path: Path, reference: Binding, cut: int) -> None:
    file = variant(exact, tmp_path) / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-cut])
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header.pop("__metadata__", None)
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    refusal(lambda: load(tmp_path, reference), f"{file} is truncated: {last!r} ends at byte")


def test_faults_are_found_before_weights_are_read(exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last tensor that a model asks for is missing, and no weight has been prepared."""
    binding, prepared = bind("reference", overrides={}, fallback="error"), []
    monkeypatch.setattr(binding.backend, "prepare", lambda spec, read, into=None: prepared.append(spec))
    broken = variant(exact, tmp_path, lambda tensors: tensors.pop(MTP + "shared_head.norm.weight"))
    refusal(lambda: load(broken, binding), "shared_head.norm.weight")
    assert not prepared


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h, a, b: h[b].update(data_offsets=h[a]["data_offsets"]), "is damaged: .* begins at byte"),
        (lambda h, a, b: h[a].update(data_offsets=[n + 4 for n in h[a]["data_offsets"]]), "begins at byte 4 of its data"),
        (lambda h, a, b: h.pop(list(h)[-1]), "bytes follow its last tensor"),
    ],
)
def test_tensors_lie_one_behind_the_other(tmp_path: Path, change: Any, said: str) -> None:
    """Elsewhere their bytes are another tensor's: safetensors refuses such a file as well."""
    file = tmp_path / "model.safetensors"
    header = {n: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, n in enumerate("abc")}
    change(header, "a", "b")
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + np.arange(6, dtype=np.float32).tobytes())
    with pytest.raises(UsageError, match=said):
        TensorFile(file)


def test_a_name_twice_in_a_header_is_refused(tmp_path: Path) -> None:
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    text = ("{" + entry + ", " + entry + "}").encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(UsageError, match="'a' is there twice"):
        TensorFile(file)


@pytest.mark.parametrize("rows", [slice(0, 3), slice(BLOCK, None), slice(BLOCK - 1, BLOCK + 2), slice(3, 3), slice(None)])
def test_some_rows_of_an_fp8_tensor_are_multiplied_by_their_own_scales(
    exact: Path, tmp_path: Path, tensors: Tensors, rows: slice
) -> None:
    whole: dict[str, np.ndarray] = {}

    def fp8(tensors: Tensors) -> None:
        whole["x"] = quantise(tensors, Q_A)

    source = Checkpoint(variant(exact, tmp_path, fp8, **FP8), (BLOCK, BLOCK))
    assert len(whole["x"]) > BLOCK
    assert np.array_equal(source.read(Q_A, whole["x"].shape, rows).astype(np.float32), whole["x"][rows])
