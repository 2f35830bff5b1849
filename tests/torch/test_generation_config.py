"""generation_config.json against transformers: what ends a text, and what is drawn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from porthal import bind
from porthal.model import Config, load
from tests.checkpoints import variant
from tests.oracles import tiny
from tests.oracles.tiny import PROMPT


@pytest.mark.parametrize(
    "generation",
    [
        {"eos_token_id": [95], "do_sample": True, "temperature": 1.0, "top_p": 0.95},
        {"eos_token_id": 95, "temperature": 0.5, "top_k": 20},
        {"eos_token_id": [95, 7], "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.8},
        {"do_sample": False},
        {},
    ],
)
def test_keys_mean_what_they_mean_to_transformers(tmp_path: Path, generation: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIG))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    theirs, ours = transformers.GenerationConfig.from_pretrained(tmp_path), Config.read(tmp_path)
    eos = theirs.eos_token_id
    assert ours.eos_token_id == tuple(eos if isinstance(eos, list) else [] if eos is None else [eos])
    heat = 1.0 if theirs.temperature is None else theirs.temperature
    assert ours.sampling.temperature == (heat if theirs.do_sample else 0.0)
    assert (ours.sampling.top_p, ours.sampling.top_k) == (theirs.top_p or 1.0, theirs.top_k or 0)


@pytest.mark.parametrize("config_eos", [None, 0, [154, 155]])
def test_a_text_ends_where_transformers_ends_it(tmp_path: Path, config_eos: Any) -> None:
    built = tiny.build(tmp_path / "built", "glm5")
    free = load(built, bind("reference")).generate(PROMPT, 6)
    assert free[3] not in free[:3]
    directory = variant(built, tmp_path / "changed", eos_token_id=config_eos)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[3]]}))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([PROMPT])
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6)[0, len(PROMPT) :].tolist()
    for drafts in (0, 2):
        assert load(directory, bind("torch")).generate(PROMPT, 6, speculative=drafts) == theirs == free[:4]
