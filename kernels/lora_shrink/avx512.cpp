// Rows of x by eight rows of A. A vector holds eight lanes of two rows of A beside each other, and the same lanes of x
// twice: every sum has the lanes that it has with vectors of eight, and the same bits. Only called where the CPU has
// AVX-512.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#include "../cpu/vectors512.h"
#include "tile.h"

namespace loraplex {
namespace {

constexpr int kTokens = 6, kPairs = kManyRanks / 2;  // 6 x 4 sums + 4 of A + 1 of x = 29 of 32 registers

inline __m512 twice(__m256 x) { return _mm512_broadcast_f32x8(x); }
inline __m512 beside(__m256 low, __m256 high) { return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1); }

// A quarter for each row: (0 + 4), (1 + 5), (2 + 6), (3 + 7).
inline __m512 halves(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// out[2 i] and out[2 i + 1] are the sums of the lower and upper lanes of x[i], in the order of sum().
inline void store_sums(const __m512 (&x)[kPairs], float* out) {
  const __m512 first = halves(x[0], x[1]), last = halves(x[2], x[3]);
  // in quarter i: the two parts of row i, and between them those of row 4 + i
  const __m512 two = _mm512_add_ps(_mm512_unpacklo_ps(first, last), _mm512_unpackhi_ps(first, last));
  const __m512 one = _mm512_add_ps(two, _mm512_permute_ps(two, 0x0e));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, one)));
}

template <int T, typename A>
void tile(const ShrinkRows& op, int64_t token, const uint8_t* const* ahead) {
  const float* x = op.x + token * op.in_features;
  const A* a[kManyRanks];
#pragma GCC unroll 8
  for (int r = 0; r < kManyRanks; ++r) a[r] = static_cast<const A*>(op.a[r]);
  __m512 sums[T][kPairs];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int p = 0; p < kPairs; ++p) sums[t][p] = _mm512_setzero_ps();
  const auto step = [&](int64_t i, auto read) __attribute__((always_inline)) {
    __m512 pairs[kPairs];
#pragma GCC unroll 8
    for (int p = 0; p < kPairs; ++p) pairs[p] = beside(read(a[2 * p] + i), read(a[2 * p + 1] + i));
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const __m512 row = twice(read(x + t * op.in_features + i));
#pragma GCC unroll 8
      for (int p = 0; p < kPairs; ++p) sums[t][p] = _mm512_fmadd_ps(row, pairs[p], sums[t][p]);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= op.in_features; i += kLanes) {
    if (ahead && i * static_cast<int64_t>(sizeof(A)) % kLineBytes == 0)
#pragma GCC unroll 8
      for (int r = 0; r < kManyRanks; ++r) fetch(ahead[r] + i * static_cast<int64_t>(sizeof(A)));
    step(i, [](const auto* p) __attribute__((always_inline)) { return load(p); });
  }
  if (const int left = static_cast<int>(op.in_features - i))  // the rest of A's last unit may hold anything
    step(i, [left](const auto* p) __attribute__((always_inline)) { return load_first(p, left); });
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) store_sums(sums[t], op.out + (token + t) * op.out_stride);
}

// The tile of exactly `count` <= T tokens.
template <int T, typename A>
void some_tokens(const ShrinkRows& op, int64_t count, int64_t token) {
  if constexpr (T > 1)
    if (count < T) return some_tokens<T - 1, A>(op, count, token);
  tile<T, A>(op, token, token ? nullptr : op.ahead);
}

}  // namespace

void shrink_many_avx512(const ShrinkRows& op) {
  with_type(op.a_dtype, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    for (int64_t token = 0; token < op.tokens; token += kTokens)
      some_tokens<kTokens, A>(op, op.tokens - token, token);
  });
}

}  // namespace loraplex
