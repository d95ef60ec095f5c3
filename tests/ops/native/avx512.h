// The AVX-512 instructions that the native kernel uses, in plain C++, for machines that lack them: included before the
// kernel it makes it compile as for AVX-512, with other instructions (see compile-avx512). Slow, and only for tests.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

typedef float floats __attribute__((vector_size(64)));
typedef int32_t integers __attribute__((vector_size(64)));
typedef uint64_t words __attribute__((vector_size(64)));

#pragma GCC diagnostic ignored "-Wpsabi"

template <class To, class From>
inline To cast(From x) {
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

template <class F>
inline floats each(const F& f) {
  floats x;
  for (int i = 0; i < 16; i++) x[i] = f(i);
  return x;
}

template <class F>
inline __m512i each_word(const F& f) {
  words x;
  for (int i = 0; i < 8; i++) x[i] = f(i);
  return cast<__m512i>(x);
}

template <class F>
inline uint32_t mask(const F& f) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; i++) bits |= uint32_t(f(i)) << i;
  return bits;
}

template <class F>
inline float reduce(floats x, const F& f) {
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; i++) x[i] = f(x[i], x[i + width]);
  return x[0];
}

inline floats set1_ps(float x) {
  return each([&](int) { return x; });
}
inline floats max_ps(floats x, floats y) {
  return each([&](int i) { return x[i] > y[i] ? x[i] : y[i]; });
}
inline float reduce_add_ps(floats x) {
  return reduce(x, [](float a, float b) { return a + b; });
}
inline float reduce_max_ps(floats x) {
  return reduce(x, [](float a, float b) { return a > b ? a : b; });
}
inline uint32_t cmp_nlt(floats x, floats y) {
  return mask([&](int i) { return !(x[i] < y[i]); });
}
inline floats roundscale_ps(floats x, int) {
  return each([&](int i) { return nearbyintf(x[i]); });
}
// Where the mask is set; the kernel's exponents are whole, finite or NaN there.
inline floats maskz_scalef_ps(uint32_t set, floats x, floats exponent) {
  return each([&](int i) {
    if (!(set >> i & 1)) return 0.0f;
    return exponent[i] == exponent[i] ? float(x[i] * exp2(double(exponent[i]))) : exponent[i];
  });
}
inline uint32_t movepi32_mask(__m512i x) {
  return mask([y = cast<integers>(x)](int i) { return y[i] < 0; });
}
inline __m512i set1_epi64(int64_t x) {
  return each_word([&](int) { return uint64_t(x); });
}
inline __m512i mul_epu32(__m512i x, __m512i y) {
  const words a = cast<words>(x), b = cast<words>(y);
  return each_word([&](int i) { return uint64_t(uint32_t(a[i])) * uint32_t(b[i]); });
}
inline __m512i unpacklo_epi64(__m512i x, __m512i y) {
  const words a = cast<words>(x), b = cast<words>(y);
  return each_word([&](int i) { return i % 2 ? b[i - 1] : a[i]; });
}
inline __m512i unpackhi_epi64(__m512i x, __m512i y) {
  const words a = cast<words>(x), b = cast<words>(y);
  return each_word([&](int i) { return i % 2 ? b[i] : a[i + 1]; });
}

}  // namespace emulated

#define __AVX512F__ 1
#define __AVX512DQ__ 1
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(x, y, nlt) emulated::cmp_nlt(x, y)
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps emulated::roundscale_ps
#define _mm512_maskz_scalef_ps emulated::maskz_scalef_ps
#define _mm512_movepi32_mask emulated::movepi32_mask
#define _mm512_set1_epi64 emulated::set1_epi64
#define _mm512_mul_epu32 emulated::mul_epu32
#define _mm512_unpacklo_epi64 emulated::unpacklo_epi64
#define _mm512_unpackhi_epi64 emulated::unpackhi_epi64
