/* What calibration and sensitivity ask of tensors, each function in one pass over memory.

   Compiled at first use by quant/native/building.py, called from quant/native/statistics.py. Counts are those of
   torch's operators; sums differ from theirs in the last digits, because their order does. No result depends on the
   number of threads. Types and blocks are those of blocks.h. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "blocks.h"

/* Counts of |x| in BINS equal bins of [0, 2^exponent), see quant/calibration/observers.py. The exponent grows while the
   values are read; bins are then added in pairs. */

#define BINS 4096
#define COPIES 2 /* equal values in turn go to different counters, which need not wait for each other */
#define HUGE_BITS 0x6c800000u /* of 2^90: from here on, values count as infinite; NaN has larger bits */
#define TINY_BITS 0x21800000u /* of 2^-60: up to here, values count as zero */
#define PART (1 << 28)        /* values whose count fits a counter */

typedef struct {
    int64_t counts[BINS], num_ignored;
    uint32_t largest; /* bits of the largest magnitude */
    int exponent;
} Counted;

typedef struct {
    const void *x;
    Counted *parts;
    int type, exponent;
} Count;

static inline uint32_t magnitude_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits & 0x7fffffffu;
}

static inline uint32_t largest_bits(const float *x, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = magnitude_bits(x[i]);
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

/* Adds each 2^times neighbours of `counters` to the first ones. */
static void add_neighbours(uint32_t *counters, int times) {
    int64_t group = times < 12 ? (int64_t)1 << times : BINS;
    for (int64_t bin = 0; bin < BINS; bin++) {
        uint32_t count = counters[bin];
        counters[bin] = 0;
        counters[bin / group] += count;
    }
}

static void count_block(const void *arguments, int64_t row, int64_t begin, int64_t end, int64_t block) {
    const Count a = *(const Count *)arguments;
    Counted *result = a.parts + block;
    uint32_t counters[COPIES][BINS] = {{0}}, largest = 0;
    float copy[CHUNK], finite[CHUNK];
    int32_t bins[CHUNK];
    int exponent = a.exponent;
    (void)row;
    result->num_ignored = 0;
    for (int64_t start = begin; start < end; start += CHUNK) {
        int64_t count = least(end - start, CHUNK);
        const float *x = load(a.x, a.type, start, count, copy);
        uint32_t bits = largest_bits(x, count);
        if (bits >= HUGE_BITS) {
            int64_t kept = 0;
            for (int64_t i = 0; i < count; i++)
                if (magnitude_bits(x[i]) < HUGE_BITS)
                    finite[kept++] = x[i];
            result->num_ignored += count - kept;
            x = finite;
            count = kept;
            bits = largest_bits(x, count);
        }
        largest = bits > largest ? bits : largest;
        int needed = (int)(bits >> 23) - 126;
        if (bits > TINY_BITS && needed > exponent) {
            for (int i = 0; i < COPIES; i++)
                add_neighbours(counters[i], needed - exponent);
            exponent = needed;
        }
        const float bins_per_unit = ldexpf(BINS, -exponent);
        for (int64_t i = 0; i < count; i++)
            bins[i] = (int32_t)(fabsf(x[i]) * bins_per_unit);
        int64_t i = 0;
        for (; i + COPIES <= count; i += COPIES)
            for (int lane = 0; lane < COPIES; lane++)
                counters[lane][bins[i + lane]]++;
        for (; i < count; i++)
            counters[0][bins[i]]++;
    }
    for (int64_t bin = 0; bin < BINS; bin++) {
        result->counts[bin] = 0;
        for (int i = 0; i < COPIES; i++)
            result->counts[bin] += counters[i][bin];
    }
    result->largest = largest;
    result->exponent = exponent;
}

/* Adds to `counts` for a range of 2^exponent, the first exponent; returns the last one, INT32_MIN without memory. */
int octet_count(const void *x, int type, int64_t size, int exponent, int64_t *counts, float *largest,
                int64_t *num_ignored, int threads) {
    int64_t share = least((size + threads - 1) / threads, PART), num_parts = (size + share - 1) / share;
    Counted *parts = malloc((size_t)num_parts * sizeof(Counted));
    Count arguments = {x, parts, type, exponent};
    if (!parts)
        return INT32_MIN;
    run_in(count_block, &arguments, 1, size, share, size, threads);
    uint32_t bits = 0;
    *num_ignored = 0;
    for (int64_t i = 0; i < num_parts; i++) {
        exponent = parts[i].exponent > exponent ? parts[i].exponent : exponent;
        bits = parts[i].largest > bits ? parts[i].largest : bits;
        *num_ignored += parts[i].num_ignored;
    }
    memcpy(largest, &bits, 4);
    for (int64_t i = 0; i < num_parts; i++) {
        int times = exponent - parts[i].exponent;
        for (int64_t bin = 0; bin < BINS; bin++)
            counts[times < 12 ? bin >> times : 0] += parts[i].counts[bin];
    }
    free(parts);
    return exponent;
}

/* Sums over each image of (g * (Q(x) - x))^2, where Q rounds to a grid. An image is `outer` runs of `inner` values;
   images and runs of x and of g begin at the given distances. */

typedef struct {
    const float *x, *g;
    double *sums; /* of each block */
    int64_t outer, inner, x_image, x_run, g_image, g_run;
    float scale, low, high;
} Changes;

static void changes_block(const void *arguments, int64_t row, int64_t begin, int64_t end, int64_t block) {
    const Changes a = *(const Changes *)arguments;
    const float inverse = 1.0f / a.scale;
    int64_t place = begin - row * a.outer * a.inner, left = end - begin;
    int64_t run = place / a.inner, offset = place % a.inner;
    float codes[CHUNK];
    double sum = 0;
    while (left > 0) {
        int64_t count = least(least(a.inner - offset, left), CHUNK);
        const float *restrict x = a.x + row * a.x_image + run * a.x_run + offset;
        const float *restrict g = a.g + row * a.g_image + run * a.g_run + offset;
        float lanes[LANES] = {0};
        for (int64_t i = 0; i < count; i++)
            codes[i] = clamped(rintf(x[i] * inverse), a.low, a.high) * a.scale;
        int64_t whole = count - count % LANES;
        for (int64_t i = 0; i < whole; i += LANES)
            for (int lane = 0; lane < LANES; lane++) {
                float change = (codes[i + lane] - x[i + lane]) * g[i + lane];
                lanes[lane] += change * change;
            }
        for (int64_t i = whole; i < count; i++) {
            float change = (codes[i] - x[i]) * g[i];
            lanes[i - whole] += change * change;
        }
        for (int lane = 0; lane < LANES; lane++)
            sum += (double)lanes[lane];
        left -= count;
        offset += count;
        if (offset == a.inner) {
            offset = 0;
            run++;
        }
    }
    a.sums[block] = sum;
}

/* `totals` gets the sum of each image, NaN without memory. */
void octet_changes(const float *x, const float *g, int64_t images, int64_t outer, int64_t inner, int64_t x_image,
                   int64_t x_run, int64_t g_image, int64_t g_run, float scale, float low, float high, float *totals,
                   int threads) {
    int64_t blocks = blocks_of(outer * inner);
    double *sums = malloc((size_t)(images * blocks + 1) * sizeof(double));
    Changes arguments = {x, g, sums, outer, inner, x_image, x_run, g_image, g_run, scale, low, high};
    if (sums)
        run(changes_block, &arguments, images, outer * inner, threads);
    add_blocks(sums, images, blocks, totals);
    free(sums);
}
