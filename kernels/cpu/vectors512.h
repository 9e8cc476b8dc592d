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
};

}  // namespace
}  // namespace loraplex
