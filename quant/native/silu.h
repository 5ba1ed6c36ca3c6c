/* 1 / sigmoid for all C files here, with the exponential of torch's vector code: that of SLEEF to 1.0 ulp (Shibata and
   Petrogalli, arXiv:2001.09258), which needs joined products and sums. */

#ifndef OCTET_SILU_H
#define OCTET_SILU_H

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "blocks.h"

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define HAS_SILU 1
#else
#define HAS_SILU 0 /* fmaf would be a slow function */
#endif

/* e^x = 2^n e^r with |r| <= log(2) / 2: log(2) is subtracted in two parts, e^r is a polynomial. Beyond these arguments
   the result is 0 or infinity. */
#define LOWEST_ARGUMENT (-105.0f)
#define HIGHEST_ARGUMENT 101.0f
#define LOG2_E 0x1.715476p+0f
static const float minus_log_2[] = {-0x1.62e4p-1f, -0x1.7f7d1cp-20f};
static const float terms[] = {0x1.a057b4p-13f, 0x1.6d2d92p-10f, 0x1.11114cp-7f, 0x1.5554f4p-5f, 0x1.555556p-3f, 0.5f};
#define NUM_TERMS (int)(sizeof(terms) / sizeof(*terms))

static inline float exponential(float x) {
    x = clamped(x, LOWEST_ARGUMENT, HIGHEST_ARGUMENT);
    float n = rintf(x * LOG2_E), sum = terms[0];
    float r = fmaf(n, minus_log_2[1], fmaf(n, minus_log_2[0], x));
    for (int i = 1; i < NUM_TERMS; i++)
        sum = fmaf(sum, r, terms[i]);
    float y = 1.0f + fmaf(r * r, sum, r);
    int32_t power = (int32_t)n, half = power >> 1; /* in two parts: 2^n need not be a normal number */
    int32_t bits[] = {(half + 127) << 23, (power - half + 127) << 23};
    float factors[2];
    memcpy(factors, bits, sizeof(factors));
    return y * factors[0] * factors[1];
}

#ifdef __AVX512F__
/* The same for 16 values: this processor multiplies with 2^n in one instruction. */
static inline __m512 exponential_of_16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(LOWEST_ARGUMENT), x); /* of NaN and a number the second operand is taken */
    x = _mm512_min_ps(_mm512_set1_ps(HIGHEST_ARGUMENT), x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(LOG2_E)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(minus_log_2[0]), x), sum = _mm512_set1_ps(terms[0]);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(minus_log_2[1]), r);
    for (int i = 1; i < NUM_TERMS; i++)
        sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(terms[i]));
    sum = _mm512_fmadd_ps(_mm512_mul_ps(r, r), sum, r);
    return _mm512_scalef_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), sum), n);
}
#endif

/* 1 + e^-x, which is 1 / sigmoid(x). */
static inline void inverse_sigmoids(const float *restrict x, int64_t count, float *restrict result) {
    int64_t i = 0;
#ifdef __AVX512F__
    for (; i + 16 <= count; i += 16) {
        __m512 minus = _mm512_sub_ps(_mm512_set1_ps(-0.0f), _mm512_loadu_ps(x + i));
        _mm512_storeu_ps(result + i, _mm512_add_ps(_mm512_set1_ps(1.0f), exponential_of_16(minus)));
    }
#endif
    for (; i < count; i++)
        result[i] = 1.0f + exponential(-x[i]);
}

#endif
