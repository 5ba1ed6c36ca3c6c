/* The arithmetic of quant/rounding.py, each function in one pass over memory.

   Compiled at first use by quant/native/building.py, called from quant/native/kernel.py. Results are bit for bit those
   of torch's operators: the same operations in float32 in the same order, rounding with halves to even, and products
   and sums never joined (-ffp-contract=off; without -ffast-math). NaN stays NaN: comparisons with it are false.

   Tensors are dense, and taken in the order of memory. They have rows with one scale each: an activation is one row, a
   weight has a row for each output channel. Types and blocks are those of blocks.h. SiLU joins products and sums where
   torch does (silu.h). */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "blocks.h"
#include "silu.h"

/* Whether SiLU can be computed as torch does, and is not slow. */
int octet_has_silu(void) {
    return HAS_SILU;
}

/* SiLU, and 1 / sigmoid; a bfloat16 tensor holds SiLU rounded. */
static inline void silu(const float *restrict x, int type, int64_t count, float *restrict result,
                        float *restrict inverse_sigmoid) {
    inverse_sigmoids(x, count, inverse_sigmoid);
    for (int64_t i = 0; i < count; i++)
        result[i] = x[i] / inverse_sigmoid[i];
    if (type == 1)
        for (int64_t i = 0; i < count; i++)
            result[i] = from_bfloat16(to_bfloat16(result[i]));
}

/* y = scale * clamp(round(x / scale)); with `codes`: of SiLU(x) instead of x, and the codes as well, int8 or uint8 */

typedef struct {
    const void *x;
    float *y;
    void *codes;
    const float *scale;
    int type;
    float low, high;
} Round;

static void round_block(const void *arguments, int64_t row, int64_t begin, int64_t end, int64_t block) {
    const Round a = *(const Round *)arguments;
    const float scale = a.scale[row], inverse = 1.0f / scale;
    float copy[CHUNK], activated[CHUNK], codes[CHUNK];
    for (int64_t start = begin; start < end; start += CHUNK) {
        int64_t count = end - start < CHUNK ? end - start : CHUNK;
        const float *restrict x = load(a.x, a.type, start, count, copy);
        float *restrict y = a.y + start;
        if (!a.codes) {
            for (int64_t i = 0; i < count; i++)
                y[i] = clamped(rintf(x[i] * inverse), a.low, a.high) * scale;
            continue;
        }
        silu(x, a.type, count, activated, codes);
        for (int64_t i = 0; i < count; i++) {
            codes[i] = clamped(rintf(activated[i] * inverse), a.low, a.high);
            y[i] = codes[i] * scale;
        }
        store(a.codes, a.low < 0.0f ? 2 : 3, start, count, codes);
    }
}

void octet_round(const void *x, int type, float *y, void *codes, int64_t rows, int64_t width,
                 const float *scale, float low, float high, int threads) {
    Round arguments = {x, y, codes, scale, type, low, high};
    run(round_block, &arguments, rows, width, threads);
}

/* Gradients for x, and the sum of g * (y - m * x); see quant/rounding.py. `below` and `above` bound x / scale where m = 1.
   Of SiLU: the sum with SiLU(x) instead of x, and the gradient passed on through SiLU. */

typedef struct {
    const float *g;
    const void *x;
    void *grad_x;
    double *sums; /* of each block, or NULL */
    const float *scale;
    int type, of_silu;
    float low, high, below, above;
} Gradients;

/* Adds the products of two rows of at most CHUNK values to sums that run side by side, the first few in float32. */
static inline void add_products(const float *restrict g, const float *restrict rest, int64_t count, double *lanes) {
    float few[4 * LANES] = {0};
    int64_t whole = count - count % (4 * LANES);
    for (int64_t i = 0; i < whole; i += 4 * LANES)
        for (int lane = 0; lane < 4 * LANES; lane++)
            few[lane] += g[i + lane] * rest[i + lane];
    for (int64_t i = whole; i < count; i++)
        few[i - whole] += g[i] * rest[i];
    for (int lane = 0; lane < 4 * LANES; lane++)
        lanes[lane % LANES] += (double)few[lane];
}

/* Gradients of one chunk for SiLU: the gradient for SiLU(x), which a bfloat16 tensor holds rounded, passes through it. */
static inline void through_silu(const Gradients *a, const float *restrict g, const float *restrict x, int64_t count,
                                float scale, float *restrict result, float *restrict rest) {
    float activated[CHUNK], inverse_sigmoid[CHUNK];
    const float inverse = 1.0f / scale, low = a->low, high = a->high, below = a->below, above = a->above;
    silu(x, a->type, count, activated, inverse_sigmoid);
    for (int64_t i = 0; i < count; i++) {
        float y = activated[i], u = y * inverse, sigmoid = 1.0f / inverse_sigmoid[i];
        int inside = u > below && u < above;
        float outer = inside ? g[i] : 0.0f;
        rest[i] = clamped(rintf(u), low, high) * scale - (inside ? y : 0.0f);
        outer = a->type == 1 ? from_bfloat16(to_bfloat16(outer)) : outer;
        result[i] = outer * sigmoid * fmaf(x[i], 1.0f - sigmoid, 1.0f);
    }
}

static void gradients_block(const void *arguments, int64_t row, int64_t begin, int64_t end, int64_t block) {
    const Gradients a = *(const Gradients *)arguments;
    const float scale = a.scale[row], inverse = 1.0f / scale;
    float copy[CHUNK], rest[CHUNK], other[CHUNK];
    double lanes[LANES] = {0};
    for (int64_t start = begin; start < end; start += CHUNK) {
        int64_t count = end - start < CHUNK ? end - start : CHUNK;
        const float *restrict x = load(a.x, a.type, start, count, copy);
        const float *restrict g = a.g + start;
        float *restrict result = a.type == 0 ? (float *)a.grad_x + start : other;
        if (a.of_silu)
            through_silu(&a, g, x, count, scale, result, rest);
        else if (a.sums)
            for (int64_t i = 0; i < count; i++) {
                float u = x[i] * inverse;
                int inside = u > a.below && u < a.above;
                result[i] = inside ? g[i] : 0.0f;
                rest[i] = clamped(rintf(u), a.low, a.high) * scale - (inside ? x[i] : 0.0f);
            }
        else
            for (int64_t i = 0; i < count; i++) {
                float u = x[i] * inverse;
                result[i] = u > a.below && u < a.above ? g[i] : 0.0f;
            }
        if (a.sums)
            add_products(g, rest, count, lanes);
        if (a.type != 0)
            store(a.grad_x, a.type, start, count, other);
    }
    if (a.sums) {
        double sum = 0;
        for (int lane = 0; lane < LANES; lane++)
            sum += lanes[lane];
        a.sums[block] = sum;
    }
}

/* `totals` gets the sum of each row, rounded to float32, unless it is NULL; NaN where there is no memory for sums. */
void octet_gradients(const float *g, const void *x, int type, int of_silu, void *grad_x, int64_t rows, int64_t width,
                     const float *scale, float low, float high, float below, float above,
                     float *totals, int threads) {
    int64_t blocks = blocks_of(width);
    double *sums = totals ? malloc((size_t)(rows * blocks + 1) * sizeof(double)) : NULL;
    Gradients arguments = {g, x, grad_x, sums, scale, type, of_silu, low, high, below, above};
    run(gradients_block, &arguments, rows, width, threads);
    for (int64_t row = 0; totals && row < rows; row++) {
        double sum = sums ? 0 : NAN;
        for (int64_t block = 0; sums && block < blocks; block++)
            sum += sums[row * blocks + block];
        totals[row] = (float)sum;
    }
    free(sums);
}

/* The same for several float32 tensors. */

void octet_round_each(int64_t count, const float *const *x, float *const *y, const int64_t *rows,
                      const int64_t *widths, const float *const *scales, float low, float high, int threads) {
    for (int64_t i = 0; i < count; i++)
        octet_round(x[i], 0, y[i], NULL, rows[i], widths[i], scales[i], low, high, threads);
}

void octet_gradients_each(int64_t count, const float *const *g, const float *const *x, float *const *grad_x,
                          const int64_t *rows, const int64_t *widths, const float *const *scales, float low,
                          float high, float below, float above, float *const *totals, int threads) {
    for (int64_t i = 0; i < count; i++)
        octet_gradients(g[i], x[i], 0, 0, grad_x[i], rows[i], widths[i], scales[i], low, high, below, above,
                        totals[i], threads);
}

/* codes = unit * round(values / scale), of any type */

typedef struct {
    const float *values;
    void *codes;
    const float *scale;
    int type;
    float unit;
} Codes;

static void codes_block(const void *arguments, int64_t row, int64_t begin, int64_t end, int64_t block) {
    const Codes a = *(const Codes *)arguments;
    const float inverse = 1.0f / a.scale[row];
    float copy[CHUNK];
    for (int64_t start = begin; start < end; start += CHUNK) {
        int64_t count = end - start < CHUNK ? end - start : CHUNK;
        const float *restrict values = a.values + start;
        float *restrict codes = a.type == 0 ? (float *)a.codes + start : copy;
        for (int64_t i = 0; i < count; i++)
            codes[i] = rintf(values[i] * inverse) * a.unit;
        if (a.type != 0)
            store(a.codes, a.type, start, count, copy);
    }
}

void octet_codes(const float *values, void *codes, int type, int64_t rows, int64_t width, const float *scale,
                 float unit, int threads) {
    Codes arguments = {values, codes, scale, type, unit};
    run(codes_block, &arguments, rows, width, threads);
}

/* values = codes * factor, codes of any type */

typedef struct {
    const void *codes;
    float *values;
    const float *factor;
    int type;
} Scaled;

static void scaled_block(const void *arguments, int64_t row, int64_t begin, int64_t end, int64_t block) {
    const Scaled a = *(const Scaled *)arguments;
    const float factor = a.factor[row];
    float copy[CHUNK];
    for (int64_t start = begin; start < end; start += CHUNK) {
        int64_t count = end - start < CHUNK ? end - start : CHUNK;
        const float *restrict codes = load(a.codes, a.type, start, count, copy);
        float *restrict values = a.values + start;
        for (int64_t i = 0; i < count; i++)
            values[i] = codes[i] * factor;
    }
}

void octet_scaled(const void *codes, int type, float *values, int64_t rows, int64_t width, const float *factor,
                  int threads) {
    Scaled arguments = {codes, values, factor, type};
    run(scaled_block, &arguments, rows, width, threads);
}

/* values = sums * steps[channel] + bias[channel] for tensors [outer, channels, inner], and the gradients for sums and
   bias. A block is a part of one row [inner]; where channels are the innermost axis, some rows [channels]. */

typedef struct {
    const void *from;
    void *to;
    const float *steps, *bias;
    double *sums; /* of each row, or of each block and channel */
    int64_t channels;
    int from_type, to_type, is_backward;
} Affine;

/* `from` may be `to`, which `restrict` would forbid. */
static inline void affine_values(const Affine *a, const float *from, float *to, int64_t count,
                                 float step, float bias, double *sum) {
    if (!a->is_backward) {
#pragma GCC ivdep
        for (int64_t i = 0; i < count; i++)
            to[i] = from[i] * step + bias;
        return;
    }
    double lanes[LANES] = {0};
    int64_t whole = count - count % LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            lanes[lane] += (double)from[i + lane];
    for (int64_t i = whole; i < count; i++)
        lanes[i - whole] += (double)from[i];
#pragma GCC ivdep
    for (int64_t i = 0; i < count; i++)
        to[i] = from[i] * step;
    for (int lane = 0; lane < LANES; lane++)
        *sum += lanes[lane];
}

static void affine_block(const void *arguments, int64_t row, int64_t begin, int64_t end, int64_t block) {
    const Affine a = *(const Affine *)arguments;
    float copy[CHUNK], result[CHUNK];
    double sum = 0;
    for (int64_t start = begin; start < end; start += CHUNK) {
        int64_t count = end - start < CHUNK ? end - start : CHUNK;
        const float *from = load(a.from, a.from_type, start, count, copy);
        float *to = a.to_type == 0 ? (float *)a.to + start : result;
        affine_values(&a, from, to, count, a.steps[row % a.channels], a.bias[row % a.channels], &sum);
        if (a.to_type != 0)
            store(a.to, a.to_type, start, count, result);
    }
    if (a.sums)
        a.sums[block] = sum;
}

static void affine_last_block(const void *arguments, int64_t row, int64_t begin, int64_t end, int64_t block) {
    const Affine a = *(const Affine *)arguments;
    float copy[CHUNK], result[CHUNK], many_steps[CHUNK], many_biases[CHUNK];
    double many_sums[CHUNK] = {0};
    const float *steps = a.steps, *bias = a.bias;
    double *sums = a.sums ? a.sums + block * a.channels : NULL;
    int64_t period = a.channels;
    (void)row;
    if (period <= CHUNK / 2) { /* several rows at once, so that loops are long */
        period = CHUNK / a.channels * a.channels;
        for (int64_t i = 0; i < period; i++) {
            many_steps[i] = steps[i % a.channels];
            many_biases[i] = bias[i % a.channels];
        }
        steps = many_steps;
        bias = many_biases;
        sums = many_sums;
    }
    begin *= a.channels;
    end *= a.channels;
    for (int64_t place = begin; place < end; place += period)
        for (int64_t first = 0; first < period && place + first < end; first += CHUNK) {
            int64_t start = place + first, count = period - first < CHUNK ? period - first : CHUNK;
            count = end - start < count ? end - start : count;
            const float *from = load(a.from, a.from_type, start, count, copy);
            float *to = a.to_type == 0 ? (float *)a.to + start : result;
            if (a.is_backward) {
                for (int64_t i = 0; i < count; i++)
                    sums[first + i] += (double)from[i];
#pragma GCC ivdep
                for (int64_t i = 0; i < count; i++)
                    to[i] = from[i] * steps[first + i];
            } else {
#pragma GCC ivdep
                for (int64_t i = 0; i < count; i++)
                    to[i] = from[i] * steps[first + i] + bias[first + i];
            }
            if (a.to_type != 0)
                store(a.to, a.to_type, start, count, result);
        }
    if (a.is_backward && sums == many_sums)
        for (int64_t i = 0; i < period; i++)
            a.sums[block * a.channels + i % a.channels] += many_sums[i];
}

static void affine(Affine *a, int64_t outer, int64_t inner, float *totals, int threads) {
    int64_t rows = outer * a->channels, per_block = BLOCK / a->channels + 1;
    int64_t blocks = inner == 1 ? (outer + per_block - 1) / per_block : rows * blocks_of(inner);
    int64_t of_channel = inner == 1 ? blocks : outer * blocks_of(inner);
    if (totals) {
        a->is_backward = 1;
        a->sums = calloc((size_t)(inner == 1 ? blocks * a->channels : blocks) + 1, sizeof(double));
        if (!a->sums) {
            for (int64_t channel = 0; channel < a->channels; channel++)
                totals[channel] = NAN;
            return;
        }
    }
    if (inner == 1)
        run_in(affine_last_block, a, 1, outer, per_block, rows * inner, threads);
    else
        run(affine_block, a, rows, inner, threads);
    for (int64_t channel = 0; totals && channel < a->channels; channel++) {
        double sum = 0;
        for (int64_t i = 0; i < of_channel; i++) {
            int64_t parts = inner == 1 ? 1 : blocks_of(inner);
            sum += a->sums[(i / parts * a->channels + channel) * parts + i % parts];
        }
        totals[channel] = (float)sum;
    }
    free(a->sums);
}

void octet_affine(const void *sums, int type, float *values, int64_t outer, int64_t channels, int64_t inner,
                  const float *steps, const float *bias, int threads) {
    Affine arguments = {sums, values, steps, bias, NULL, channels, type, 0, 0};
    affine(&arguments, outer, inner, NULL, threads);
}

void octet_affine_gradients(const float *g, void *grad_sums, int type, int64_t outer, int64_t channels,
                            int64_t inner, const float *steps, float *grad_bias, int threads) {
    Affine arguments = {g, grad_sums, steps, steps, NULL, channels, 0, type, 1};
    affine(&arguments, outer, inner, grad_bias, threads);
}
