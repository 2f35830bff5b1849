#!/usr/bin/env bash
# One would guess: npu_moe_init_routing_v2 without active_expert_range counts the rows of all expert_num experts of the
#   call, as its page says: the range is then 0 to expert_num.
# What happens: the range of the first such call in the process is kept in a C++ static variable. A later call with
#   another expert_num gets the old range, without an error: with 3 experts first, a call with 8 counts 3 of them, and
#   what goes to the others is dropped. The package's own shape function says 8, so a compiled graph disagrees with eager.
#   Beside it: npu_sparse_flash_attention returns softmax statistics for a paged cache (the page has them for other
#   layouts only); in the TND layout it takes the block size for the number of key heads: 64 heads become [16, rows, 4].
# Version: torch-npu 2.13.0, its own C++ wrapper up to the kernel call. There is no NPU here and nothing is computed:
#   the CANN libraries are stand-ins that return 0 and hand out host memory, which show what is asked of the chip.
# Whom it hurts: two models with different numbers of experts in one process, or a first call that warms up with fewer.
# How to live with it: always pass active_expert_range; do not ask for return_softmax_lse of a paged cache.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq torch==2.13.0 numpy==2.4.6 pyyaml
"$tmp/venv/bin/pip" install -qq --no-deps --target "$tmp/npu" torch-npu==2.13.0
cd "$tmp"
cat > cann.c << 'C'
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
int aclrtGetDeviceCount(uint32_t *n) { *n = 1; return 0; }
int aclrtGetDevice(int32_t *d) { *d = 0; return 0; }
int aclrtGetCurrentContext(void **c) { *c = (void *)1; return 0; }
int aclrtGetPrimaryCtxState(int32_t d, uint32_t *f, int32_t *active) { *active = 1; return 0; }
int aclrtMalloc(void **p, size_t n, int kind) { return posix_memalign(p, 512, n ? n : 512); }
int aclrtMallocAlign32(void **p, size_t n, int kind) { return posix_memalign(p, 512, n ? n : 512); }
int aclrtMallocHost(void **p, size_t n) { return posix_memalign(p, 64, n ? n : 64); }
int aclrtMemcpy(void *d, size_t m, const void *s, size_t n, int kind) { memcpy(d, s, n); return 0; }
int aclrtMemcpyAsync(void *d, size_t m, const void *s, size_t n, int kind, void *q) { memcpy(d, s, n); return 0; }
int aclrtGetMemInfo(int kind, size_t *f, size_t *t) { *f = *t = (size_t)1 << 33; return 0; }
int aclrtCreateStreamWithConfig(void **s, uint32_t p, uint32_t f) { *s = (void *)16; return 0; }
const char *aclrtGetSocName(void) { return "Ascend910B2"; }
const char *aclGetRecentErrMsg(void) { return ""; }
int aclGetDeviceCapability(uint32_t d, int what, int64_t *v) { *v = 24; return 0; }
int aclrtGetDeviceInfo(uint32_t d, int what, int64_t *v) { *v = 1; return 0; }
size_t aclGetCompileoptSize(int o) { return 8; }
int aclGetCompileopt(int o, char *v, size_t n) { strncpy(v, "disable", n); return 0; }
int aclrtQueryEventStatus(void *e, int *s) { *s = 1; return 0; }
int aclrtGetVersion(int *a, int *b, int *c) { *a = 9; *b = *c = 0; return 0; }
C
# every other name that the package may look up returns 0, or what it creates
grep -ahoE '\b(acl|rt|Msprof)[A-Za-z0-9]{3,}\b' npu/torch_npu/lib/libtorch_npu.so | sort -u > names
grep -oE '\bacl[A-Za-z0-9]+\(' cann.c | tr -d '(' | sort -u > known
comm -23 names known | awk '/^aclCreate/ { print "void *" $1 "(void) { return calloc(1, 256); }"; next }
                            { print "int " $1 "(void) { return 0; }" }' >> cann.c
gcc -shared -fPIC -w -o libascendcl.so -Wl,-soname,libascendcl.so cann.c
for name in hccl acl_op_compiler ge_runner graph acl_tdt_channel opapi; do
  gcc -shared -fPIC -x c /dev/null -o lib$name.so -Wl,-soname,lib$name.so -Wl,--no-as-needed -L. -lascendcl
done
TORCH_DEVICE_BACKEND_AUTOLOAD=0 "$tmp/venv/bin/python" - 2> log << 'PY' || { tail -5 log; exit 1; }
import ctypes
import sys
import warnings

warnings.simplefilter("ignore")
for name in ("ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "opapi"):
    ctypes.CDLL(f"./lib{name}.so", mode=ctypes.RTLD_GLOBAL)
sys.path.insert(0, "npu")
import torch
import torch_npu

print("torch-npu", torch_npu.__version__.split("+")[0])
kwargs = dict(expert_tokens_num_type=1, expert_tokens_num_flag=True)


def counted(experts, device, **more):
    x, ids = torch.zeros(3, 2, device=device), torch.zeros(3, 1, dtype=torch.int32, device=device)
    return len(torch_npu.npu_moe_init_routing_v2(x, ids, expert_num=experts, **kwargs, **more)[2])


found = []
for experts in (3, 8, 5):
    found.append((counted(experts, "npu"), counted(experts, "npu", active_expert_range=[0, experts]), counted(experts, "meta")))
    print(f"{experts} experts: counts of {found[-1][0]}; with a range {found[-1][1]}; by the shape function {found[-1][2]}")


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="npu")


key, lengths = empty(9, 16, 1, 512), torch.tensor([5], dtype=torch.int32).npu()
_, largest, _ = torch_npu.npu_sparse_flash_attention(
    empty(5, 64, 512), key, key, empty(5, 1, 8, dtype=torch.int32), 0.1, block_table=empty(1, 9, dtype=torch.int32),
    actual_seq_lengths_query=lengths, actual_seq_lengths_kv=lengths, query_rope=empty(5, 64, 64), key_rope=empty(9, 16, 1, 64),
    layout_query="TND", layout_kv="PA_BSND", attention_mode=2, return_softmax_lse=True)
print("statistics of 5 rows and 64 heads, blocks of 16:", list(largest.shape))
same = found == [(3, 3, 3), (3, 8, 8), (3, 5, 5)] and list(largest.shape) == [16, 5, 4]
print("as described" if same else "CHANGED")
sys.stdout.flush()
__import__("os")._exit(0 if same else 1)  # the stand-ins cannot end a device
PY
# Seen 2026-11-28:
#   torch-npu 2.13.0
#   3 experts: counts of 3; with a range 3; by the shape function 3
#   8 experts: counts of 3; with a range 8; by the shape function 8
#   5 experts: counts of 3; with a range 5; by the shape function 5
#   statistics of 5 rows and 64 heads, blocks of 16: [16, 5, 4]
#   as described
