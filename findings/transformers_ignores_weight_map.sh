#!/usr/bin/env bash
# One would guess: model.safetensors.index.json says in which shard a tensor is read; a second copy elsewhere is unused.
# What happens: transformers reads every shard that the index names anywhere, whole; weight_map only makes the list of
#   files. If two shards hold the same name, the LAST file wins, whichever the index gives. No warning; missing_keys and
#   unexpected_keys stay empty. safe_open by the index, as other loaders do it, gives the other value.
# Version: transformers 5.24.0, safetensors 0.8.0, torch 2.13.0.
# Whom it hurts: folders into which one shard was written again (a layer that was quantised, merged or repaired, with
#   the index pointed at it): transformers keeps the stale layer, a port by the index takes the new one, and the port
#   looks wrong.
# How to live with it: at load list the names of all shards (headers only), follow the index, and say which copy is left.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq torch==2.13.0 numpy==2.4.6 transformers==5.24.0 safetensors==0.8.0
HF_HUB_OFFLINE=1 "$tmp/venv/bin/python" - "$tmp/model" 2> "$tmp/log" <<'PY' || { tail -5 "$tmp/log"; exit 1; }
import json
import sys
from pathlib import Path

import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

print("transformers", transformers.__version__, "safetensors", safetensors.__version__)
folder, name = Path(sys.argv[1]), "model.layers.0.mlp.down_proj.weight"
shape = dict(
    hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, n_routed_experts=2, num_experts_per_tok=1, n_shared_experts=1, first_k_dense_replace=1,
    kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, vocab_size=32,
    index_n_heads=2, index_head_dim=16, index_topk=4, n_group=1, topk_group=1,
)  # fmt: skip
GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**shape)).save_pretrained(folder)
(whole,) = folder.glob("*.safetensors")
tensors = load_file(whole)
whole.unlink()
files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
last = {"model.norm.weight": tensors.pop("model.norm.weight"), name: torch.full_like(tensors[name], 2.0)}
tensors[name] = torch.full_like(tensors[name], 1.0)
for file, part in zip(files, (tensors, last)):
    save_file(part, folder / file, metadata={"format": "pt"})
ok = True
for shard in (1, 2):
    owners = {k: files[0] for k in tensors} | {k: files[1] for k in last} | {name: files[shard - 1]}
    index = {"metadata": {"total_size": 1}, "weight_map": owners}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model, report = GlmMoeDsaForCausalLM.from_pretrained(folder, output_loading_info=True)
    got = model.model.layers[0].mlp.down_proj.weight[0, 0].item()
    with safetensors.safe_open(folder / owners[name], "pt") as file:
        by_index = file.get_tensor(name)[0, 0].item()
    complaints = sum(len(v) for v in report.values())
    print(f"the index names shard {shard}: by the index {by_index}, transformers {got}, complaints {complaints}")
    ok &= by_index == shard and got == 2 and complaints == 0
sys.exit(0 if ok else "CHANGED: weight_map is followed, or a copy is reported")
PY
# Seen 2026-11-27:
#   transformers 5.24.0 safetensors 0.8.0
#   the index names shard 1: by the index 1.0, transformers 2.0, complaints 0
#   the index names shard 2: by the index 2.0, transformers 2.0, complaints 0
