// Enough of CANN's runtime for the vendor's own torch_npu to start and to run up to its kernels: memory is the host's,
// streams and events are counted, kernels are logged by name and compute nothing. What is not here returns 0; stub.py adds it.
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { OK = 0, NO_DEVICE = 107001, NO_CONTEXT = 107002, TOO_SMALL = 107000, NO_MEMORY = 207000, DEVICES = 2 };
int porthal_stub_runtime = 1;  // tells a report that no chip is behind this
static __thread int device = -1;

int aclrtGetDeviceCount(uint32_t *count) { *count = DEVICES; return OK; }
int aclrtGetDevice(int32_t *id) { if (device < 0) return NO_CONTEXT; *id = device; return OK; }
int aclrtSetDevice(int32_t id) { if (id < 0 || id >= DEVICES) return NO_DEVICE; device = id; return OK; }
int aclrtGetCurrentContext(void **context) { *context = (void *)(intptr_t)(0x1000 + (device < 0 ? 0 : device)); return OK; }
int aclrtSetCurrentContext(void *context) { if (context) device = (int)((intptr_t)context - 0x1000); return OK; }
int aclrtGetPrimaryCtxState(int32_t id, uint32_t *flags, int32_t *active) { *active = 1; return OK; }
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t a, int32_t b) { *can = 1; return OK; }
int aclrtGetDeviceInfo(uint32_t id, int attribute, int64_t *value) { *value = 1; return OK; }
int aclGetDeviceCapability(uint32_t id, int kind, int64_t *value) { *value = 24; return OK; }
const char *aclrtGetSocName(void) { return "Ascend910B2"; }
const char *aclGetRecentErrMsg(void) { return ""; }

int aclrtMalloc(void **p, size_t n, int policy) { return posix_memalign(p, 512, n ? n : 512) ? NO_MEMORY : OK; }
int aclrtMallocAlign32(void **p, size_t n, int policy) { return aclrtMalloc(p, n, policy); }
int aclrtFree(void *p) { free(p); return OK; }
int aclrtMallocHost(void **p, size_t n) { return posix_memalign(p, 64, n ? n : 64) ? NO_MEMORY : OK; }
int aclrtFreeHost(void *p) { free(p); return OK; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t n, int kind) {
    if (n > room) return TOO_SMALL;
    memcpy(to, from, n);
    return OK;
}
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t n, int kind, void *stream) {
    return aclrtMemcpy(to, room, from, n, kind);
}
int aclrtMemset(void *p, size_t room, int32_t value, size_t n) { memset(p, value, n); return OK; }
int aclrtMemsetAsync(void *p, size_t room, int32_t value, size_t n, void *stream) { memset(p, value, n); return OK; }
int aclrtGetMemInfo(int kind, size_t *unused, size_t *all) { *unused = (size_t)60 << 30; *all = (size_t)64 << 30; return OK; }

static intptr_t streams = 0x2000;
int aclrtCreateStream(void **s) { *s = (void *)__sync_fetch_and_add(&streams, 16); return OK; }
int aclrtCreateStreamWithConfig(void **s, uint32_t priority, uint32_t flags) { return aclrtCreateStream(s); }
int aclrtCtxGetCurrentDefaultStream(void **s) { *s = (void *)0x1ff0; return OK; }
int aclrtStreamQuery(void *s, int *status) { *status = 0; return OK; }
int aclrtStreamGetId(void *s, int32_t *id) { *id = (int)((intptr_t)s & 0xffff); return OK; }
int aclrtCreateEvent(void **e) { *e = calloc(1, sizeof(struct timespec)); return OK; }
int aclrtCreateEventWithFlag(void **e, uint32_t flag) { return aclrtCreateEvent(e); }
int aclrtCreateEventExWithFlag(void **e, uint32_t flag) { return aclrtCreateEvent(e); }
int aclrtDestroyEvent(void *e) { free(e); return OK; }
int aclrtRecordEvent(void *e, void *stream) { clock_gettime(CLOCK_MONOTONIC, (struct timespec *)e); return OK; }
int aclrtQueryEventStatus(void *e, int *status) { *status = 1; return OK; }
int aclrtQueryEventWaitStatus(void *e, int *status) { *status = 1; return OK; }
int aclrtEventElapsedTime(float *ms, void *from, void *to) {
    struct timespec *a = from, *b = to;
    *ms = (b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) / 1e6;
    return OK;
}

static int64_t options[64];
int aclrtGetSysParamOpt(int option, int64_t *value) { *value = options[option & 63]; return OK; }
int aclrtCtxGetSysParamOpt(int option, int64_t *value) { *value = options[option & 63]; return OK; }
int aclrtGetVersion(int *major, int *minor, int *patch) { *major = 9; *minor = 0; *patch = 0; return OK; }
int aclGetCannAttribute(int attribute, int *value) { *value = 0; return OK; }
int aclGetCannAttributeList(void *list, size_t *count) { *count = 0; return OK; }
size_t aclGetCompileoptSize(int option) { return 64; }
int aclGetCompileopt(int option, char *value, size_t n) { strncpy(value, "disable", n); return OK; }

// The calls of aclnn and what describes their arguments, of which nothing is read.
static const char *called[65536];
static int calls;
int porthal_log(const char *name) { if (calls < 65536) called[calls++] = name; return OK; }
int porthal_calls(void) { return calls; }
const char *porthal_call(int i) { return called[i]; }
void porthal_forget(void) { calls = 0; }
#define MAKES(name) void *name(void) { return calloc(1, 64); }
MAKES(aclCreateTensor) MAKES(aclCreateScalar) MAKES(aclCreateIntArray) MAKES(aclCreateFloatArray) MAKES(aclCreateBoolArray)
MAKES(aclCreateTensorList) MAKES(aclCreateFp16Array) MAKES(aclCreateBf16Array) MAKES(aclCreateScalarList)
