// A vector as a type, for code that is written once and compiled for each width.
#pragma once

#include "simd.h"

namespace loraplex {

constexpr int64_t kLineBytes = 64;

// Unnamed: a file compiled for AVX-512 must not lend its copies to the others.
namespace {

// What is read while something else is computed: not now, but soon, hence into the second-level cache.
inline void fetch(const void* line) { __builtin_prefetch(line, 0, 2); }

struct Vector8 {
  static constexpr int kLanes = 8;
  static constexpr int kMostSums = 12;  // that a tile can keep in 16 registers

  __m256 lanes;

  static Vector8 zero() { return {_mm256_setzero_ps()}; }
  static Vector8 broadcast(const float* x) { return {_mm256_broadcast_ss(x)}; }
  template <typename T>
  static Vector8 load(const T* p) {
    return {loraplex::load(p)};
  }
  // The first n lanes; the others are zero. Nothing behind p[n - 1] is read or written.
  template <typename T>
  static Vector8 load_first(const T* p, int n) {
    return {loraplex::load_first(p, n)};
  }
  void store(float* p) const { loraplex::store(p, lanes); }
  template <typename T>
  void store_first(T* p, int n) const {
    loraplex::store_first(p, lanes, n);
  }
  void add_product(Vector8 a, Vector8 b) { lanes = fma(a.lanes, b.lanes, lanes); }
};

}  // namespace
}  // namespace loraplex
