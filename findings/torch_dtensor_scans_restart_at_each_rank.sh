#!/usr/bin/env bash
# One would guess: an operator on a DTensor gives what it gives on the whole tensor, or refuses; dim=-1 is the last dim.
# What happens: cumsum, cumprod and logcumsumexp with a NEGATIVE dim start anew on each rank when the tensor is sharded
#   along it: the rule that decides what must be gathered compares -1 with the shard's number 1 and finds nothing to do. The
#   result has the right shape and placement, nothing warns. dim=1 is right, and so are softmax, sort, argmax, topk and cummax
#   with -1. Top-p 0.9 on probabilities in four parts, with cumsum(-1) as it is written everywhere, keeps 3850 tokens of 4096
#   instead of 778: each part starts its own sum, so what should be cut stays.
# Version: torch 2.13.0, gloo, 4 processes; the rule is the same on every device.
# Whom it hurts: sampling and speculative verification on probabilities that stay sharded by vocabulary, positions from a
#   cumsum of a mask, offsets of experts from a cumsum of counts, linear attention in log space.
# How to live with it: count the dim from the front, or redistribute to Replicate first; test a port's scans on 2 ranks with
#   both spellings.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq torch==2.13.0 numpy==2.4.6
cat > "$tmp/try.py" <<'PY'
import logging
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

WORLD = 4
OPS = {
    "cumsum": lambda x, dim: x.cumsum(dim),
    "cumprod": lambda x, dim: x.cumprod(dim),
    "logcumsumexp": lambda x, dim: x.logcumsumexp(dim),
    "cummax": lambda x, dim: x.cummax(dim).values,
    "softmax": lambda x, dim: x.softmax(dim),
    "argsort": lambda x, dim: x.argsort(dim),
    "argmax": lambda x, dim: x.argmax(dim),
}
SCANS = ("cumsum", "cumprod", "logcumsumexp")


def kept(p, dim):
    """How many tokens top-p 0.9 keeps of falling probabilities: those before which less than 0.9 has been summed."""
    sums = p.cumsum(dim) - p
    return int(((sums.full_tensor() if hasattr(sums, "full_tensor") else sums) < 0.9).sum())


def work(rank, folder, results):
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(2, 8, generator=draw)
    parts = distribute_tensor(x, mesh, [Shard(1)])
    found = {}
    for name, op in OPS.items():
        for dim in (1, -1):
            got = op(parts, dim).full_tensor()
            found[name, dim] = torch.allclose(got.double(), op(x, dim).double(), atol=1e-6)
    ones = distribute_tensor(torch.ones(1, 8), mesh, [Shard(1)]).cumsum(-1).full_tensor()[0].tolist()
    p = (2 * torch.randn(1, 4096, generator=draw)).softmax(1).sort(1, descending=True).values
    top_p = kept(p, -1), *(kept(distribute_tensor(p, mesh, [Shard(1)]), dim) for dim in (1, -1))
    results.put((found, ones, top_p))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__)
    context = mp.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=work, args=(r, sys.argv[1], results)) for r in range(WORLD)]
    for process in ranks:
        process.start()
    answers = [results.get(timeout=300) for _ in ranks]
    for process in ranks:
        process.join()
    found, ones, top_p = answers[0]
    ok = all(a == answers[0] for a in answers)
    for name in OPS:
        print(f"{name}: dim=1 {'right' if found[name, 1] else 'WRONG'}, dim=-1 {'right' if found[name, -1] else 'WRONG'}")
        ok &= found[name, 1] and found[name, -1] == (name not in SCANS)
    print("cumsum(-1) of eight ones on four ranks:", *(f"{v:.0f}" for v in ones))
    print(f"top-p 0.9 of 4096 tokens keeps {top_p[0]}; sharded, with dim=1 {top_p[1]}, with dim=-1 {top_p[2]}")
    ok &= ones == [1, 2] * 4 and top_p[0] == top_p[1] < top_p[2] / 2
    sys.exit(0 if ok else "CHANGED: scans of a sharded dim are computed otherwise than described")
PY
"$tmp/venv/bin/python" "$tmp/try.py" "$tmp"
# Seen 2026-11-28:
#   torch 2.13.0+cpu
#   cumsum: dim=1 right, dim=-1 WRONG
#   cumprod: dim=1 right, dim=-1 WRONG
#   logcumsumexp: dim=1 right, dim=-1 WRONG
#   cummax: dim=1 right, dim=-1 right
#   softmax: dim=1 right, dim=-1 right
#   argsort: dim=1 right, dim=-1 right
#   argmax: dim=1 right, dim=-1 right
#   cumsum(-1) of eight ones on four ranks: 1 2 1 2 1 2 1 2
#   top-p 0.9 of 4096 tokens keeps 778; sharded, with dim=1 778, with dim=-1 3850
