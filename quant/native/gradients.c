/* What the sensitivity `fisher` asks of gradients, in addition to the sums of statistics.c.

   Compiled at first use by quant/native/building.py, called from quant/native/statistics.py. Sums differ from those of
   torch's operators in the last digits, because their order does. No result depends on the number of threads. Products
   and sums may be joined here (-ffp-contract=fast): the products of weight gradients take half the time then. Blocks are
   those of blocks.h. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "blocks.h"
#include "silu.h"

/* The gradient dy for the input y of x = y * sigmoid(y), from that for x, and sums over each image of
   (dx * (Q(x) - x))^2, where Q rounds to a grid. x is computed again. Tensors lie alike and without gaps: an image is
   `width` values. */

typedef struct {
    const float *y, *dx;
    float *dy;
    double *sums; /* of each block */
    float scale, low, high;
} Silu;

static void silu_block(const void *arguments, int64_t row, int64_t begin, int64_t end, int64_t block) {
    const Silu a = *(const Silu *)arguments;
    const float inverse = 1.0f / a.scale;
    float changes[CHUNK], divisors[CHUNK];
    double sum = 0;
    (void)row;
    for (int64_t start = begin; start < end; start += CHUNK) {
        int64_t count = least(end - start, CHUNK);
        const float *restrict y = a.y + start, *restrict dx = a.dx + start;
        float *restrict dy = a.dy + start;
        inverse_sigmoids(y, count, divisors);
        for (int64_t i = 0; i < count; i++) {
            float sigmoid = 1.0f / divisors[i], x = y[i] * sigmoid;
            float code = clamped(rintf(x * inverse), a.low, a.high);
            changes[i] = (code * a.scale - x) * dx[i];
            dy[i] = dx[i] * sigmoid * (1.0f + y[i] * (1.0f - sigmoid));
        }
        float lanes[LANES] = {0};
        for (int64_t i = count; i < CHUNK && i % LANES; i++)
            changes[i] = 0;
        for (int64_t i = 0; i < count; i += LANES)
            for (int lane = 0; lane < LANES; lane++)
                lanes[lane] += changes[i + lane] * changes[i + lane];
        for (int lane = 0; lane < LANES; lane++)
            sum += (double)lanes[lane];
    }
    a.sums[block] = sum;
}

/* `totals` gets the sum of each image; all are NaN, and dy is not written, without memory. */
void octet_silu_changes(const float *y, const float *dx, float *dy, int64_t images, int64_t width, float scale,
                        float low, float high, float *totals, int threads) {
    double *sums = malloc((size_t)(images * blocks_of(width) + 1) * sizeof(double));
    Silu arguments = {y, dx, dy, sums, scale, low, high};
    if (sums)
        run(silu_block, &arguments, images, width, threads);
    add_blocks(sums, images, blocks_of(width), totals);
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
#define PAIRED 48  /* products of a value of x, at least, where they are those of bfloat16 */
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

/* Sum of (gradient * error)^2; rows of gradients [kernel_width * inputs] begin at a distance of `wide`. */
static float squared_sum(const float *gradients, const float *errors, const Shape *s, int64_t wide) {
    int64_t run = s->kernel_width * s->inputs;
    double total = 0;
    for (int64_t i = 0; i < s->outputs * s->kernel_height; i++) {
        const float *restrict gradient = gradients + i * wide, *restrict error = errors + i * run;
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
    return (float)total;
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
    a->totals[image] = squared_sum(sums, a->error, a->shape, wide);
    free(memory);
}

#ifdef __AVX512BF16__

/* The same with products of bfloat16 values, two pixels of a row at once: sums stay in float32. A value is then a pair of
   these pixels' bfloat16 values. Where the number of columns is odd, the second pixel of the last gradient is 0. */

static inline uint32_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

typedef struct { /* how pixels are paired: runs of `kernel` pixels, at every stride-th pixel of `columns` */
    int64_t channels, height, width, pad_y, pad_x, kernel, stride, columns;
} Pairing;

/* Values of a row of pixels with its borders, as far as pairs of runs reach. */
static int64_t line_of(Pairing p) {
    int64_t reached = (2 * ((p.columns + 1) / 2) - 1) * p.stride + p.kernel, padded = p.width + 2 * p.pad_x;
    return (reached > padded ? reached : padded) * p.channels + WIDTH;
}

/* Pairs of runs [rows, pairs, wide] of an image's plane with borders of zeros; `line` has room for a row of pixels. */
static void pack_pairs(uint32_t *to, uint32_t *line, Plane from, int64_t channel, Pairing p, int64_t wide) {
    int64_t pairs = (p.columns + 1) / 2, length = line_of(p);
    memset(line, 0, (size_t)length * 4);
    if (p.pad_y)
        memset(to, 0, (size_t)((p.height + 2 * p.pad_y) * pairs * wide) * 4);
    for (int64_t y = 0; y < p.height; y++) {
        const float *source = from.values + y * from.row;
        uint32_t *restrict pixels = line + p.pad_x * p.channels;
        if (channel == 1 && from.column == p.channels)
            for (int64_t i = 0; i < p.width * p.channels; i++)
                pixels[i] = rounded(source[i]);
        else if (channel == 1)
            for (int64_t x = 0; x < p.width; x++)
                for (int64_t c = 0; c < p.channels; c++)
                    pixels[x * p.channels + c] = rounded(source[x * from.column + c]);
        else
            for (int64_t c = 0; c < p.channels; c++)
                for (int64_t x = 0; x < p.width; x++)
                    pixels[x * p.channels + c] = rounded(source[c * channel + x * from.column]);
        for (int64_t pair = 0; pair < pairs; pair++) {
            const uint32_t *first = line + 2 * pair * p.stride * p.channels, *second = first + p.stride * p.channels;
            uint32_t *restrict target = to + ((y + p.pad_y) * pairs + pair) * wide;
            for (int64_t i = 0; i < wide; i++) /* what lies beyond the run is left out later */
                target[i] = first[i] | second[i] << 16;
        }
    }
}

static inline __attribute__((always_inline)) void multiply_pairs(const uint32_t *x, int64_t x_row, int64_t x_pair,
                                                                 const uint32_t *g, int64_t g_pair, int64_t rows,
                                                                 int64_t pairs, float *sums, int64_t distance,
                                                                 const int vectors) {
    __m512 tile[TILE][VECTORS];
    for (int output = 0; output < TILE; output++)
        for (int v = 0; v < vectors; v++)
            tile[output][v] = _mm512_loadu_ps(sums + output * distance + v * WIDTH);
    for (int64_t row = 0; row < rows; row++, x += x_row, g += pairs * g_pair)
        for (int64_t pair = 0; pair < pairs; pair++) {
            __m512bh run[VECTORS];
            for (int v = 0; v < vectors; v++)
                run[v] = (__m512bh)_mm512_loadu_si512(x + pair * x_pair + v * WIDTH);
#pragma GCC unroll 8
            for (int output = 0; output < TILE; output++) {
                __m512bh gradient = (__m512bh)_mm512_set1_epi32((int)g[pair * g_pair + output]);
                for (int v = 0; v < vectors; v++)
                    tile[output][v] = _mm512_dpbf16_ps(tile[output][v], run[v], gradient);
            }
        }
    for (int output = 0; output < TILE; output++)
        for (int v = 0; v < vectors; v++)
            _mm512_storeu_ps(sums + output * distance + v * WIDTH, tile[output][v]);
}

static void pairs_block(const void *arguments, int64_t image, int64_t begin, int64_t end, int64_t block) {
    const Weights *a = arguments;
    const Shape s = *a->shape;
    int64_t run = s.kernel_width * s.inputs, wide = (run + WIDTH - 1) / WIDTH * WIDTH;
    int64_t outputs = (s.outputs + TILE - 1) / TILE * TILE, distance = s.kernel_height * wide;
    int64_t pairs = (s.out_width + 1) / 2;
    Pairing of_x = {s.inputs, s.height, s.width, s.pad_y, s.pad_x, s.kernel_width, s.stride_x, s.out_width};
    Pairing of_g = {s.outputs, s.out_height, s.out_width, 0, 0, 1, 1, s.out_width};
    int64_t line = line_of(of_x) > line_of(of_g) ? line_of(of_x) : line_of(of_g);
    int64_t x_size = (s.height + 2 * s.pad_y) * pairs * wide, g_size = s.out_height * pairs * outputs;
    float *memory = malloc((size_t)(outputs * distance + line + x_size + g_size) * 4), *sums = memory;
    (void)begin, (void)end, (void)block;
    a->totals[image] = NAN;
    if (!memory)
        return;
    memset(sums, 0, (size_t)(outputs * distance) * 4);
    uint32_t *row_of_pixels = (uint32_t *)(sums + outputs * distance), *x = row_of_pixels + line, *g = x + x_size;
    pack_pairs(x, row_of_pixels, (Plane){a->x + image * s.x_image, s.x_row, s.x_column}, s.x_channel, of_x, wide);
    pack_pairs(g, row_of_pixels, (Plane){a->g + image * s.g_image, s.g_row, s.g_column}, s.g_channel, of_g, outputs);
    int64_t rows = (PIXELS + s.out_width - 1) / s.out_width, x_row = pairs * wide;
    for (int64_t y = 0; y < s.out_height; y += rows)
        for (int64_t ky = 0; ky < s.kernel_height; ky++)
            for (int64_t output = 0; output < outputs; output += TILE)
                for (int64_t first = 0; first < wide; first += VECTORS * WIDTH) {
                    const uint32_t *from = x + (y * s.stride_y + ky) * x_row + first;
                    const uint32_t *gradient = g + y * pairs * outputs + output;
                    float *to = sums + output * distance + ky * wide + first;
                    int64_t count = least(rows, s.out_height - y), vectors = least((wide - first) / WIDTH, VECTORS);
                    if (vectors == 3)
                        multiply_pairs(from, x_row * s.stride_y, wide, gradient, outputs, count, pairs, to, distance, 3);
                    else if (vectors == 2)
                        multiply_pairs(from, x_row * s.stride_y, wide, gradient, outputs, count, pairs, to, distance, 2);
                    else
                        multiply_pairs(from, x_row * s.stride_y, wide, gradient, outputs, count, pairs, to, distance, 1);
                }
    a->totals[image] = squared_sum(sums, a->error, a->shape, wide);
    free(memory);
}

#endif

/* `totals` gets the sum of each image, NaN without memory. With `halves` products are those of bfloat16 values, where the
   processor has these and where that is faster. */
void octet_weights(const float *x, const float *g, const float *error, int64_t images, const int64_t *shape, int halves,
                   float *totals, int threads) {
    Weights arguments = {x, g, error, (const Shape *)shape, totals};
    Function *function = weights_block;
#ifdef __AVX512BF16__
    const Shape *s = arguments.shape;
    if (halves && s->kernel_height * s->outputs >= PAIRED) /* where less is multiplied, packing costs more than it gains */
        function = pairs_block;
#endif
    (void)halves;
    run_in(function, &arguments, images, 1, 1, images * BLOCK, threads);
}
