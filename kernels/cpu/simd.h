// Eight float lanes (AVX2 + FMA + F16C) and the element types of tensors. Compiled with -ffp-contract=off: a product
// and a sum become one rounding only where fma() says so, hence the same bits from every compiler.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace loraplex {

constexpr int kLanes = 8;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Numbers of kernels.adapters.ADAPTER_DTYPES.
enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Unnamed: a file compiled for AVX-512 must not lend its copies to the others.
namespace {

inline __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }

inline __m256 load(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 load(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline void store(float* p, __m256 x) { _mm256_storeu_ps(p, x); }
// Round to nearest even, NaN stays NaN, as torch does.
inline void store(BFloat16* p, __m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store(Float16* p, __m256 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// The first n of eight lanes; the others are zero. Nothing behind p[n - 1] is read or written.
template <typename T>
inline __m256 load_first(const T* p, int n) {
  if (n >= kLanes) return load(p);
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <typename T>
inline void store_first(T* p, __m256 x, int n) {
  if (n >= kLanes) return store(p, x);
  T lanes[kLanes];
  store(lanes, x);
  std::memcpy(p, lanes, n * sizeof(T));
}

// What x becomes when it is stored as T.
template <typename T>
inline __m256 rounded(__m256 x) {
  T lanes[kLanes];
  store(lanes, x);
  return load(lanes);
}
template <>
inline __m256 rounded<float>(__m256 x) { return x; }

// ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7))
inline float sum(__m256 x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float max(__m256 x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// Lane i is the sum of x[i]: each in the order of hadd, the same for every i.
inline __m256 sums(const __m256 (&x)[kLanes]) {
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// e^x within 2 units in the last place; 1 at 0, 0 at -inf, inf from 88.8 on, NaN stays NaN.
inline __m256 exp(__m256 x) {
  x = _mm256_min_ps(_mm256_set1_ps(89.0f), _mm256_max_ps(_mm256_set1_ps(-104.0f), x));
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), nearest);  // log2(e)
  // ln 2 in two parts: n times the first is exact
  __m256 r = fma(n, _mm256_set1_ps(-0.693359375f), x);
  r = fma(n, _mm256_set1_ps(2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = fma(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = fma(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = fma(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = fma(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = fma(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_add_ps(fma(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
  // 2^n in two factors: n reaches from -150, below the smallest subnormal, to 128
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  const auto power = [](__m256i exponent) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
  };
  return _mm256_mul_ps(_mm256_mul_ps(p, power(half)), power(_mm256_sub_epi32(whole, half)));
}

inline float exp(float x) { return _mm256_cvtss_f32(exp(_mm256_set1_ps(x))); }

// Calls f with a null pointer of the element type that dtype names.
template <typename F>
inline void with_type(int32_t dtype, F f) {
  if (dtype == kFloat32) return f(static_cast<float*>(nullptr));
  if (dtype == kBFloat16) return f(static_cast<BFloat16*>(nullptr));
  f(static_cast<Float16*>(nullptr));
}

}  // namespace
}  // namespace loraplex
