// Rows of x by a few rows of A, for vectors of any width. Every output element is the sum of a vector's lanes, each one
// chain over in_features, whatever tile it is in: its bits depend on its row of x and its row of A, and on the width.
#pragma once

#include <type_traits>

#include "../cpu/vectors.h"

namespace loraplex {

constexpr int kRanks = 4;      // rows of A side by side
constexpr int kWideRanks = 8;  // the same with 32 registers, for many tokens

struct ShrinkRows {
  const float* x;               // [tokens, in_features]
  const void* const* a;         // `ranks` rows: one, kRanks or, only with AVX-512, kWideRanks
  const uint8_t* const* ahead;  // null, or as many rows that are fetched meanwhile
  float* out;                   // [tokens, out_stride], of which the first `ranks` columns
  int64_t tokens, in_features, out_stride;
  int32_t ranks, a_dtype;
};

// Each in a translation unit of its own, compiled for its instruction set.
void shrink_avx2(const ShrinkRows& rows);
void shrink_avx512(const ShrinkRows& rows);

namespace {

template <typename V, int T, int R, typename A>
void tile(const ShrinkRows& op, int64_t token, const uint8_t* const* ahead) {
  constexpr int64_t line = kLineBytes / sizeof(A);
  const float* x = op.x + token * op.in_features;
  const A* a[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) a[r] = static_cast<const A*>(op.a[r]);
  V sums[T][R];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[t][r] = V::zero();
  const auto step = [&](int64_t i, auto read) __attribute__((always_inline)) {
    V rows[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) rows[t] = read(x + t * op.in_features + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V value = read(a[r] + i);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sums[t][r].add_product(rows[t], value);
    }
  };
  const auto whole = [](const auto* p) __attribute__((always_inline)) { return V::load(p); };
  int64_t i = 0;
  if (ahead)
    for (; i + line <= op.in_features; i += line) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) fetch(ahead[r] + i * static_cast<int64_t>(sizeof(A)));
#pragma GCC unroll 8
      for (int64_t part = 0; part < line; part += V::kLanes) step(i + part, whole);
    }
  for (; i + V::kLanes <= op.in_features; i += V::kLanes) step(i, whole);
  if (const int left = static_cast<int>(op.in_features - i))  // the rest of A's last unit may hold anything
    step(i, [left](const auto* p) __attribute__((always_inline)) { return V::load_first(p, left); });
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) V::store_sums(sums[t], op.out + (token + t) * op.out_stride);
}

// The tile of exactly `count` <= T tokens.
template <typename V, int T, int R, typename A>
void some_tokens(const ShrinkRows& op, int64_t count, int64_t token, const uint8_t* const* ahead) {
  if constexpr (T > 1)
    if (count < T) return some_tokens<V, T - 1, R, A>(op, count, token, ahead);
  tile<V, T, R, A>(op, token, ahead);
}

template <typename V, int T, int R, typename A>
void all_tokens(const ShrinkRows& op) {
  for (int64_t token = 0; token < op.tokens; token += T)
    some_tokens<V, T, R, A>(op, op.tokens - token, token, token ? nullptr : op.ahead);
}

// R rows of A by tiles of T tokens, as many as registers allow.
template <typename V, int T, int R>
void shrink(const ShrinkRows& op) {
  with_type(op.a_dtype, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    all_tokens<V, T, R, A>(op);
  });
}

}  // namespace
}  // namespace loraplex
