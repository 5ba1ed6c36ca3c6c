/* What calibration and sensitivity ask of tensors, each function in one pass over memory.

   Compiled at first use by quant/native/building.py, called from quant/native/statistics.py. Counts are those of
   torch's operators; sums differ from theirs in the last digits, because their order does. No result depends on the
   number of threads. Products and sums may be joined here (-ffp-contract=fast): the products of weight gradients take
   half the time then. Types and blocks are those of blocks.h. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "blocks.h"

static inline int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

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
    for (int64_t image = 0; image < images; image++) {
        double sum = sums ? 0 : NAN;
        for (int64_t block = 0; sums && block < blocks; block++)
            sum += sums[image * blocks + block];
        totals[image] = (float)sum;
    }
    free(sums);
}

/* Sums over each image of (dW * error)^2, where dW is the gradient of a convolution's weight, of this image alone.

   With channels last, the inputs of a kernel's row that belong to one output lie in one run, [kernel_width * inputs].
   So the gradient of a kernel's row is a product of two matrices, with a row for each pixel: g [pixels, outputs] and
   these runs, which overlap. Tiles of [TILE outputs, up to VECTORS vectors of a run] stay in registers while all pixels
   of some rows go by. Padding is made by a copy of the image; what lies beyond a run is computed and left out. */

#if defined(__AVX512F__)
#define WIDTH 16
#define TILE 8
#elif defined(__AVX__)
#define WIDTH 8
#define TILE 4
#elif defined(__SSE2__)
#define WIDTH 4
#define TILE 4
#else
#define WIDTH 4
#define TILE 8
#endif
#define VECTORS 3
#define PIXELS 128 /* of a tile, at least, while it stays in registers */

typedef float Vector __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));

typedef struct { /* all strides are in values */
    int64_t inputs, height, width, outputs, out_height, out_width;
    int64_t kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x;
    int64_t x_image, x_channel, x_row, x_column, g_image, g_channel, g_row, g_column;
} Shape;

typedef struct {
    const float *x, *g, *error; /* error [outputs, kernel_height, kernel_width * inputs] */
    const Shape *shape;
    float *totals; /* of each image */
} Weights;

typedef struct { /* a plane of pixels, channels last: distances of rows and of columns */
    const float *values;
    int64_t row, column;
} Plane;

static inline __attribute__((always_inline)) void multiply(Plane x, Plane g, int64_t rows, int64_t columns, float *sums,
                                                           int64_t distance, const int vectors) {
    Vector tile[TILE][VECTORS];
    for (int output = 0; output < TILE; output++)
        for (int v = 0; v < vectors; v++)
            tile[output][v] = *(const Vector *)(sums + output * distance + v * WIDTH);
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x.values + row * x.row, *gradient = g.values + row * g.row;
        for (int64_t column = 0; column < columns; column++, from += x.column, gradient += g.column) {
            Vector run[VECTORS];
            for (int v = 0; v < vectors; v++)
                run[v] = *(const Vector *)(from + v * WIDTH);
#pragma GCC unroll 8
            for (int output = 0; output < TILE; output++)
                for (int v = 0; v < vectors; v++)
                    tile[output][v] += run[v] * gradient[output];
        }
    }
    for (int output = 0; output < TILE; output++)
        for (int v = 0; v < vectors; v++)
            *(Vector *)(sums + output * distance + v * WIDTH) = tile[output][v];
}

/* A copy of an image's plane, channels last, with borders of zeros and zeros up to `channels`. */
static Plane packed(float *to, Plane from, int64_t channel, int64_t channels, int64_t height, int64_t width,
                    int64_t pad_y, int64_t pad_x, int64_t wide) {
    int64_t column = wide, row = (width + 2 * pad_x) * wide, size = (height + 2 * pad_y) * row;
    if (pad_y || pad_x || wide > channels)
        memset(to, 0, (size_t)size * 4);
    memset(to + size, 0, WIDTH * VECTORS * 4); /* read with the last run, and left out */
    for (int64_t y = 0; y < height; y++) {
        float *restrict target = to + (y + pad_y) * row + pad_x * column;
        const float *restrict source = from.values + y * from.row;
        if (channel == 1 && from.column == wide && wide == channels)
            memcpy(target, source, (size_t)(width * wide) * 4);
        else if (channel == 1)
            for (int64_t x = 0; x < width; x++)
                memcpy(target + x * column, source + x * from.column, (size_t)channels * 4);
        else
            for (int64_t c = 0; c < channels; c++)
                for (int64_t x = 0; x < width; x++)
                    target[x * column + c] = source[c * channel + x * from.column];
    }
    return (Plane){to, row, column};
}

static void weights_block(const void *arguments, int64_t image, int64_t begin, int64_t end, int64_t block) {
    const Weights *a = arguments;
    const Shape s = *a->shape;
    int64_t run = s.kernel_width * s.inputs, wide = (run + WIDTH - 1) / WIDTH * WIDTH;
    int64_t outputs = (s.outputs + TILE - 1) / TILE * TILE, distance = s.kernel_height * wide;
    int64_t x_size = (s.height + 2 * s.pad_y) * (s.width + 2 * s.pad_x) * s.inputs + WIDTH * VECTORS;
    int64_t g_size = s.out_height * s.out_width * outputs + WIDTH * VECTORS;
    Plane x = {a->x + image * s.x_image, s.x_row, s.x_column}, g = {a->g + image * s.g_image, s.g_row, s.g_column};
    int one_run = s.kernel_width == 1 || s.x_column == s.inputs;
    int x_fits = s.x_channel == 1 && !s.pad_x && !s.pad_y && wide == run && one_run;
    int g_fits = s.g_channel == 1 && outputs == s.outputs;
    float *memory = malloc((size_t)(outputs * distance + (x_fits ? 0 : x_size) + (g_fits ? 0 : g_size)) * 4);
    (void)begin, (void)end, (void)block;
    a->totals[image] = NAN;
    if (!memory)
        return;
    float *sums = memory, *rest = memory + outputs * distance;
    memset(sums, 0, (size_t)(outputs * distance) * 4);
    if (!x_fits) {
        x = packed(rest, x, s.x_channel, s.inputs, s.height, s.width, s.pad_y, s.pad_x, s.inputs);
        rest += x_size;
    }
    if (!g_fits)
        g = packed(rest, g, s.g_channel, s.outputs, s.out_height, s.out_width, 0, 0, outputs);
    int64_t rows = (PIXELS + s.out_width - 1) / s.out_width;
    for (int64_t y = 0; y < s.out_height; y += rows)
        for (int64_t ky = 0; ky < s.kernel_height; ky++)
            for (int64_t output = 0; output < outputs; output += TILE)
                for (int64_t first = 0; first < wide; first += VECTORS * WIDTH) {
                    const float *from = x.values + (y * s.stride_y + ky) * x.row + first;
                    Plane part = {from, x.row * s.stride_y, x.column * s.stride_x};
                    Plane gradient = {g.values + y * g.row + output, g.row, g.column};
                    float *to = sums + output * distance + ky * wide + first;
                    int64_t count = least(rows, s.out_height - y), vectors = least((wide - first) / WIDTH, VECTORS);
                    if (vectors == 3)
                        multiply(part, gradient, count, s.out_width, to, distance, 3);
                    else if (vectors == 2)
                        multiply(part, gradient, count, s.out_width, to, distance, 2);
                    else
                        multiply(part, gradient, count, s.out_width, to, distance, 1);
                }
    double total = 0;
    for (int64_t i = 0; i < s.outputs * s.kernel_height; i++) {
        const float *restrict gradient = sums + i * wide, *restrict error = a->error + i * run;
        float lanes[LANES] = {0};
        int64_t whole = run - run % LANES;
        for (int64_t k = 0; k < whole; k += LANES)
            for (int lane = 0; lane < LANES; lane++) {
                float change = gradient[k + lane] * error[k + lane];
                lanes[lane] += change * change;
            }
        for (int64_t k = whole; k < run; k++) {
            float change = gradient[k] * error[k];
            lanes[k - whole] += change * change;
        }
        for (int lane = 0; lane < LANES; lane++)
            total += (double)lanes[lane];
    }
    a->totals[image] = (float)total;
    free(memory);
}

/* `totals` gets the sum of each image, NaN without memory. */
void octet_weights(const float *x, const float *g, const float *error, int64_t images, const int64_t *shape,
                   float *totals, int threads) {
    Weights arguments = {x, g, error, (const Shape *)shape, totals};
    run_in(weights_block, &arguments, images, 1, 1, images * BLOCK, threads);
}
