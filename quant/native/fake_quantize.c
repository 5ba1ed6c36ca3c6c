/* The arithmetic of quant/rounding.py, each function in one pass over memory.

   Compiled at first use by quant/native/building.py, called from quant/native/kernel.py. Results are bit for bit those
   of torch's operators: the same operations in float32 in the same order, rounding with halves to even, and products
   and sums never joined (-ffp-contract=off; without -ffast-math). NaN stays NaN: comparisons with it are false.

   Work is cut into blocks of BLOCK values that threads take one after the other. Sums are kept for each block, in
   double, and added in the order of the blocks, so that no result depends on the number of threads.

   Types of tensors: 0 float32, 1 bfloat16, 2 int8, 3 uint8. */

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 32768
#define CHUNK 512 /* values whose intermediate results stay in the first cache */
#define LANES 16  /* sums of a block that run side by side, whatever the width of the processor's registers */

/* The OpenMP runtime that torch has loaded: its threads are those that torch's operators use. */
extern void GOMP_parallel(void (*function)(void *), void *data, unsigned num_threads, unsigned flags)
    __attribute__((weak));

typedef struct {
    void (*function)(const void *arguments, int64_t begin, int64_t end, int64_t block);
    const void *arguments;
    int64_t size;
    _Atomic int64_t next;
} Work;

static void take_blocks(void *data) {
    Work *work = data;
    for (;;) {
        int64_t block = atomic_fetch_add(&work->next, 1), begin = block * BLOCK;
        if (begin >= work->size)
            return;
        work->function(work->arguments, begin, work->size - begin < BLOCK ? work->size : begin + BLOCK, block);
    }
}

static void run(void (*function)(const void *, int64_t, int64_t, int64_t), const void *arguments, int64_t size,
                int threads) {
    Work work = {function, arguments, size, 0};
    int64_t blocks = (size + BLOCK - 1) / BLOCK;
    if (threads > blocks)
        threads = (int)blocks;
    if (threads > 1 && GOMP_parallel)
        GOMP_parallel(take_blocks, &work, (unsigned)threads, 0);
    else
        take_blocks(&work);
}

static inline float from_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return value != value ? 0x7fc0u : (uint16_t)rounded;
}

/* Values begin.. of a tensor as float32: where they lie, or in `copy`. */
static inline const float *load(const void *values, int type, int64_t begin, int64_t count, float *restrict copy) {
    if (type == 0)
        return (const float *)values + begin;
    if (type == 1) {
        const uint16_t *source = (const uint16_t *)values + begin;
        for (int64_t i = 0; i < count; i++)
            copy[i] = from_bfloat16(source[i]);
    } else if (type == 2) {
        const int8_t *source = (const int8_t *)values + begin;
        for (int64_t i = 0; i < count; i++)
            copy[i] = source[i];
    } else {
        const uint8_t *source = (const uint8_t *)values + begin;
        for (int64_t i = 0; i < count; i++)
            copy[i] = source[i];
    }
    return copy;
}

static inline void store(void *values, int type, int64_t begin, int64_t count, const float *restrict from) {
    if (type == 0) {
        memcpy((float *)values + begin, from, (size_t)count * 4);
    } else if (type == 1) {
        uint16_t *result = (uint16_t *)values + begin;
        for (int64_t i = 0; i < count; i++)
            result[i] = to_bfloat16(from[i]);
    } else if (type == 2) {
        int8_t *result = (int8_t *)values + begin;
        for (int64_t i = 0; i < count; i++)
            result[i] = (int8_t)(int32_t)from[i];
    } else {
        uint8_t *result = (uint8_t *)values + begin;
        for (int64_t i = 0; i < count; i++)
            result[i] = (uint8_t)(int32_t)from[i];
    }
}

static inline float clamped(float code, float low, float high) {
    code = code < low ? low : code;
    return code > high ? high : code;
}

/* y = scale * clamp(round(x / scale)) */

typedef struct {
    const void *x;
    float *y;
    int type;
    float inverse, scale, low, high;
} Round;

static void round_block(const void *arguments, int64_t begin, int64_t end, int64_t block) {
    const Round a = *(const Round *)arguments;
    float copy[CHUNK];
    for (int64_t start = begin; start < end; start += CHUNK) {
        int64_t count = end - start < CHUNK ? end - start : CHUNK;
        const float *restrict x = load(a.x, a.type, start, count, copy);
        float *restrict y = a.y + start;
        for (int64_t i = 0; i < count; i++)
            y[i] = clamped(rintf(x[i] * a.inverse), a.low, a.high) * a.scale;
    }
}

void octet_round(const void *x, int type, float *y, int64_t size, float inverse, float scale, float low, float high,
                 int threads) {
    Round arguments = {x, y, type, inverse, scale, low, high};
    run(round_block, &arguments, size, threads);
}

/* Gradients for x, and the sum of g * (y - m * x); see quant/rounding.py. `below` and `above` bound x / scale where m = 1. */

typedef struct {
    const float *g;
    const void *x;
    void *grad_x;
    double *sums; /* of each block, or NULL */
    int type;
    float inverse, scale, low, high, below, above;
} Gradients;

static void gradients_block(const void *arguments, int64_t begin, int64_t end, int64_t block) {
    const Gradients a = *(const Gradients *)arguments;
    float copy[CHUNK], rest[CHUNK], masked[CHUNK];
    double lanes[LANES] = {0};
    for (int64_t start = begin; start < end; start += CHUNK) {
        int64_t count = end - start < CHUNK ? end - start : CHUNK;
        const float *restrict x = load(a.x, a.type, start, count, copy);
        const float *restrict g = a.g + start;
        float *restrict result = a.type == 0 ? (float *)a.grad_x + start : masked;
        if (a.sums) {
            for (int64_t i = 0; i < count; i++) {
                float u = x[i] * a.inverse;
                int inside = u > a.below && u < a.above;
                result[i] = inside ? g[i] : 0.0f;
                rest[i] = clamped(rintf(u), a.low, a.high) * a.scale - (inside ? x[i] : 0.0f);
            }
            for (int64_t i = count; i % LANES; i++)
                rest[i] = 0.0f;
            int64_t whole = count - count % LANES;
            for (int64_t i = 0; i < whole; i += LANES)
                for (int lane = 0; lane < LANES; lane++)
                    lanes[lane] += (double)g[i + lane] * (double)rest[i + lane];
            for (int64_t i = whole; i < count; i++)
                lanes[i - whole] += (double)g[i] * (double)rest[i];
        } else {
            for (int64_t i = 0; i < count; i++) {
                float u = x[i] * a.inverse;
                result[i] = u > a.below && u < a.above ? g[i] : 0.0f;
            }
        }
        if (a.type != 0)
            store(a.grad_x, a.type, start, count, masked);
    }
    if (a.sums) {
        double sum = 0;
        for (int lane = 0; lane < LANES; lane++)
            sum += lanes[lane];
        a.sums[block] = sum;
    }
}

/* Returns the sum, rounded to float32; 0 where it is not wanted. NaN where there is no memory for the blocks' sums. */
float octet_gradients(const float *g, const void *x, int type, void *grad_x, int64_t size, float inverse, float scale,
                      float low, float high, float below, float above, int is_learned, int threads) {
    int64_t blocks = (size + BLOCK - 1) / BLOCK;
    double sum = 0, *sums = is_learned ? malloc((size_t)(blocks + 1) * sizeof(double)) : NULL;
    if (is_learned && !sums)
        return NAN;
    Gradients arguments = {g, x, grad_x, sums, type, inverse, scale, low, high, below, above};
    run(gradients_block, &arguments, size, threads);
    for (int64_t block = 0; sums && block < blocks; block++)
        sum += sums[block];
    free(sums);
    return (float)sum;
}

/* codes = unit * round(values / scale), of any type */

typedef struct {
    const float *values;
    void *codes;
    int type;
    float inverse, unit;
} Codes;

static void codes_block(const void *arguments, int64_t begin, int64_t end, int64_t block) {
    const Codes a = *(const Codes *)arguments;
    float copy[CHUNK];
    for (int64_t start = begin; start < end; start += CHUNK) {
        int64_t count = end - start < CHUNK ? end - start : CHUNK;
        const float *restrict values = a.values + start;
        float *restrict codes = a.type == 0 ? (float *)a.codes + start : copy;
        for (int64_t i = 0; i < count; i++)
            codes[i] = rintf(values[i] * a.inverse) * a.unit;
        if (a.type != 0)
            store(a.codes, a.type, start, count, copy);
    }
}

void octet_codes(const float *values, void *codes, int type, int64_t size, float inverse, float unit, int threads) {
    Codes arguments = {values, codes, type, inverse, unit};
    run(codes_block, &arguments, size, threads);
}

/* values = codes * factor, codes of any type */

typedef struct {
    const void *codes;
    float *values;
    int type;
    float factor;
} Scaled;

static void scaled_block(const void *arguments, int64_t begin, int64_t end, int64_t block) {
    const Scaled a = *(const Scaled *)arguments;
    float copy[CHUNK];
    for (int64_t start = begin; start < end; start += CHUNK) {
        int64_t count = end - start < CHUNK ? end - start : CHUNK;
        const float *restrict codes = load(a.codes, a.type, start, count, copy);
        float *restrict values = a.values + start;
        for (int64_t i = 0; i < count; i++)
            values[i] = codes[i] * a.factor;
    }
}

void octet_scaled(const void *codes, int type, float *values, int64_t size, float factor, int threads) {
    Scaled arguments = {codes, values, type, factor};
    run(scaled_block, &arguments, size, threads);
}
