/* Blocks of work for threads, and the types of tensors: for all C files here.

   Work is cut into blocks of at most BLOCK values that threads take one after the other. Sums are kept for each block,
   in double, and added in the order of the blocks, so that no result depends on the number of threads.

   Types of tensors: 0 float32, 1 bfloat16, 2 int8, 3 uint8. */

#ifndef OCTET_BLOCKS_H
#define OCTET_BLOCKS_H

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 32768
#define CHUNK 512 /* values whose intermediate results stay in the first cache */
#define LANES 16  /* sums of a block that run side by side, whatever the width of the processor's registers */

/* The OpenMP runtime that torch has loaded: its threads are those that torch's operators use. */
extern void GOMP_parallel(void (*function)(void *), void *data, unsigned num_threads, unsigned flags)
    __attribute__((weak));

typedef void Function(const void *arguments, int64_t row, int64_t begin, int64_t end, int64_t block);

typedef struct {
    Function *function;
    const void *arguments;
    int64_t width, size, blocks, blocks_of_row; /* of a row; of a block; all; of a row */
    _Atomic int64_t next;
} Work;

static int64_t blocks_of(int64_t width) {
    return (width + BLOCK - 1) / BLOCK;
}

static void take_blocks(void *data) {
    Work *work = data;
    int64_t block;
    while ((block = atomic_fetch_add(&work->next, 1)) < work->blocks) {
        int64_t row = block / work->blocks_of_row, start = block % work->blocks_of_row * work->size;
        int64_t end = work->width - start < work->size ? work->width : start + work->size;
        work->function(work->arguments, row, row * work->width + start, row * work->width + end, block);
    }
}

/* Calls a function for each block of `size` of the `width` elements of each row; `values` says how much work that is. */
static void run_in(Function *function, const void *arguments, int64_t rows, int64_t width, int64_t size,
                   int64_t values, int threads) {
    int64_t blocks_of_row = (width + size - 1) / size;
    Work work = {function, arguments, width, size, rows * blocks_of_row, blocks_of_row, 0};
    if (threads > blocks_of(values))
        threads = (int)blocks_of(values);
    if (threads > 1 && GOMP_parallel)
        GOMP_parallel(take_blocks, &work, (unsigned)threads, 0);
    else
        take_blocks(&work);
}

static void run(Function *function, const void *arguments, int64_t rows, int64_t width, int threads) {
    run_in(function, arguments, rows, width, BLOCK, rows * width, threads);
}

static inline int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Totals of images from the sums of their blocks; NaN where these are NULL. */
static inline void add_blocks(const double *sums, int64_t images, int64_t blocks, float *totals) {
    for (int64_t image = 0; image < images; image++) {
        double sum = sums ? 0 : NAN;
        for (int64_t block = 0; sums && block < blocks; block++)
            sum += sums[image * blocks + block];
        totals[image] = (float)sum;
    }
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

#endif
