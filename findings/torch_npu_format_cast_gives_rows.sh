#!/usr/bin/env bash
# One would guess: npu_format_cast(x, 29) gives x in the tiled format FRACTAL_NZ, or says that it cannot.
# What happens: it gives rows (ND), with a warning that names no argument, unless torch.npu.config.allow_internal_format was set
#   before: it is off by default. The op's page does not name it; the example of npu_mla_prolog_v3, which takes tiles, sets it.
# Version: torch-npu 2.13.0, its own C++ wrapper. There is no NPU here and nothing is computed: the CANN libraries are stand-ins
#   that return 0 and hand out host memory.
# Whom it hurts: matrices that a fused kernel reads as tiles lie in rows. Warnings of torch_npu are many at start.
# How to live with it: set torch.npu.config.allow_internal_format = True, and ask torch_npu.get_npu_format for what came.
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
x = torch.zeros(64, 128, dtype=torch.bfloat16, device="npu")
found = []
for allowed in (None, True):
    if allowed is not None:
        torch.npu.config.allow_internal_format = allowed
    found.append(str(torch_npu.get_npu_format(torch_npu.npu_format_cast(x, 29))))
    print(f"allow_internal_format {'as it is' if allowed is None else allowed}: the cast to 29 gives {found[-1]}")
same = found == ["ND", "FRACTAL_NZ"]
print("as described" if same else "CHANGED")
sys.stdout.flush()
__import__("os")._exit(0 if same else 1)  # the stand-ins cannot end a device
PY
# Seen 2026-11-28:
#   torch-npu 2.13.0
#   allow_internal_format as it is: the cast to 29 gives ND
#   allow_internal_format True: the cast to 29 gives FRACTAL_NZ
#   as described
