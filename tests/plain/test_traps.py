"""Ten details of GLM-5 that, taken wrong, give a model that runs and is silently wrong.

The model's logits equal those of an independent float64 transcript of the formulas, and differ from the transcript with
one mistake switched on.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from porthal import Binding
from porthal.model import Config, Glm5, load
from porthal.model.load import opened
from tests.checkpoints import Tensors, variant
from tests.oracles.tiny import CONFIG, GLM52, PROMPT
from tests.oracles.transcript import forward

# Logits have a standard deviation near 1; float32 against float64 was measured at 6e-6 or less.
TOLERANCE = 2e-5
VISIBLE = 10 * TOLERANCE


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


@pytest.fixture(scope="module")
def logits(models: dict[str, Glm5]) -> dict[str, np.ndarray]:
    return {kind: model.forward(PROMPT) for kind, model in models.items()}


def test_logits_equal_the_transcript(directory: Path, logits: dict[str, np.ndarray]) -> None:
    assert distance(logits[directory.name], forward(directory, PROMPT)) < TOLERANCE


@pytest.mark.parametrize(
    ("trap", "mistake"),
    [
        (1, "mla_half_rope"),
        (1, "indexer_half_rope"),
        (2, "mla_rope_first"),
        (2, "indexer_rope_last"),
        (3, "head_dim_frequencies"),
        (3, "default_theta"),
        (4, "latent_eps"),
        (5, "k_norm_rms"),
        (6, "yarn_mscale"),
        (7, "bias_in_weights"),
        (7, "router_bf16"),
    ],
)
def test_mistake_is_visible(directory: Path, logits: dict[str, np.ndarray], trap: int, mistake: str) -> None:
    assert distance(logits[directory.name], forward(directory, PROMPT, {mistake})) > VISIBLE


# -- 3: frequencies --------------------------------------------------------------------------------------------------


def test_head_dim_is_ignored(
    directory: Path, logits: dict[str, np.ndarray], reference: Binding, tmp_path: Path
) -> None:
    for head_dim in (8, 192):
        changed = variant(directory, tmp_path / str(head_dim), head_dim=head_dim)
        assert np.array_equal(load(changed, reference).forward(PROMPT), logits[directory.name])


def test_theta_is_in_rope_parameters_and_10000_without(directory: Path, reference: Binding, tmp_path: Path) -> None:
    theta = {"glm5": 1e6, "glm52": 8e6}[directory.name]
    assert Config.read(directory).rope_theta == theta
    without = variant(directory, tmp_path, without=("rope_parameters",))
    assert Config.read(without).rope_theta == 10000
    wrong = forward(directory, PROMPT, {"default_theta"})
    assert distance(load(without, reference).forward(PROMPT), wrong) < TOLERANCE


# -- 4: eps of the latent norms --------------------------------------------------------------------------------------


def test_latent_norm_eps_is_rms_norm_eps_unless_given(directory: Path, reference: Binding, tmp_path: Path) -> None:
    assert Config.read(directory).latent_norm_eps == 1e-6
    without = variant(directory, tmp_path, without=("latent_norm_eps",))
    assert Config.read(without).latent_norm_eps == Config.read(without).rms_norm_eps == 1e-5
    assert distance(load(without, reference).forward(PROMPT), forward(directory, PROMPT, {"latent_eps"})) < TOLERANCE


# -- 8: exact ties ---------------------------------------------------------------------------------------------------


def test_ties_take_the_lowest_position(directory: Path, reference: Binding, tmp_path: Path) -> None:
    def all_scores_equal(tensors: Tensors) -> None:
        tensors.update({n: np.zeros_like(t) for n, t in tensors.items() if n.endswith("weights_proj.weight")})

    tied = variant(directory, tmp_path, all_scores_equal)
    model = load(tied, reference)
    right, wrong = forward(tied, PROMPT), forward(tied, PROMPT, {"ties_highest"})
    for chunk in (None, 40, 1):
        logits = model.forward(PROMPT, chunk=chunk)
        assert distance(logits, right) < TOLERANCE
        assert distance(logits, wrong) > VISIBLE


# -- 9: layers that share a selection --------------------------------------------------------------------------------


def test_shared_layers_read_no_indexer(
    checkpoints: dict[str, Path], logits: dict[str, np.ndarray], reference: Binding, tmp_path: Path
) -> None:
    names = [f"model.layers.2.self_attn.indexer.{n}" for n in ("wq_b.weight", "wk.weight", "weights_proj.weight")]

    def add_garbage(tensors: Tensors) -> None:
        assert not tensors.keys() & set(names)  # absent, as in the released checkpoints
        tensors.update({n: np.full_like(tensors[n.replace(".2.", ".0.")], np.nan) for n in names})

    garbage = load(variant(checkpoints["glm52"], tmp_path, add_garbage), reference)
    assert [block.attention.indexer is not None for block in garbage.blocks] == [True, True, False, False]
    assert np.array_equal(garbage.forward(PROMPT), logits["glm52"])


def test_indexer_on_shared_layers_is_visible(checkpoints: dict[str, Path], logits: dict[str, np.ndarray]) -> None:
    wrong = np.abs(logits["glm52"] - forward(checkpoints["glm52"], PROMPT, {"indexer_on_shared"})).max(1)
    topk = CONFIG["index_topk"]
    assert (
        wrong[:topk].max() < TOLERANCE < VISIBLE < wrong[topk:].max()
    )  # silent until more than index_topk are visible


def test_indexer_types_win_over_the_rule(
    checkpoints: dict[str, Path], logits: dict[str, np.ndarray], reference: Binding, tmp_path: Path
) -> None:
    contradicted = variant(checkpoints["glm52"], tmp_path, index_topk_freq=1, index_skip_topk_offset=0)
    assert Config.read(contradicted).indexer_types == ("full", "full", "shared", "shared")
    assert np.array_equal(load(contradicted, reference).forward(PROMPT), logits["glm52"])


def test_rule_where_indexer_types_are_absent() -> None:
    published = {**CONFIG, **GLM52, "num_hidden_layers": 78, "index_topk_freq": 4, "index_skip_topk_offset": 3}
    del published["indexer_types"], published["mlp_layer_types"], published["layer_types"]
    types = Config.parse(published).indexer_types
    assert [i for i, kind in enumerate(types) if kind == "full"] == [0, 1, 2, *range(6, 78, 4)]
    assert set(Config.parse({**CONFIG, "num_hidden_layers": 78}).indexer_types) == {"full"}


# -- 10: FP8 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(128, 128), (48, 40)])  # both leave partial blocks at the end of rows or columns
def test_fp8_is_decided_by_the_presence_of_a_scale(
    checkpoints: dict[str, Path], reference: Binding, tmp_path: Path, block: tuple[int, int]
) -> None:
    high, wide = block
    kept = (
        "norm.weight",
        "embed_tokens.weight",
        "lm_head.weight",
        "weights_proj.weight",
        "gate.weight",
        "eh_proj.weight",
    )
    plain: Tensors = {}

    def quantise(tensors: Tensors) -> None:
        rng = np.random.default_rng(0)
        for name, values in list(tensors.items()):
            if name.endswith(kept) or values.ndim == 1:
                continue
            rows, columns = values.shape
            scale = rng.uniform(0.001, 0.01, (-(-rows // high), -(-columns // wide))).astype(np.float32)
            each = np.kron(scale, np.ones(block))[:rows, :columns]
            tensors[name] = (values / each).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scale
            plain[name] = (tensors[name].astype(np.float64) * each).astype(np.float32)

    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
        "modules_to_not_convert": ["model.layers.0.self_attn.indexers_proj"],  # as released: no such module exists
    }
    source = checkpoints["glm52"]
    fp8 = variant(source, tmp_path / "fp8", quantise, quantization_config=quantization)
    dequantised = variant(source, tmp_path / "plain", lambda tensors: tensors.update(plain))
    # A scale that is a no-op would prove nothing.
    assert distance(forward(dequantised, PROMPT), forward(source, PROMPT)) > VISIBLE
    numbers = Glm5(*opened(fp8), reference)  # where kernels take codes, `load` keeps blocks of 128 x 128 as such
    assert np.array_equal(numbers.forward(PROMPT), load(dequantised, reference).forward(PROMPT))
    assert numbers.generate(PROMPT, 4, speculative=2) == load(dequantised, reference).generate(PROMPT, 4)
