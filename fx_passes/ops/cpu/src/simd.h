// Vectors of floats for whichever instruction set this translation unit is compiled for.
//
// GCC/Clang vector extensions carry the arithmetic; intrinsics appear only where the extensions produce poor code.
// Data layouts never depend on the width: the unit of all layouts is a `Group` of 16 floats, which is one AVX-512
// vector, two AVX2 vectors or four SSE vectors.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // functions with wide vectors are inlined and no interface

namespace sus {

#if defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int LANES = 16;      // floats of a group; the LANES of fx_passes/ops/tiled/sample.py
constexpr int PARTS = LANES / W;  // vectors of a group

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));

template <class V, class T>
inline V load_as(const T* p) {
  V x;
  memcpy(&x, p, sizeof x);
  return x;
}

inline vf load(const float* p) { return load_as<vf>(p); }

inline void store(float* p, vf x) { memcpy(p, &x, sizeof x); }

inline vf splat(float x) { return x - vf{}; }

inline float sum(vf x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return _mm512_reduce_add_ps(x);
#elif defined(__AVX2__)
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
#else
  float s = 0;
  for (int i = 0; i < W; i++) s += x[i];
  return s;
#endif
}

// Larger of the two; y where either is NaN, so a NaN in y goes through.
inline vf larger(vf x, vf y) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return _mm512_max_ps(x, y);
#elif defined(__AVX2__)
  return _mm256_max_ps(x, y);
#else
  return x > y ? x : y;
#endif
}

inline float largest(vf x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return _mm512_reduce_max_ps(x);
#else
  float m = x[0];
  for (int i = 1; i < W; i++) m = m > x[i] ? m : x[i];
  return m;
#endif
}

// Bit i is the sign of x[i].
inline uint32_t signs(vf x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)x);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps(x));
#elif defined(__SSE2__)
  return uint32_t(_mm_movemask_ps(x));
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; i++) bits |= uint32_t(((vi)x)[i] < 0) << i;
  return bits;
#endif
}

// 2^f for f in [-1/2, 1/2]: minimax polynomial, relative error 1e-8 (below float32's rounding).
template <class V>
inline V exp2_poly(V f) {
  V p = 1.5353362e-4f - V{} * 0;
  p = p * f + 1.3398874e-3f;
  p = p * f + 9.6184370e-3f;
  p = p * f + 5.5503325e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314720e-1f;
  return p * f + 1.0f;
}

constexpr float SMALLEST = -126.0f;  // 2^t below it counts as zero: no denormals, and -inf needs no case of its own

// 2^t for t <= about 1 (any t below 127); exactly 0 for t < SMALLEST, NaN for NaN.
inline vf exp2v(vf t) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  const __mmask16 in = _mm512_cmp_ps_mask(t, _mm512_set1_ps(SMALLEST), _CMP_NLT_UQ);
  const vf r = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_maskz_scalef_ps(in, exp2_poly<vf>(t - r), r);
#else
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: the sum's low mantissa bits are t rounded to an integer
  const vf safe = larger(splat(SMALLEST), t);
  const vf shifted = safe + magic;
  const vf p = exp2_poly<vf>(safe - (shifted - magic));
  const vi bits = (vi)shifted;
  const vf scale = (vf)((bits << 23) + 0x3f800000);
  return (vf)((vi)(p * scale) & ~(t < splat(SMALLEST)));
#endif
}

// tanh, relative error 2e-7: a polynomial near 0, where 1 - 2 / (e^2x + 1) cancels. NaN for NaN.
inline vf tanhv(vf x) {
  const vi sign = (vi)x & int32_t(0x80000000);
  const vf size = (vf)((vi)x ^ sign), square = x * x;
  vf p = splat(-5.6599886e-3f);
  p = p * square + 2.0590988e-2f;
  p = p * square - 5.3721068e-2f;
  p = p * square + 1.3331128e-1f;
  p = p * square - 3.3333261e-1f;
  p = p * square + 1.0f;
  const vf end = splat(10.0f), bounded = size > end ? end : size;
  const vf far = 1.0f - 2.0f / (exp2v(bounded * 2.8853901f) + 1.0f);  // 2 / log 2
  return size < splat(0.625f) ? x * p : (vf)((vi)far | sign);
}

}  // namespace sus
