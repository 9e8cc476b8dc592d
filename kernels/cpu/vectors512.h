// Vectors of sixteen. Only for files that are compiled for AVX-512.
#pragma once

#include "vectors.h"

namespace loraplex {
namespace {

inline __m512 widen(__m256i bits, const BFloat16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m512 widen(__m256i bits, const Float16*) { return _mm512_cvtph_ps(bits); }

struct Vector16 {
  static constexpr int kLanes = 16;
  static constexpr int kMostSums = 24;  // that a tile can keep in 32 registers

  __m512 lanes;

  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Vector16 zero() { return {_mm512_setzero_ps()}; }
  static Vector16 broadcast(const float* x) { return {_mm512_set1_ps(*x)}; }
  static Vector16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  template <typename T>
  static Vector16 load(const T* p) {
    return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p)};
  }
  // The first n lanes, at most all; the others are zero. Nothing behind p[n - 1] is read or written.
  static Vector16 load_first(const float* p, int n) {
    return {n >= kLanes ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(first(n), p)};
  }
  template <typename T>
  static Vector16 load_first(const T* p, int n) {
    return {n >= kLanes ? load(p).lanes : widen(_mm256_maskz_loadu_epi16(first(n), p), p)};
  }
  void store(float* p) const { _mm512_storeu_ps(p, lanes); }
  void store_first(float* p, int n) const {
    if (n >= kLanes) return store(p);
    _mm512_mask_storeu_ps(p, first(n), lanes);
  }
  template <typename T>
  void store_first(T* p, int n) const {
    loraplex::store_first(p, _mm512_castps512_ps256(lanes), n);
    if (n > loraplex::kLanes)
      loraplex::store_first(p + loraplex::kLanes, _mm512_extractf32x8_ps(lanes, 1), n - loraplex::kLanes);
  }
  void add_product(Vector16 a, Vector16 b) { lanes = _mm512_fmadd_ps(a.lanes, b.lanes, lanes); }

  // out[i] is the sum of the lanes of x[i], in one order for every i and N: in each quarter of the vector (0 + 2) +
  // (1 + 3), then of the quarters (0 + 2) + (1 + 3).
  template <int N>
  static void store_sums(const Vector16 (&x)[N], float* out) {
    static_assert(N == 1 || N % 4 == 0);
    const __m512 none = _mm512_setzero_ps();
    if constexpr (N == 1) {
      *out = _mm_cvtss_f32(sums(x[0].lanes, none, none, none));
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < N; i += 4)
        _mm_storeu_ps(out + i, sums(x[i].lanes, x[i + 1].lanes, x[i + 2].lanes, x[i + 3].lanes));
    }
  }

 private:
  static __m128 sums(__m512 x0, __m512 x1, __m512 x2, __m512 x3) {
    const __m512d low = _mm512_castps_pd(pairs(x0, x1)), high = _mm512_castps_pd(pairs(x2, x3));
    const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                                          _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
  }
  // Of each quarter: x0 + x2, y0 + y2, x1 + x3, y1 + y3.
  static __m512 pairs(__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  }
};

}  // namespace
}  // namespace loraplex
