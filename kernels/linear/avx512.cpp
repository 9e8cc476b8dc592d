// The product with vectors of sixteen. Only called where the CPU has AVX-512.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#include "panels.h"

namespace loraplex {
namespace {

inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load16(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

struct Panel {
  static constexpr int kRows = 8, kPanels = 3;  // 8 rows x 3 panels + 3 of the weight + 1 of x = 28 of 32 registers
  static constexpr int kAccumulators = 24;

  __m512 lanes;

  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Panel zero() { return {_mm512_setzero_ps()}; }
  static __m512 broadcast(const float* x) { return _mm512_set1_ps(*x); }
  template <typename W>
  static Panel load(const W* w) {
    return {load16(w)};
  }
  static Panel load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }

  void add_product(__m512 x, const Panel& w) { lanes = _mm512_fmadd_ps(x, w.lanes, lanes); }
  void add(const Panel& other) { lanes = _mm512_add_ps(lanes, other.lanes); }
  void store_first(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), lanes); }
};

}  // namespace

void linear_avx512(const Linear& op, Jobs& jobs) { add<Panel>(op, jobs); }

}  // namespace loraplex
