// Rows of B^T times a row or a few rows of the narrow product, for vectors of any width. A row of B^T is contiguous along
// out_features, so vectors run along the columns. Every element is one chain of fused multiply-adds over the rank in
// rising order from 0, then one with scaling and out: its bits depend on its row of shrunk, its column of B and what out
// held, on nothing else, the vector's width included.
#pragma once

#include <type_traits>

#include "../cpu/vectors.h"

namespace loraplex {

constexpr int64_t kColumns = 64;  // of a tile: one unit of 16-bit elements, two of float32
constexpr int kStreams = 4;       // rows of B^T that one token reads side by side

// Some rows of B^T for one token: sums += value[r] * b[r], the rows in rising order.
struct TokenRows {
  const float* value;           // [count]
  const void* const* b;         // `count` rows of `columns` elements, whole units
  const uint8_t* const* ahead;  // kStreams rows that are fetched meanwhile
  float* sums;                  // [columns], whole tiles
  int64_t columns;
  int32_t count, b_dtype;
};

// All rows of B^T for some tokens.
struct TileRows {
  const float* shrunk;    // [tokens, shrunk_stride]
  const float* const* b;  // [lora_rank] rows of `columns` elements, whole tiles
  void* out;              // [tokens, out_stride]
  int64_t tokens, shrunk_stride, out_stride, lora_rank, columns;
  float scaling;
  int32_t out_dtype;
  bool fetches;  // the columns of the next tile
};

// Each in a translation unit of its own, compiled for its instruction set.
void add_token_avx2(const TokenRows& rows);
void add_token_avx512(const TokenRows& rows);
void add_tile_avx2(const TileRows& rows);
void add_tile_avx512(const TileRows& rows);

namespace {

template <typename V, int R, typename B>
void add_rows(const TokenRows& op) {
  constexpr int64_t line = kLineBytes / sizeof(B);
  V value[R];
  const B* b[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) value[r] = V::broadcast(op.value + r), b[r] = static_cast<const B*>(op.b[r]);
  for (int64_t c = 0; c < op.columns; c += line) {
#pragma GCC unroll 4
    for (int r = 0; r < kStreams; ++r) fetch(op.ahead[r] + c * static_cast<int64_t>(sizeof(B)));
#pragma GCC unroll 4
    for (int64_t i = c; i < c + line; i += V::kLanes) {
      V sums = V::load(op.sums + i);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums.add_product(value[r], V::load(b[r] + i));
      sums.store(op.sums + i);
    }
  }
}

template <typename V>
void add_token(const TokenRows& op) {
  with_type(op.b_dtype, [&](auto* type) {
    using B = std::remove_pointer_t<decltype(type)>;
    switch (op.count) {
      case 1: return add_rows<V, 1, B>(op);
      case 2: return add_rows<V, 2, B>(op);
      case 3: return add_rows<V, 3, B>(op);
      default: return add_rows<V, kStreams, B>(op);
    }
  });
}

// R tokens by N vectors of columns.
template <typename V, int R, int N, typename T>
void tile(const TileRows& op, int64_t token, int64_t column, bool fetches) {
  constexpr int64_t line = kLineBytes / sizeof(float);
  const float* shrunk = op.shrunk + token * op.shrunk_stride;
  T* out = static_cast<T*>(op.out) + token * op.out_stride + column;
  // what the next tile adds to: it comes while this one multiplies
  const bool has_next = token + 2 * R <= op.tokens;
#pragma GCC unroll 8
  for (int r = 0; has_next && r < R; ++r)
#pragma GCC unroll 8
    for (int64_t i = 0; i < N * V::kLanes; i += line) __builtin_prefetch(out + (R + r) * op.out_stride + i, 1, 3);
  V sums[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[r][n] = V::zero();
  for (int64_t j = 0; j < op.lora_rank; ++j) {
    const float* b = op.b[j] + column;
    if (fetches)
#pragma GCC unroll 8
      for (int64_t i = 0; i < N * V::kLanes; i += line) fetch(b + kColumns + i);
    V row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) row[n] = V::load(b + n * V::kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V value = V::broadcast(shrunk + r * op.shrunk_stride + j);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[r][n].add_product(value, row[n]);
    }
  }
  const V scaling = V::broadcast(&op.scaling);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const int left = static_cast<int>(op.columns - column) - n * V::kLanes;
      if (left <= 0) continue;
      T* at = out + r * op.out_stride + n * V::kLanes;
      V held = V::load_first(at, left);
      held.add_product(scaling, sums[r][n]);
      held.store_first(at, left);
    }
}

// R tokens by kColumns columns, in tiles whose sums stay in the registers.
template <typename V, int R, typename T>
void columns_of_tokens(const TileRows& op, int64_t token, int64_t column, bool fetches) {
  constexpr int64_t all = kColumns / V::kLanes, most = V::kMostSums / R;
  constexpr int64_t vectors = most >= all ? all : most >= 4 ? 4 : 2, width = vectors * V::kLanes;
  for (int64_t c = column; c < column + kColumns && c < op.columns; c += width)
    tile<V, R, vectors, T>(op, token, c, fetches);
}

// The tile of exactly `count` <= R tokens.
template <typename V, int R, typename T>
void some_tokens(const TileRows& op, int64_t count, int64_t token, int64_t column, bool fetches) {
  if constexpr (R > 1)
    if (count < R) return some_tokens<V, R - 1, T>(op, count, token, column, fetches);
  columns_of_tokens<V, R, T>(op, token, column, fetches);
}

template <typename V>
void add_tile(const TileRows& op) {
  constexpr int tokens = 6;
  with_type(op.out_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t column = 0; column < op.columns; column += kColumns)
      for (int64_t token = 0; token < op.tokens; token += tokens)
        some_tokens<V, tokens, T>(op, op.tokens - token, token, column,
                                  op.fetches && token == 0 && column + kColumns < op.columns);
  });
}

}  // namespace
}  // namespace loraplex
