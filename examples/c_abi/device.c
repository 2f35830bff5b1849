/* Plays a chip: memory that only these functions touch, and kernels over dense rows.
 *
 * A device address is an address that the host may not read: `window` is reserved and never opened, so that a slip of the
 * host ends in a segmentation fault. `memory` is as large and holds the values; the same offset in both is the same place.
 *
 * Every function returns 0, or 1 after it has noted why; flint_last_error() gives that sentence, for the calling thread.
 * Functions may be called by several threads at once. Steps are in bytes. */
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { FLOAT32, BFLOAT16, KINDS };
enum { ALIGNMENT = 64 };
static const int64_t CAPACITY = (int64_t)16 << 30; /* reserved; only what is written takes memory of the host */

typedef struct block {
    int64_t start, bytes; /* an offset in the window */
    struct block *next;   /* the one behind it */
} block;

static char *window, *memory;
static block *blocks;
static int64_t live;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local char said[200];

static int fail(const char *format, ...)
{
    va_list values;
    va_start(values, format);
    vsnprintf(said, sizeof said, format, values);
    va_end(values);
    return 1;
}

const char *flint_last_error(void) { return said; }

/* -- memory ------------------------------------------------------------------------------------------------------------ */

static int powered(void)
{
    if (!window) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void *values = mmap(NULL, CAPACITY, PROT_READ | PROT_WRITE, flags, -1, 0);
        void *addresses = mmap(NULL, CAPACITY, PROT_NONE, flags, -1, 0);
        if (values != MAP_FAILED && addresses != MAP_FAILED)
            memory = values, window = addresses;
    }
    return window != NULL;
}

int flint_malloc(int64_t bytes, void **address)
{
    int64_t start = 0, wanted = (bytes < 1 ? 1 : bytes) + ALIGNMENT - 1;
    wanted -= wanted % ALIGNMENT;
    block *made = malloc(sizeof *made), **at = &blocks;
    pthread_mutex_lock(&lock);
    for (; *at && (*at)->start - start < wanted; at = &(*at)->next) /* the first gap that is wide enough */
        start = (*at)->start + (*at)->bytes;
    int fits = made && powered() && wanted <= CAPACITY - start;
    if (fits) {
        *made = (block){start, wanted, *at};
        *at = made;
        *address = window + start;
        live++;
    }
    pthread_mutex_unlock(&lock);
    if (fits)
        return 0;
    free(made);
    return fail("the device is out of memory: %lld bytes do not fit into its %lld beside what is in use; free arrays first",
                (long long)bytes, (long long)CAPACITY);
}

int flint_free(void *address)
{
    pthread_mutex_lock(&lock);
    block **at = &blocks;
    while (*at && window + (*at)->start != (char *)address)
        at = &(*at)->next;
    block *gone = *at;
    if (gone) {
        *at = gone->next;
        live--;
    }
    pthread_mutex_unlock(&lock);
    free(gone);
    return gone ? 0 : fail("flint_free got %p, which is no allocation: give an address from flint_malloc once", address);
}

/* How many allocations there are. */
int64_t flint_live(void) { return live; }

/* Where the device finds `bytes` from an address on, which must lie in one allocation. */
static int reach(const void *address, int64_t bytes, void *place)
{
    int64_t start = (int64_t)((uintptr_t)address - (uintptr_t)window);
    pthread_mutex_lock(&lock);
    block *at = blocks;
    while (at && start >= at->start + at->bytes)
        at = at->next;
    int inside = at && start >= at->start && start + bytes <= at->start + at->bytes;
    pthread_mutex_unlock(&lock);
    if (bytes && !inside)
        return fail("%lld bytes at %p are not in an allocation of the device: give arrays of the device that are alive",
                    (long long)bytes, address);
    *(char **)place = memory + start;
    return 0;
}

int flint_upload(void *to, const void *from, int64_t bytes)
{
    void *place;
    if (reach(to, bytes, &place))
        return 1;
    memcpy(place, from, bytes);
    return 0;
}

int flint_download(void *to, const void *from, int64_t bytes)
{
    void *place;
    if (reach(from, bytes, &place))
        return 1;
    memcpy(to, place, bytes);
    return 0;
}

static void walk(char *to, const int64_t *to_steps, const char *from, const int64_t *from_steps, const int64_t *shape,
                 int axes, int64_t itemsize)
{
    if (axes == 0)
        memcpy(to, from, itemsize);
    else if (axes == 1 && *to_steps == itemsize && *from_steps == itemsize)
        memcpy(to, from, *shape * itemsize);
    else
        for (int64_t i = 0; i < *shape; i++)
            walk(to + i * *to_steps, to_steps + 1, from + i * *from_steps, from_steps + 1, shape + 1, axes - 1, itemsize);
}

/* As `reach`, for an array with a step per axis. */
static int reach_all(const void *address, const int64_t *steps, const int64_t *shape, int axes, int64_t itemsize, char **place)
{
    int64_t low = 0, high = itemsize;
    for (int i = 0; i < axes; i++) {
        if (shape[i] == 0)
            return reach(address, 0, place);
        int64_t last = (shape[i] - 1) * steps[i];
        *(last < 0 ? &low : &high) += last;
    }
    if (reach((const char *)address + low, high - low, place))
        return 1;
    *place -= low;
    return 0;
}

/* From device to device, each side with its own step per axis. */
int flint_copy(void *to, const int64_t *to_steps, const void *from, const int64_t *from_steps, const int64_t *shape, int axes,
               int64_t itemsize)
{
    char *target, *source;
    if (reach_all(to, to_steps, shape, axes, itemsize, &target) || reach_all(from, from_steps, shape, axes, itemsize, &source))
        return 1;
    walk(target, to_steps, source, from_steps, shape, axes, itemsize);
    return 0;
}

/* -- kernels ----------------------------------------------------------------------------------------------------------- */

static int64_t size_of(int kind) { return kind == FLOAT32 ? 4 : 2; }

static int known(int kind)
{
    return kind >= 0 && kind < KINDS ? 1 : !fail("%d is no kind of number: give 0 for float32, 1 for bfloat16", kind);
}

static float load(const void *p, int64_t i, int kind)
{
    if (kind == FLOAT32)
        return ((const float *)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Rounded once, to nearest even. */
static void store(void *p, int64_t i, int kind, float value)
{
    if (kind == FLOAT32) {
        ((float *)p)[i] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits = isnan(value) ? bits | 0x400000 : bits + 0x7FFF + (bits >> 16 & 1);
    ((uint16_t *)p)[i] = bits >> 16;
}

int flint_add(const void *a, const void *b, void *y, int64_t n, int kind)
{
    void *pa, *pb, *py;
    if (!known(kind))
        return 1;
    int64_t bytes = n * size_of(kind);
    if (reach(a, bytes, &pa) || reach(b, bytes, &pb) || reach(y, bytes, &py))
        return 1;
    for (int64_t i = 0; i < n; i++)
        store(py, i, kind, load(pa, i, kind) + load(pb, i, kind));
    return 0;
}

int flint_rms_norm(const void *x, const void *weight, void *y, int64_t rows, int64_t columns, int kind, int weight_kind,
                   float eps)
{
    void *px, *pw, *py;
    if (!known(kind) || !known(weight_kind))
        return 1;
    int64_t bytes = rows * columns * size_of(kind);
    if (reach(x, bytes, &px) || reach(weight, columns * size_of(weight_kind), &pw) || reach(y, bytes, &py))
        return 1;
    for (int64_t at = 0; at < rows * columns; at += columns) {
        float sum = 0;
        for (int64_t i = 0; i < columns; i++)
            sum += load(px, at + i, kind) * load(px, at + i, kind);
        float root = sqrtf(sum / columns + eps);
        for (int64_t i = 0; i < columns; i++)
            store(py, at + i, kind, load(px, at + i, kind) / root * load(pw, i, weight_kind));
    }
    return 0;
}

/* x is [rows, 2 * columns]: gates, then what they are multiplied with. */
int flint_silu_mul(const void *x, void *y, int64_t rows, int64_t columns, int kind)
{
    void *px, *py;
    if (!known(kind))
        return 1;
    int64_t bytes = rows * columns * size_of(kind);
    if (reach(x, 2 * bytes, &px) || reach(y, bytes, &py))
        return 1;
    for (int64_t t = 0; t < rows; t++)
        for (int64_t i = 0; i < columns; i++) {
            float gate = load(px, 2 * t * columns + i, kind);
            store(py, t * columns + i, kind, gate / (1 + expf(-gate)) * load(px, (2 * t + 1) * columns + i, kind));
        }
    return 0;
}

/* y[rows, outputs] = x[rows, inputs] times w[outputs, inputs]. */
int flint_linear(const void *x, const void *w, void *y, int64_t rows, int64_t inputs, int64_t outputs, int kind, int y_kind)
{
    void *px, *pw, *py;
    if (!known(kind) || !known(y_kind))
        return 1;
    if (reach(x, rows * inputs * size_of(kind), &px) || reach(w, outputs * inputs * size_of(kind), &pw) ||
        reach(y, rows * outputs * size_of(y_kind), &py))
        return 1;
    for (int64_t t = 0; t < rows; t++)
        for (int64_t n = 0; n < outputs; n++) {
            float sum = 0;
            for (int64_t k = 0; k < inputs; k++)
                sum += load(px, t * inputs + k, kind) * load(pw, n * inputs + k, kind);
            store(py, t * outputs + n, y_kind, sum);
        }
    return 0;
}

/* int32 ids[rows]: where each row is highest, the first of equals; NaN is never higher. */
int flint_argmax(const void *x, void *ids, int64_t rows, int64_t columns, int kind)
{
    void *px;
    int32_t *pi;
    if (!known(kind) || reach(x, rows * columns * size_of(kind), &px) || reach(ids, rows * 4, &pi))
        return 1;
    for (int64_t t = 0; t < rows; t++) {
        float best = -INFINITY;
        pi[t] = 0;
        for (int64_t i = 0; i < columns; i++)
            if (load(px, t * columns + i, kind) > best) {
                best = load(px, t * columns + i, kind);
                pi[t] = (int32_t)i;
            }
    }
    return 0;
}
