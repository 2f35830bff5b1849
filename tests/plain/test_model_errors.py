"""Every misuse of the model gives one sentence that names the thing, its value and what was expected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from porthal import Binding, UsageError
from porthal.model import Config, Glm5, load
from porthal.model.config import KEYS, QUANTIZATION, ROPE
from porthal.model.generate import generate
from tests.checkpoints import Tensors, variant
from tests.oracles import published, tiny
from tests.oracles.tiny import PROMPT

Q_A = "model.layers.1.self_attn.q_a_proj.weight"


def refusal(call: Callable[[], object], *parts: str) -> None:
    """The call raises UsageError itself (no other error behind it), in one sentence that holds all parts."""
    with pytest.raises(UsageError) as caught:
        call()
    text = str(caught.value)
    assert [part for part in parts if part not in text] == [], text
    assert "\n" not in text
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


# -- directory and config.json ---------------------------------------------------------------------------------------


def test_missing_directory(tmp_path: Path) -> None:
    refusal(lambda: load(tmp_path / "nowhere"), "nowhere/config.json does not exist", "expected a model directory")


def test_missing_config(tmp_path: Path) -> None:
    refusal(lambda: load(tmp_path), f"{tmp_path}/config.json does not exist", "expected a model directory")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"model_type": ', ("is not valid JSON", "line 1 column 16")),
        ("", ("is not valid JSON",)),
        ("[1, 2]", ("is a list", "expected a JSON object")),
    ],
)
def test_config_that_is_no_json_object(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    (tmp_path / "config.json").write_text(text)
    refusal(lambda: load(tmp_path), str(tmp_path / "config.json"), *parts)


def test_config_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    refusal(lambda: load(tmp_path), str(tmp_path / "config.json"), "is not valid JSON")


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"model_type": "llama"}, ("model_type 'llama'", "'glm_moe_dsa'")),
        ({"model_type": None}, ("model_type None", "'glm_moe_dsa'")),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, ("rope_type = 'yarn'", "'default' only")),
        ({"scoring_func": "softmax"}, ("scoring_func = 'softmax'", "'sigmoid' only")),
        ({"hidden_act": "gelu"}, ("hidden_act = 'gelu'", "'silu' only")),
        ({"attention_bias": True}, ("attention_bias = True", "False only")),
        ({"indexer_rope_interleave": False}, ("indexer_rope_interleave = False", "True only")),
        ({"norm_topk_prob": False}, ("norm_topk_prob = False", "True only")),
        ({"quantization_config": {"quant_method": "awq"}}, ("quantization_config.quant_method = 'awq'", "one of fp8,")),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}}, ("[0, 128]", "two")),
        ({"hidden_size": "96"}, ("hidden_size = '96'", "expected a whole number")),
        ({"hidden_size": None}, ("hidden_size = None", "expected a whole number")),
        ({"index_topk": -1}, ("index_topk = -1", "expected a whole number")),
        ({"index_topk": 0}, ("index_topk = 0", "at least 1")),
        ({"num_hidden_layers": 0}, ("num_hidden_layers = 0", "at least 1")),
        ({"num_experts_per_tok": 9}, ("num_experts_per_tok = 9", "at most 8, n_routed_experts")),
        ({"rms_norm_eps": "small"}, ("rms_norm_eps = 'small'", "expected a number from 1e-12 to 1")),
        ({"latent_norm_eps": 0}, ("latent_norm_eps = 0", "expected a number from 1e-12 to 1")),
        ({"rope_parameters": {"rope_theta": None}}, ("rope_theta = None", "expected a number from 10 to 1e+08")),
        ({"indexer_types": ["full"]}, ("indexer_types = ['full']", "4 layers")),
        ({"indexer_types": ["shared", "full", "full", "full"]}, ("indexer_types = ['shared',", "the first full")),
        ({"indexer_types": ["full", "half", "full", "full"]}, ("'half'", "'full' or 'shared'")),
        ({"indexer_types": "full"}, ("indexer_types = 'full'", "'full' or 'shared'")),
        ({"mlp_layer_types": ["dense"]}, ("mlp_layer_types = ['dense']", "4 layers")),
        ({"mlp_layer_types": ["dense", "sparse", "moe", "sparse"]}, ("'moe'", "'dense' or 'sparse'")),
    ],
)
def test_config_that_is_not_supported(changed: dict[str, Any], parts: tuple[str, ...]) -> None:
    refusal(lambda: Config.parse({**tiny.CONFIG, **changed}, "config.json"), "config.json has", *parts)


@pytest.mark.parametrize("key", ["vocab_size", "q_lora_rank", "n_routed_experts", "max_position_embeddings"])
def test_config_without_a_key(key: str) -> None:
    raw = {name: value for name, value in tiny.CONFIG.items() if name != key}
    refusal(lambda: Config.parse(raw, "config.json"), f"config.json has no {key}", "expected a whole number")


def test_config_that_does_not_say_which_layers_are_dense() -> None:
    raw = {name: value for name, value in tiny.CONFIG.items() if name != "first_k_dense_replace"}
    refusal(lambda: Config.parse(raw, "config.json"), "neither first_k_dense_replace nor mlp_layer_types")
    refusal(lambda: Config.parse({**raw, "mlp_layer_types": None}, "config.json"), "neither first_k_dense_replace")


@pytest.mark.parametrize("base", [published.GLM5, published.GLM52])
@pytest.mark.parametrize("quantization", [None, published.FP8])
def test_published_configs(base: dict[str, Any], quantization: Any, caplog: pytest.LogCaptureFixture) -> None:
    config = Config.parse({**base, "quantization_config": quantization})
    full = [i for i, kind in enumerate(config.indexer_types) if kind == "full"]
    assert full == (sorted(published.FULL) if base is published.GLM52 else list(range(78)))
    assert [i for i, dense in enumerate(config.dense) if dense] == [0, 1, 2]
    assert config.rope_theta == (8e6 if base is published.GLM52 else 1e6)
    assert config.fp8_block == (quantization and (128, 128))
    assert not caplog.records  # no key is unknown


def test_unknown_keys_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    raw = {**tiny.CONFIG, "swiglu_limit": 10.0, "sliding_window": None, "quantization_config": {**published.FP8, "bits": 8}}
    for _ in range(2):
        assert Config.parse(raw, "here") == Config.parse({**tiny.CONFIG, "quantization_config": published.FP8})
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("here has swiglu_limit, quantization_config.bits, unknown to porthal and not used")


WORDS = st.text(max_size=4) | st.sampled_from([*ROPE, *QUANTIZATION["fp8"]])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner),
)


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from([*KEYS]), value=JSON)
def test_any_value_gives_a_config_or_a_sentence_that_names_its_key(key: str, value: Any) -> None:
    try:
        Config.parse({**tiny.CONFIG, **tiny.GLM52, key: value}, "config.json")
    except UsageError as error:
        assert (key in str(error) or key == "num_hidden_layers") and "\n" not in str(error)


# -- tensors ---------------------------------------------------------------------------------------------------------


def changed_tensors(
    checkpoints: dict[str, Path], target: Path, reference: Binding, change: Callable[[Tensors], object], **config: Any
) -> Callable[[], Glm5]:
    directory = variant(checkpoints["glm5"], target, change, **config)
    return lambda: load(directory, reference)


def test_missing_tensor(checkpoints: dict[str, Path], reference: Binding, tmp_path: Path) -> None:
    broken = changed_tensors(checkpoints, tmp_path, reference, lambda tensors: tensors.pop(Q_A))
    refusal(broken, str(tmp_path), f"lacks tensor '{Q_A}'", "[56, 96]")


def test_missing_expert(checkpoints: dict[str, Path], reference: Binding, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    broken = changed_tensors(checkpoints, tmp_path, reference, lambda tensors: tensors.pop(name))
    refusal(broken, f"lacks tensor '{name}'", "[48, 96]")


@pytest.mark.parametrize("shape", [(96, 56), (56, 97), (56 * 96,)])
def test_wrong_shape(checkpoints: dict[str, Path], reference: Binding, tmp_path: Path, shape: tuple[int, ...]) -> None:
    wrong = np.zeros(shape, np.float32)
    broken = changed_tensors(checkpoints, tmp_path, reference, lambda tensors: tensors.update({Q_A: wrong}))
    refusal(broken, f"'{Q_A}' has shape {list(shape)}", "expected [56, 96] by config.json")


def test_wrong_kind_of_numbers(checkpoints: dict[str, Path], reference: Binding, tmp_path: Path) -> None:
    wrong = np.zeros((56, 96), np.int32)
    broken = changed_tensors(checkpoints, tmp_path, reference, lambda tensors: tensors.update({Q_A: wrong}))
    refusal(broken, f"'{Q_A}' is int32 [56, 96], which holds the codes of a matrix [56, 96] in no known way")


def test_fp8_scale_of_wrong_shape(checkpoints: dict[str, Path], reference: Binding, tmp_path: Path) -> None:
    fp8 = {Q_A: np.zeros((56, 96), ml_dtypes.float8_e4m3fn), Q_A + "_scale_inv": np.ones((56, 96), np.float32)}
    broken = changed_tensors(checkpoints, tmp_path, reference, lambda tensors: tensors.update(fp8))
    refusal(broken, f"'{Q_A}_scale_inv' has shape [56, 96]", "expected [1, 1]")


def test_no_tensors(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    variant(checkpoints["glm5"], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refusal(lambda: load(tmp_path), f"{tmp_path} has neither model.safetensors nor model.safetensors.index.json")


# Within the length, within the header, within the tensors, and one byte short.
@pytest.mark.parametrize("keep", [0, 4, 8, 3000, 100_000, -1])
def test_truncated_file(checkpoints: dict[str, Path], tmp_path: Path, keep: int) -> None:
    variant(checkpoints["glm5"], tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refusal(lambda: load(tmp_path), str(file), "truncated")


@pytest.mark.parametrize(
    "content", [b"PK" + bytes(100), b"\xff" * 64, b"\x02" + bytes(7) + b"[]", b"\x07" + bytes(7) + b'{"a":1}']
)
def test_file_of_another_kind(checkpoints: dict[str, Path], tmp_path: Path, content: bytes) -> None:
    variant(checkpoints["glm5"], tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    refusal(lambda: load(tmp_path), str(tmp_path / "model.safetensors"), "is not a safetensors file")


@pytest.mark.parametrize(
    "changed", [{"shape": [56, 95]}, {"data_offsets": [0, 6]}, {"data_offsets": None}, {"dtype": 3}]
)
def test_header_that_contradicts_itself(checkpoints: dict[str, Path], tmp_path: Path, changed: dict[str, Any]) -> None:
    variant(checkpoints["glm5"], tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header[Q_A] |= changed
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])
    refusal(lambda: load(tmp_path), str(file))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return tiny.build(tmp_path, "glm5", shards=2)


def test_missing_shard(shards: Path) -> None:
    (shards / "model-00002-of-00002.safetensors").unlink()
    refusal(lambda: load(shards), "model-00002-of-00002.safetensors does not exist", f"the index of {shards} names it")


def test_index_that_names_a_missing_file(shards: Path) -> None:
    place_head(shards, "elsewhere.safetensors")
    refusal(lambda: load(shards), "elsewhere.safetensors does not exist", f"the index of {shards} names it")


def test_index_that_names_the_wrong_file(shards: Path) -> None:
    wrong = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} - {place_head(shards, "")}
    place_head(shards, wrong.pop())
    refusal(lambda: load(shards), "does not hold 'lm_head.weight'", f"the index of {shards} says so")


def place_head(shards: Path, file: str) -> str:
    """Let the index name `file` for lm_head.weight; the file it named before."""
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    before = index["weight_map"]["lm_head.weight"]
    index["weight_map"]["lm_head.weight"] = file
    path.write_text(json.dumps(index))
    return str(before)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"lm_head.weight": 3}}'])
def test_index_that_is_no_index(shards: Path, text: str) -> None:
    (shards / "model.safetensors.index.json").write_text(text)
    refusal(lambda: load(shards), str(shards / "model.safetensors.index.json"), "is not a safetensors index")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float64", "int8", "bf16", ""])
def test_unknown_dtype(directory: Path, dtype: str) -> None:
    refusal(lambda: load(directory, dtype=dtype), f"dtype is {dtype!r}", "float32, bfloat16, float16")


# -- tokens and numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "parts"),
    [
        ([], ("the prompt is empty", "at least one token")),
        ([5, 160], ("token 1 is 160", "from 0 to 159")),
        ([5, 7, -1], ("token 2 is -1", "from 0 to 159")),
        ([2.5], ("token 0 is 2.5", "a whole number from 0 to 159")),
        ([1, "a"], ("token 1 is 'a'", "a whole number from 0 to 159")),
        ([None], ("token 0 is None", "a whole number from 0 to 159")),
        ("text", ("token 0 is 't'", "a whole number")),
        (7, ("the prompt is 7", "a sequence of token ids")),
        ([1] * 513, ("the prompt has 513 tokens", "expected at most 512, the context")),
    ],
)
def test_bad_prompt(models: dict[str, Glm5], tokens: Any, parts: tuple[str, ...]) -> None:
    model = models["glm5"]
    refusal(lambda: model.forward(tokens), *parts)
    refusal(lambda: model.generate(tokens, 4), *parts)


def test_integers_of_numpy_are_integers(models: dict[str, Glm5]) -> None:
    model = models["glm5"]
    assert model.generate(np.asarray(PROMPT), np.int64(3), speculative=np.int32(1)) == model.generate(PROMPT, 3)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_new_tokens", -1, "a whole number of at least 0"),
        ("max_new_tokens", 2.5, "a whole number of at least 0"),
        ("max_new_tokens", None, "a whole number of at least 0"),
        ("speculative", -2, "a whole number of at least 0"),
        ("speculative", 1.0, "a whole number of at least 0"),
        ("seed", -1, "a whole number of at least 0"),
        ("seed", "x", "a whole number of at least 0"),
        ("temperature", -0.5, "a number from 0 to 10000"),
        ("temperature", float("nan"), "a number from 0 to 10000"),
        ("temperature", float("inf"), "a number from 0 to 10000"),
        ("temperature", "hot", "a number from 0 to 10000"),
        ("prefill_chunk", 0, "a whole number of at least 1"),
        ("prefill_chunk", -8, "a whole number of at least 1"),
        ("prefill_chunk", 1.5, "a whole number of at least 1"),
    ],
)
def test_bad_number(models: dict[str, Glm5], name: str, value: Any, expected: str) -> None:
    arguments = {"max_new_tokens": 4, name: value}
    refusal(lambda: generate(models["glm5"], [PROMPT], **arguments), f"{name} is {value!r}", f"expected {expected}")


@pytest.mark.parametrize("chunk", [0, -1, 1.5, "x"])
def test_bad_chunk(models: dict[str, Glm5], chunk: Any) -> None:
    refusal(lambda: models["glm5"].forward(PROMPT, chunk=chunk), f"chunk is {chunk!r}", "a whole number of at least 1")


def test_no_prompt(models: dict[str, Glm5]) -> None:
    refusal(lambda: generate(models["glm5"], [], 4), "no prompt", "at least one")


def test_one_prompt_given_for_a_list_of_prompts(models: dict[str, Glm5]) -> None:
    refusal(lambda: generate(models["glm5"], PROMPT, 4), f"the prompt is {PROMPT[0]}", "a sequence of token ids")


@pytest.mark.parametrize("how", ["config", "tensors"])
def test_speculation_without_mtp(checkpoints: dict[str, Path], reference: Binding, tmp_path: Path, how: str) -> None:
    def drop(tensors: Tensors) -> None:
        if how == "tensors":
            for name in [n for n in tensors if n.startswith("model.layers.4.")]:
                del tensors[name]

    config = {"num_nextn_predict_layers": 0} if how == "config" else {}
    model = changed_tensors(checkpoints, tmp_path, reference, drop, **config)()
    refusal(lambda: model.generate(PROMPT, 4, speculative=2), "speculative is 2", "no MTP layer", "use 0")
    assert len(model.generate(PROMPT, 4)) == 4


def test_full_cache(models: dict[str, Glm5]) -> None:
    cache = models["glm5"].new_cache([64])
    request = cache.new_request()
    cache.step([request], [64])
    refusal(lambda: cache.step([request], [1]), "the cache is full", "65 tokens", "another page of 64")
