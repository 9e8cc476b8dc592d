// The two products of attention over one tile of keys, for one or two rows at a time.
#pragma once

#include <algorithm>

#include "../cpu/simd.h"

namespace loraplex {
namespace {

constexpr int64_t kTile = 64;

// Scores of R rows with 8 / R keys: each is the sum of eight lanes, each a chain over the head's width.
template <int R>
void score(const float* query, const float* const* keys, int64_t width, float* out) {
  constexpr int K = kLanes / R;
  __m256 lanes[kLanes] = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    __m256 q[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) q[r] = load(query + r * width + d);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      const __m256 key = load(keys[k] + d);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) lanes[r * K + k] = fma(q[r], key, lanes[r * K + k]);
    }
  }
  float scores[kLanes];
  store(scores, sums(lanes));
  for (int r = 0; r < R; ++r) std::copy(scores + r * K, scores + (r + 1) * K, out + r * kTile);
}

// mixed += weights by values, for R rows and V vectors from d on: each element one chain over the keys in rising order.
template <int R, int V>
void mix(const float* weights, const float* const* values, int64_t first, int64_t end, int64_t d, int64_t width,
         float* mixed) {
  __m256 lanes[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) lanes[r][v] = load(mixed + r * width + d + v * kLanes);
  for (int64_t i = first; i < end; ++i) {
    __m256 value[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) value[v] = load(values[i] + d + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256 weight = _mm256_broadcast_ss(weights + r * kTile + i);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) lanes[r][v] = fma(weight, value[v], lanes[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(mixed + r * width + d + v * kLanes, lanes[r][v]);
}

}  // namespace
}  // namespace loraplex
