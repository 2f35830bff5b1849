#!/usr/bin/env bash
# One would guess: all_reduce of equal rows gives equal rows, since every element has the same four addends.
# What happens: gloo sums around a ring, and each quarter of the flat buffer starts at another rank, so the order of
#   the additions depends on the POSITION of the element; and it rounds after every addition, in bf16 too.
#   256 + 1 + 1 + 1 is 260 in the outer quarters and 256 in the middle ones; in float32 2^24 shows the same. With
#   random bf16 only two thirds of the elements equal the rounded float32 sum. MAX keeps a NaN only in the quarter of
#   the rank that has it. All ranks agree bit by bit and runs repeat, so no comparison between ranks or runs finds it.
# Version: torch 2.13.0, gloo, 4 processes.
# Whom it hurts: tensor parallelism: the same token at another row of the batch gets other logits (batch invariance is
#   lost in the collective, not in a kernel); bit-by-bit comparison with one rank; a NaN check by all_reduce(MAX).
# How to live with it: where rows must agree gather first and sum in one fixed order in float32; send NaN as a flag of
#   its own; give all_reduce a tolerance of world - 1 roundings of the LARGEST partial sum.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq torch==2.13.0 numpy==2.4.6
cat > "$tmp/try.py" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 4


def work(rank, folder, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    sums = []
    for dtype, large in ((torch.bfloat16, 2**8), (torch.float16, 2**11), (torch.float32, 2**24)):
        rows = torch.full((8, 64), float(large if rank == 0 else 1), dtype=dtype)  # eight equal tokens
        dist.all_reduce(rows)
        sums.append((str(dtype), large, rows[:, 0].tolist(), bool((rows == rows[:, :1]).all())))
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(rank)).bfloat16()
    exact = x.float()
    dist.all_reduce(x)
    dist.all_reduce(exact)
    nan = torch.full((8,), float("nan") if rank == 1 else 0.0)
    dist.all_reduce(nan, op=dist.ReduceOp.MAX)
    results.put((sums, (x == exact.bfloat16()).double().mean().item(), nan.tolist()))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__)
    context = mp.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=work, args=(r, sys.argv[1], results)) for r in range(WORLD)]
    for process in ranks:
        process.start()
    answers = [results.get(timeout=120) for _ in ranks]
    for process in ranks:
        process.join()
    sums, share, nan = answers[0]
    ok = all(str(a) == str(answers[0]) for a in answers)
    for dtype, large, rows, _ in sums:
        print(f"{dtype}: {large} + 1 + 1 + 1 in eight equal rows:", *(f"{v:.0f}" for v in rows))
        ok &= len(set(rows)) == 2
    print(f"random bf16: {share:.1%} equal the rounded float32 sum")
    print("MAX of eight elements, all NaN on rank 1:", *nan)
    ok &= 0.5 < share < 0.9 and 0 < sum(v != v for v in nan) < 8
    sys.exit(0 if ok else "CHANGED: gloo sums otherwise than described")
PY
"$tmp/venv/bin/python" "$tmp/try.py" "$tmp"
# Seen 2026-11-27:
#   torch 2.13.0+cpu
#   torch.bfloat16: 256 + 1 + 1 + 1 in eight equal rows: 260 260 256 256 256 256 260 260
#   torch.float16: 2048 + 1 + 1 + 1 in eight equal rows: 2052 2052 2048 2048 2048 2048 2052 2052
#   torch.float32: 16777216 + 1 + 1 + 1 in eight equal rows: 16777220 16777220 16777216 16777216 16777216 16777216 16777220 16777220
#   random bf16: 67.7% equal the rounded float32 sum
#   MAX of eight elements, all NaN on rank 1: 0.0 0.0 nan nan 0.0 0.0 0.0 0.0
