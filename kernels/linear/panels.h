// y = x W^T + bias with a weight in panels, for vectors of any width. Every output element is one chain of fused
// multiply-adds over k in rising order from 0, whatever tile it is in: its bits depend on its row of x, its row of W
// and its bias, on nothing else, the vector's width included.
#pragma once

#include <algorithm>

#include "../cpu/simd.h"

namespace loraplex {

struct Linear {
  const float* x;      // [rows, in_features]
  const void* weight;  // [panels][in_features][16] of W
  const float* bias;   // [out_features] or null
  float* out;          // [rows, out_features]
  int64_t rows, in_features, out_features;
};

// Each in a translation unit of its own, compiled for its instruction set; `weight_dtype` is kFloat32 or kBFloat16.
void linear_avx2(const Linear& op, int32_t weight_dtype, int threads);
void linear_avx512(const Linear& op, int32_t weight_dtype, int threads);

// Unnamed: what is compiled for AVX-512 must not stand in for the same template elsewhere.
namespace {

constexpr int kPanel = 16;
constexpr int64_t kGroup = 4;        // panels of a task
constexpr int64_t kBlockK = 256;     // a panel's block is 16 KiB of float32: it stays in the first-level cache
constexpr int64_t kBlockRows = 192;  // x's block is 192 KiB: it stays in the second-level cache

// Of the 16 columns of a panel those that exist.
inline int panel_width(const Linear& op, int64_t panel) {
  return static_cast<int>(std::min<int64_t>(kPanel, op.out_features - panel * kPanel));
}

// R rows by P panels. Goes on with what `out` holds when k0 > 0, adds the bias at the end. V is a panel's 16 floats.
template <typename V, int R, int P, typename W>
void tile(const Linear& op, int64_t row, int64_t panel, int64_t k0, int64_t k1) {
  V sums[R][P];
  float* out = op.out + row * op.out_features + panel * kPanel;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p)
      sums[r][p] = k0 ? V::load_first(out + r * op.out_features + p * kPanel, panel_width(op, panel + p)) : V::zero();
  const float* x = op.x + row * op.in_features;
  const W* weight = static_cast<const W*>(op.weight) + panel * op.in_features * kPanel;
  for (int64_t k = k0; k < k1; ++k) {
    V w[P];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) w[p] = V::load(weight + (p * op.in_features + k) * kPanel);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto value = V::broadcast(x + r * op.in_features + k);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) sums[r][p].add_product(value, w[p]);
    }
  }
  const bool add_bias = op.bias && k1 == op.in_features;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const int width = panel_width(op, panel + p);
      if (add_bias) sums[r][p].add(V::load_first(op.bias + (panel + p) * kPanel, width));
      sums[r][p].store_first(out + r * op.out_features + p * kPanel, width);
    }
}

template <typename V, int R, int P, typename W>
void panels_of_rows(const Linear& op, int64_t row, int64_t begin, int64_t end, int64_t k0, int64_t k1) {
  int64_t panel = begin;
  for (; panel + P <= end; panel += P) tile<V, R, P, W>(op, row, panel, k0, k1);
  for (; panel < end; ++panel) tile<V, R, 1, W>(op, row, panel, k0, k1);
}

// The first `count` <= R rows, by the tile of exactly that many. Fewer rows take more panels at once, so that enough
// chains are in flight.
template <typename V, typename W, int R = V::kRows>
void few_rows(const Linear& op, int64_t count, int64_t row, int64_t begin, int64_t end, int64_t k0, int64_t k1) {
  if constexpr (R > 1)
    if (count < R) return few_rows<V, W, R - 1>(op, count, row, begin, end, k0, k1);
  constexpr int panels = std::clamp(V::kAccumulators / R, 1, static_cast<int>(kGroup));
  panels_of_rows<V, R, panels, W>(op, row, begin, end, k0, k1);
}

template <typename V, typename W>
void block(const Linear& op, int64_t row0, int64_t row1, int64_t begin, int64_t end) {
  if (row1 - row0 <= V::kRows) return few_rows<V, W>(op, row1 - row0, row0, begin, end, 0, op.in_features);
  constexpr int64_t step = V::kAccumulators / V::kRows;
  for (int64_t k0 = 0; k0 < op.in_features; k0 += kBlockK) {
    const int64_t k1 = std::min(k0 + kBlockK, op.in_features);
    for (int64_t panel = begin; panel < end; panel += step)
      for (int64_t row = row0; row < row1; row += V::kRows)
        few_rows<V, W>(op, std::min<int64_t>(V::kRows, row1 - row), row, panel, std::min(panel + step, end), k0, k1);
  }
}

template <typename V, typename W>
void run(const Linear& op, int threads) {
  const int64_t panels = (op.out_features + kPanel - 1) / kPanel, groups = (panels + kGroup - 1) / kGroup;
  const int64_t tasks = groups * ((op.rows + kBlockRows - 1) / kBlockRows);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (tasks > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t row = task / groups * kBlockRows, panel = task % groups * kGroup;
    block<V, W>(op, row, std::min(row + kBlockRows, op.rows), panel, std::min(panel + kGroup, panels));
  }
}

template <typename V>
void run(const Linear& op, int32_t weight_dtype, int threads) {
  if (weight_dtype == kFloat32) return run<V, float>(op, threads);
  run<V, BFloat16>(op, threads);
}

}  // namespace
}  // namespace loraplex
